"""Looks into videos from the command line, takes frames out of them, and makes videos of pictures.

``python scripts/video.py info FILE [--json]``; ``frames FILE --start S --count N --out DIR``; ``encode DIR OUT
--format NAME --fps F``. Messages go to stderr, one sentence each; the exit status is 0, 1 when a file cannot be read
or written or the work is interrupted, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from _command_line import add_command, positive, printable, run, shortened, stop_on_signals
from _pack import load_pack

try:
    import av  # noqa: F401
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed for {sys.executable}: run this with the Python that ComfyUI runs with.")

load_pack()

from apple_silicon_video.video.encoding import VideoWriter, encode_video  # noqa: E402
from apple_silicon_video.video.errors import VideoError  # noqa: E402
from apple_silicon_video.video.image_sequence import find_images, read_image  # noqa: E402
from apple_silicon_video.video.info_text import info_data, info_text  # noqa: E402
from apple_silicon_video.video.reader import FrameSelection, open_video  # noqa: E402
from apple_silicon_video.video.video_formats import QUALITIES, VideoFormat, load_formats  # noqa: E402

FRAMES_FORMATS = {False: "png-8bit", True: "png-16bit"}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    stop_on_signals()
    return run(_parser(), arguments, VideoError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="video.py", description="Look into videos and make them.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(commands, "info", info, "show what a video holds")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")

    command = add_command(commands, "frames", frames, "write frames of a video as PNG pictures")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--start", type=int, default=0, metavar="S", help="first frame, negative from the end")
    command.add_argument("--count", type=positive, metavar="N", help="how many (default: all from there on)")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")

    command = add_command(
        commands, "encode", encode, "make a video of a folder's pictures, in the order of their names"
    )
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("out", type=Path, metavar="OUT", help="file to write; an existing one is replaced")
    command.add_argument("--format", choices=load_formats(), metavar="NAME", help=_formats())
    command.add_argument(
        "--fps", type=_rate, required=True, metavar="F", help="frames a second: 16, 23.976, 30000/1001"
    )
    command.add_argument("--quality", choices=QUALITIES, default="standard", help="(default: %(default)s)")
    return parser


def _formats() -> str:
    return f"{', '.join(load_formats())} (default: the first that OUT's ending fits)"


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames a second, such as 16 or 30000/1001")
    return rate


def info(options: argparse.Namespace) -> None:
    """Print what a video holds; its frames are counted, not decoded."""
    with open_video(options.file) as reader:
        found = reader.info
    if options.json:
        print(json.dumps(info_data(found), indent=2, ensure_ascii=False))
        return
    print(printable(found.path))
    print(info_text(found))
    for name, value in found.metadata.items():
        print(shortened(printable(f"{name}: {value}")))


def frames(options: argparse.Namespace) -> None:
    """Write a range of frames as numbered PNG files into a new folder, 16 bits deep where the video has more than 8."""
    with open_video(options.file) as reader:
        selection = FrameSelection(start_frame=options.start, limit=options.count or 0)
        count = len(reader.indices(selection))
        known = reader.info
        pictures = reader.frames(selection, alpha=known.has_alpha)
        with VideoWriter(
            options.out, fps=known.fps, video_format=load_formats()[FRAMES_FORMATS[known.bit_depth > 8]]
        ) as writer:
            writer.write_all(pictures)
    print(f"{printable(str(options.out))}: {_frames(count)}")


def encode(options: argparse.Namespace) -> None:
    """Make a video of the pictures in a folder."""
    pictures, video_format = _Pictures(options.folder), _format_for(options.out, options.format)
    video = encode_video(options.out, pictures, fps=options.fps, video_format=video_format, quality=options.quality)
    print(
        f"{printable(str(video.path))}: {video.width}x{video.height}, {_frames(video.frames)} at {_fps(video.fps)}, "
        f"{video.encoder}"
    )


def _format_for(out: Path, name: str | None) -> VideoFormat:
    """The format of a name, or, without one, the first whose files end like `out`; VideoError where they do not."""
    formats = load_formats()
    fitting = [known for known in formats if formats[known].suffix == out.suffix.lower()]
    if name is None and not fitting:
        endings = ", ".join(sorted({known.suffix for known in formats.values() if known.suffix}))
        raise VideoError(f"{out} does not end like a video; let it end with one of {endings}, or give a --format.")
    chosen = formats[fitting[0] if name is None else name]
    if chosen.suffix and chosen.suffix != out.suffix.lower():
        raise VideoError(f"{out} does not end with {chosen.suffix}, as {chosen.name} does; rename it.")
    return chosen


class _Pictures:
    """A folder's pictures as frames [H, W, 3 or 4] in counting order, with alpha if the first one has it."""

    def __init__(self, folder: Path) -> None:
        self._paths = find_images(folder).files

    def __iter__(self) -> Iterator[torch.Tensor]:
        first = read_image(self._paths[0]).shape
        for path in self._paths:
            picture = read_image(path)
            if picture.shape[:2] != first[:2]:
                raise VideoError(
                    f"{path} is {picture.shape[1]}x{picture.shape[0]} and the first picture {first[1]}x{first[0]}; "
                    "scale it or remove it."
                )
            if first[2] == 4 and picture.shape[2] == 3:
                picture = torch.cat((picture, torch.ones_like(picture[..., :1])), 2)
            yield picture[..., : first[2]]


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _fps(fps: Fraction) -> str:
    return str(fps) if fps.denominator == 1 else f"{fps} ({float(fps):.3f})"


if __name__ == "__main__":
    sys.exit(main())
