"""Time and memory to write a clip: the pack's encode_video against plain PyAV, each in fresh processes.

Plain PyAV is what core's Save Video does: clamp, 8 bits, from_ndarray, reformat to the encoder's pixel format, encode.
Both use the same encoder and options: ``python benchmarks/video_write.py [--frames N] [--runs N] [--json]``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from measure import PeakMemory, Row, in_own_process

FORMATS = ("h264-mp4", "hevc-10bit-mp4", "prores422-mov")
QUICK = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast"}}
"""Options under which converting counts most beside encoding."""
SIZE = (1080, 1920)
FPS = 24
MEGABYTE = 1e6


def moving_picture(frames: int) -> Any:
    """An IMAGE, float32 [frames, 1080, 1920, 3]: a gradient that drifts."""
    import torch

    height, width = SIZE
    images = torch.empty(frames, height, width, 3)
    x, y = torch.linspace(0, 1, width)[None, :], torch.linspace(0, 1, height)[:, None]
    for index, image in enumerate(images):
        phase = index / 24
        image[..., 0] = (x + phase).frac()
        image[..., 1] = y
        image[..., 2] = ((x + y) / 2 + phase / 2).frac()
    return images


def _format(name: str) -> tuple[Any, Any, dict[str, str]]:
    """A format, its software encoder, and that encoder's options."""
    from _pack import load_pack

    load_pack()
    from apple_silicon_video.video.video_formats import load_formats

    video_format = load_formats()[name]
    encoder = video_format.encoders_here(software_only=True)[0]
    return video_format, encoder, encoder.options | encoder.qualities["standard"] | QUICK.get(encoder.name, {})


def with_pack(images: Any, path: Path, name: str) -> None:
    """Write with encode_video."""
    video_format, _, options = _format(name)
    from apple_silicon_video.video.encoding import encode_video

    encode_video(path, images, fps=FPS, video_format=video_format, encoder_options=options, software_only=True)


def with_plain_pyav(images: Any, path: Path, name: str) -> None:
    """Write with PyAV alone."""
    import av

    video_format, encoder, options = _format(name)
    with av.open(str(path), "w", format=video_format.container) as container:
        stream: Any = container.add_stream(encoder.name, rate=Fraction(FPS))
        stream.height, stream.width = SIZE
        stream.pix_fmt = encoder.pixel_format
        stream.codec_context.options = options
        for image in images:
            if encoder.pixel_format.endswith("10le"):
                frame = av.VideoFrame.from_ndarray((image * 65535).clamp(0, 65535).numpy().astype("u2"), "rgb48le")
            else:
                frame = av.VideoFrame.from_ndarray((image * 255).clamp(0, 255).byte().numpy(), "rgb24")
            container.mux(stream.encode(frame.reformat(format=encoder.pixel_format, dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


WRITERS: dict[str, Callable[[Any, Path, str], None]] = {"plain PyAV": with_plain_pyav, "the pack": with_pack}


def measure(writer: str, name: str, frames: int) -> Row:
    """Seconds for one clip, and bytes by which the resident memory's peak grew over what the clip itself holds."""
    images = moving_picture(frames)
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[writer](images[:2], Path(folder) / "warm", name)
        start = time.perf_counter()
        with PeakMemory() as memory:
            WRITERS[writer](images, Path(folder) / "clip", name)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory.peak - memory.before}


def run(frames: int = 48, runs: int = 3) -> list[Row]:
    """One row for each format and writer: frames a second of the fastest run, largest memory in bytes, and the ratio
    of plain PyAV's time to the writer's, from runs that take turns."""
    rows = []
    for name in FORMATS:
        results: dict[str, list[Row]] = {writer: [] for writer in WRITERS}
        for _ in range(runs):
            for writer in WRITERS:
                results[writer].append(in_own_process(__file__, writer, name, frames))
        seconds = {writer: min(result["seconds"] for result in results[writer]) for writer in WRITERS}
        rows += [
            {
                "format": name,
                "writer": writer,
                "fps": frames / seconds[writer],
                "bytes": max(result["bytes"] for result in results[writer]),
                "ratio": seconds["plain PyAV"] / seconds[writer],
            }
            for writer in WRITERS
        ]
    return rows


def print_table(rows: list[Row]) -> None:
    """One line for each row."""
    print(f"{'format':<18}{'writer':<12}{'frames/s':>10}{'memory':>12}{'ratio':>8}")
    for row in rows:
        memory = f"{row['bytes'] / MEGABYTE:.0f} MB"
        print(f"{row['format']:<18}{row['writer']:<12}{row['fps']:>10.1f}{memory:>12}{row['ratio']:>8.2f}")


def main() -> None:
    """Run the benchmark, or with --measure one measurement for it."""
    parser = argparse.ArgumentParser(description="Measure writing 1080p clips with plain PyAV and with the pack.")
    parser.add_argument("--frames", type=int, default=48, help="frames of the clip (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="processes per format and writer (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", nargs=3, metavar=("WRITER", "FORMAT", "FRAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        writer, name, frames = options.measure
        print(json.dumps(measure(writer, name, int(frames))))
        return
    rows = run(options.frames, options.runs)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
