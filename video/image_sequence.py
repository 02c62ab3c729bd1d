"""Image sequences as frames: a folder, or a pattern of names, in the order in which people count.

Pillow reads the images; PNG files of 16 bits go through FFmpeg, because Pillow would cut them to 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .errors import VideoError
from .geometry import FrameSize
from .reader_views import placed

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH_AT = 24  # in the file: signature, length, "IHDR", width and height come before
COUNTER = re.compile(r"%0?(\d*)d|#+")  # img_%04d.png, img_####.png
SIXTEEN_BITS = 65535


@dataclass(frozen=True)
class ImageList:
    """Image files in order."""

    name: str
    files: tuple[Path, ...]


def natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which frame_10 comes after frame_9."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def find_images(where: str | Path) -> ImageList:
    """The images of a folder, or of a path whose name is a pattern (``*``, ``?``, ``%04d``, ``####``).

    Raises VideoError where there are none.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
        reason = f"The folder {path} holds no images ({', '.join(sorted(SUFFIXES))}); choose another one."
    elif path.is_file():
        files, reason = [path], ""
    else:
        pattern = COUNTER.sub(lambda match: "[0-9]*", path.name)
        files = [file for file in path.parent.glob(pattern) if file.is_file()] if path.parent.is_dir() else []
        reason = f"No file is called {path}; enter a folder, or a name with * or %04d for the number."
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise VideoError(reason)
    return ImageList(str(path), tuple(sorted(files, key=natural_order)))


def read_image(path: Path) -> Tensor:
    """One image as float32 [H, W, 3 or 4] in 0..1, turned as its EXIF data says. Raises VideoError."""
    try:
        with path.open("rb") as file:
            head = file.read(PNG_DEPTH_AT + 1)
        if head[: len(PNG_SIGNATURE)] == PNG_SIGNATURE and head[PNG_DEPTH_AT:] == b"\x10":
            return torch.from_numpy(_sixteen_bits(path))
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                gray = np.asarray(image, np.float32) / (1 if image.mode == "F" else SIXTEEN_BITS)
                return torch.from_numpy(np.repeat(gray[..., None], 3, 2)).clamp_(0, 1)
            alpha = "A" in image.getbands() or "transparency" in image.info
            pixels = np.asarray(image.convert("RGBA" if alpha else "RGB"), np.float32)
            return torch.from_numpy(pixels / np.float32(255))
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, StopIteration, Image.DecompressionBombError) as error:
        raise VideoError(f"{path.name} cannot be read as an image; remove it or save it again.") from error


def _sixteen_bits(path: Path) -> NDArray[np.float32]:
    with av.open(f"file:{path}", format="png_pipe") as container:
        frame = next(container.decode(video=0))
    alpha = any(component.is_alpha for component in frame.format.components)
    frame = frame.reformat(format="rgba64le" if alpha else "rgb48le")
    return np.asarray(frame.to_ndarray(), np.float32) / np.float32(SIXTEEN_BITS)


def read_images(
    files: Sequence[Path],
    *,
    size: FrameSize | None = None,
    on_frame: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, Tensor | None]:
    """Images, float32 [N, H, W, 3], and their alpha, [N, H, W], None where no image has one.

    The first image decides the size, unless `size` does. on_frame: called with the number of images done so far,
    before the first and after each. Raises VideoError, also for images of different sizes.
    """
    on_frame(0)
    images: Tensor | None = None
    alpha: Tensor | None = None
    for number, path in enumerate(files):
        picture = read_image(path)
        picture = placed(picture, size) if size is not None else picture
        if images is None:
            images = torch.empty(len(files), *picture.shape[:2], 3)
        if picture.shape[:2] != images.shape[1:3]:
            raise VideoError(
                f"{path.name} is {picture.shape[1]}x{picture.shape[0]} and {files[0].name} "
                f"{images.shape[2]}x{images.shape[1]}; enter a width and a height, or use images of one size."
            )
        images[number] = picture[..., :3]
        if picture.shape[2] > 3:
            alpha = torch.ones(images.shape[:3]) if alpha is None else alpha
            alpha[number] = picture[..., 3]
        on_frame(number + 1)
    assert images is not None
    return images, alpha


def fingerprint(files: Sequence[Path]) -> list[Any]:
    """What changes when a file does: names, sizes and times."""
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
