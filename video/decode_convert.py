"""Decoded pictures to R'G'B' float32, written straight where they are wanted.

FFmpeg's scaler does matrix, chroma interpolation and resizing in one step, planar and with accurate rounding; a filter
graph is used because it takes flags, matrix and chroma sites alike in every PyAV version, whereas `reformat` ignored
colour tags before version 17. The first picture is compared with the plain formulas of decode_color.py; where they
disagree, the plain ones are used from then on.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from .decode_color import PictureColor, is_gray, is_rgb, reference_rgb
from .geometry import Placement
from .tone_mapping import to_sdr

log = logging.getLogger(__name__)

FLAGS = "accurate_rnd+full_chroma_int+full_chroma_inp"
SAME_SIZE, RESIZED = "bilinear", "bicubic"
SCALER_NAMES = {"bt2020nc": "bt2020"}  # the scaler's name that every version knows
ROWS_AT_ONCE = 32  # keeps a stripe of a frame in the processor's cache
LARGEST_ERROR = 1.001 / 255
CHECKED_ROWS = 64
# What white becomes in FFmpeg's 16-bit R'G'B': from limited-range Y'CbCr 255 moved up by 8 bits, from full-range the
# largest number moved up likewise, from R'G'B' and gray 65535.
WHITE_FROM_LIMITED, WHITE = 255 << 8, (1 << 16) - 1


@dataclass(frozen=True)
class Orientation:
    """What a player does with the stored picture: mirror it left to right, then turn it clockwise by quarter turns."""

    quarter_turns: int = 0
    mirrored: bool = False

    @property
    def swaps(self) -> bool:
        """Whether width and height change places."""
        return self.quarter_turns % 2 == 1

    def apply(self, planes: NDArray[Any]) -> NDArray[Any]:
        """A view of [..., H, W] as shown."""
        if self.mirrored:
            planes = planes[..., ::-1]
        return np.rot90(planes, -self.quarter_turns, (-2, -1))


@dataclass(frozen=True)
class PictureFormat:
    """How the pictures of a stream are to be read. hdr: a key of tone_mapping.TO_NITS; wide: BT.2020 primaries."""

    color: PictureColor
    alpha: bool = False
    hdr: str | None = None
    wide: bool = False
    orientation: Orientation = Orientation()


class FrameConverter:
    """Writes pictures of one stream into frames of one size; may be used from several threads at once."""

    def __init__(self, picture: PictureFormat, place: Placement, alpha: bool) -> None:
        self._picture, self._place, self._alpha = picture, place, alpha
        turned = picture.orientation.swaps
        size = (place.scaled_width, place.scaled_height)
        self._scaled = size[::-1] if turned else size
        self._local = threading.local()
        self._check = threading.Lock()
        self._plain: bool | None = None

    def convert(self, frame: av.VideoFrame, rgb: NDArray[np.float32], alpha: NDArray[np.float32] | None = None) -> None:
        """Write one picture into `rgb`, float32 [H, W, 3] in 0..1, and `alpha`, float32 [H, W].

        An alpha that the picture does not have is 1; around a padded picture all is 0.
        """
        planes, white = self._planes(frame)
        planes = [self._picture.orientation.apply(plane) for plane in planes]
        place = self._place
        top, left = max(0, place.top), max(0, place.left)
        bottom = min(place.height, place.top + place.scaled_height)
        right = min(place.width, place.left + place.scaled_width)
        if (bottom - top, right - left) != rgb.shape[:2]:
            rgb[:] = 0
            if alpha is not None:
                alpha[:] = 0
        rows = slice(top - place.top, bottom - place.top)
        columns = slice(left - place.left, right - place.left)
        planes = [plane[rows, columns] for plane in planes]
        _write_rgb(rgb[top:bottom, left:right], planes[:3], white[0])
        if alpha is not None:
            inside = alpha[top:bottom, left:right]
            inside[:] = planes[3] if len(planes) > 3 else 1
            if len(planes) > 3 and white[3] != 1:
                inside /= np.float32(white[3])
                np.minimum(inside, 1, out=inside)

    def _planes(self, frame: av.VideoFrame) -> tuple[list[NDArray[Any]], list[float]]:
        """Red, green, blue (and alpha) [h, w] as stored, scaled, and the number that means 1 in each."""
        if self._plain is None:
            with self._check:
                if self._plain is None:
                    self._plain = self._disagrees(frame)
        if self._picture.hdr is not None:
            return self._tone_mapped(frame)
        if self._plain:
            return self._reference(frame)
        return self._fast(frame, self._scaled)

    def _fast(self, frame: av.VideoFrame, size: tuple[int, int]) -> tuple[list[NDArray[Any]], list[float]]:
        """Through FFmpeg's scaler."""
        name = frame.format.name
        deep = max(component.bits for component in frame.format.components) > 8 or "f32" in name or "f16" in name
        out_format = f"gbr{'a' if self._alpha else ''}p{'16le' if deep else ''}"
        converted = self._graph(frame, size, out_format)
        kind = np.uint16 if deep else np.uint8
        height, width = converted.height, converted.width
        planes = []
        planes_out: Any = converted.planes
        for plane in planes_out:
            values = np.frombuffer(plane, kind)
            step = plane.line_size // values.itemsize
            planes.append(values[: step * height].reshape(height, step)[:, :width])
        bits = max(component.bits for component in frame.format.components)
        largest = ((1 << bits) - 1) << max(0, 16 - bits)
        white = WHITE_FROM_LIMITED if not self._picture.color.full_range else largest
        white = 255 if not deep else WHITE if is_rgb(name) or is_gray(name) else white
        opaque = 255 if not deep else min(largest, WHITE)
        return [planes[2], planes[0], planes[1], *planes[3:]], [float(white)] * 3 + [float(opaque)] * (len(planes) - 3)

    def _graph(self, frame: av.VideoFrame, size: tuple[int, int], out_format: str) -> av.VideoFrame:
        """Run a frame through this thread's graph for its format and size."""
        graphs = self._local.__dict__.setdefault("graphs", {})
        key = (frame.format.name, frame.width, frame.height, size, out_format)
        graph = graphs.get(key)
        if graph is None:
            if len(graphs) > 4:
                graphs.clear()
            graph = graphs[key] = self._build(frame, size, out_format)
        frame.pts = None
        graph.push(frame)
        pulled = graph.pull()
        assert isinstance(pulled, av.VideoFrame)
        return pulled

    def _build(self, frame: av.VideoFrame, size: tuple[int, int], out_format: str) -> av.filter.Graph:
        color = self._picture.color
        same = size == (frame.width, frame.height)
        options = [f"{size[0]}:{size[1]}:flags={SAME_SIZE if same else RESIZED}+{FLAGS}"]
        if color.matrix != "rgb":
            matrix = SCALER_NAMES.get(color.matrix, color.matrix)
            options.append(f"in_color_matrix={matrix}:in_range={'pc' if color.full_range else 'tv'}:out_range=pc")
            name = frame.format.name
            if "420" in name or "422" in name or "411" in name or "410" in name:
                options.append(f"in_h_chr_pos={128 if color.centered else 0}")
            if "420" in name or "440" in name or "410" in name:
                options.append("in_v_chr_pos=128")
        graph: Any = av.filter.Graph()
        with suppress(AttributeError):  # before PyAV 17 there is no choice
            graph.threads = 1
        steps = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format.name,
                time_base=frame.time_base or Fraction(1),
            ),
            graph.add("scale", ":".join(options)),
            graph.add("format", out_format),
            graph.add("buffersink"),
        ]
        for one, other in pairwise(steps):
            one.link_to(other)
        graph.configure()
        return graph

    def _reference(self, frame: av.VideoFrame) -> tuple[list[NDArray[Any]], list[float]]:
        """Through the plain formulas, resized by torch."""
        rgb = reference_rgb(frame, self._picture.color, torch.float32)
        if rgb is None:
            return self._fast(frame, self._scaled)
        if self._alpha:
            alpha, white = self._fast(frame, (frame.width, frame.height))
            mask = (
                torch.from_numpy(alpha[3].astype(np.float32)) / white[3] if len(alpha) > 3 else torch.ones_like(rgb[0])
            )
            rgb = torch.cat((rgb, mask[None]))
        width, height = self._scaled
        if rgb.shape[1:] != (height, width):
            rgb = torch.nn.functional.interpolate(rgb[None], (height, width), mode="bicubic", antialias=True)[0]
        return list(rgb.clamp(0, 1).numpy()), [1.0] * len(rgb)

    def _tone_mapped(self, frame: av.VideoFrame) -> tuple[list[NDArray[Any]], list[float]]:
        planes, white = self._reference(frame) if self._plain else self._fast(frame, self._scaled)
        code = torch.stack([torch.from_numpy(p.astype(np.float32)) / w for p, w in zip(planes, white)]).clamp_(0, 1)
        assert self._picture.hdr is not None
        rgb = to_sdr(code[:3], self._picture.hdr, self._picture.wide)
        return [*rgb.numpy(), *code[3:].numpy()], [1.0] * len(code)

    def _disagrees(self, frame: av.VideoFrame) -> bool:
        """Whether FFmpeg's scaler gives other colours than the plain formulas for this picture.

        It is known to misplace the chroma of pictures with an odd side, by stretching it over the whole, and to take
        gray for full range.
        """
        if is_subsampled_unevenly(frame) or (is_gray(frame.format.name) and not self._picture.color.full_range):
            return True
        expected = reference_rgb(frame, self._picture.color, torch.float32, CHECKED_ROWS)
        if expected is None:
            return False
        try:
            planes, white = self._fast(frame, (frame.width, frame.height))
        except (av.FFmpegError, ValueError, AttributeError) as error:
            log.warning("FFmpeg's scaler cannot be used (%s); colours are converted by the plain formulas.", error)
            return True
        rows = frame.height if frame.height <= CHECKED_ROWS else CHECKED_ROWS - 2
        given = np.stack([np.minimum(p[:rows].astype(np.float32) / w, 1) for p, w in zip(planes[:3], white)])
        distance = float(np.abs(given - expected[:, :rows].numpy()).max())
        if distance > LARGEST_ERROR:
            log.warning(
                "FFmpeg's scaler is off by %.1f levels of 255; colours are converted by the plain formulas.",
                255 * distance,
            )
        return distance > LARGEST_ERROR


def _write_rgb(out: NDArray[np.float32], planes: list[NDArray[Any]], white: float) -> None:
    """Interleave three planes [H, W], in which `white` means 1, into [H, W, 3], stripe by stripe."""
    for top in range(0, out.shape[0], ROWS_AT_ONCE):
        stripe = out[top : top + ROWS_AT_ONCE]
        for channel, plane in enumerate(planes):
            stripe[..., channel] = plane[top : top + ROWS_AT_ONCE]
        if white != 1:
            stripe /= np.float32(white)
        if white not in (1, 255):
            np.minimum(stripe, 1, out=stripe)


def is_subsampled_unevenly(frame: av.VideoFrame) -> bool:
    """Whether chroma samples are shared by pixels of which the last column or row has too few."""
    components = frame.format.components
    if len(components) < 3 or is_rgb(frame.format.name):
        return False
    chroma = components[1]
    return any(
        side % shared and shared < side
        for side, part in ((frame.width, chroma.width), (frame.height, chroma.height))
        for shared in [-(-side // part)]
    )
