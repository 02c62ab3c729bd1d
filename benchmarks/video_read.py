"""Time to read frames as float32 R'G'B' in 0..1: plain PyAV, plain eva-decord and the pack, in one run.

Makes a 1080p H.264 and a 720p HEVC clip, then reads each sequentially, scaled to 832x480 and sparsely (6 frames),
the readers taking turns: ``python benchmarks/video_read.py [--rounds N] [--frames N] [--json]``. "Plain" is what a
script does: frames as 8-bit arrays from a multi-threaded decoder, stacked and divided by 255. Every reader opens the
file anew each time, so that the pack's index is part of its time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measure import Row
from torch import Tensor

FPS = 24
SCALED = (832, 480)
SPARSE = 6
SPARSE_TIMES = 8  # the sparse clip is so many times as long
GROUP = 48  # frames from one key frame to the next
READERS = ("PyAV", "eva-decord", "pack")
X265_OPTIONS = {"preset": "ultrafast", "x265-params": f"log-level=none:keyint={GROUP}"}
CLIPS: dict[str, tuple[str, int, int, dict[str, str]]] = {
    "1080p H.264": ("libx264", 1920, 1080, {"preset": "veryfast", "g": str(GROUP)}),
    "720p HEVC": ("libx265", 1280, 720, X265_OPTIONS),
}


def write_clip(path: Path, encoder: str, width: int, height: int, options: dict[str, str], frames: int) -> None:
    """A moving picture with detail and noise, tagged BT.709."""
    generator = np.random.default_rng(0)
    rows, columns = height // 8 + 2, width // 8 + frames + 2
    texture = np.kron(generator.integers(40, 200, (rows, columns), np.uint8), np.ones((8, 8), np.uint8))
    with av.open(str(path), "w") as container:
        tags = {"colorspace": "bt709", "color_range": "tv"}
        stream = container.add_stream(encoder, rate=FPS, options=options | tags)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            planes = np.full((height * 3 // 2, width), 128, np.uint8)
            planes[:height] = texture[:height, index * 4 : index * 4 + width]
            planes[:height:16, : width // 4] = generator.integers(16, 235, width // 4, np.uint8)
            planes[height : height + height // 4] = 90 + index % 60
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_pyav(path: Path, indices: Sequence[int] | None, size: tuple[int, int] | None) -> Tensor:
    """What a script does with PyAV."""
    width, height = size or (None, None)
    arrays = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if indices is None:
            arrays = [
                frame.to_ndarray(format="rgb24", width=width, height=height) for frame in container.decode(stream)
            ]
        else:
            assert stream.time_base is not None
            for index in indices:
                wanted = round(Fraction(index, FPS) / stream.time_base)
                container.seek(wanted, stream=stream)
                frame = next(f for f in container.decode(stream) if f.pts is not None and f.pts >= wanted)
                assert frame.pts == wanted, "a seek went past the frame"
                arrays.append(frame.to_ndarray(format="rgb24", width=width, height=height))
    return torch.from_numpy(np.stack(arrays)) / 255


def read_decord(path: Path, indices: Sequence[int] | None, size: tuple[int, int] | None) -> Tensor:
    """What a script does with eva-decord."""
    import decord

    width, height = size or (-1, -1)
    reader = decord.VideoReader(str(path), width=width, height=height)
    frames = reader.get_batch(list(range(len(reader))) if indices is None else list(indices))
    return torch.from_numpy(frames.asnumpy()) / 255


def read_pack(path: Path, indices: Sequence[int] | None, size: tuple[int, int] | None) -> Tensor:
    """The pack's reader, which forgets the file's index first."""
    from apple_silicon_video.video import reader

    reader.forget_indices()
    with reader.open_video(path) as video:
        wanted = reader.FrameSelection() if indices is None else indices
        return video.read(wanted, size=reader.FrameSize(*size) if size else None)


FUNCTIONS: dict[str, Callable[..., Tensor]] = dict(zip(READERS, (read_pyav, read_decord, read_pack)))


def run(rounds: int = 3, frames: int = 60) -> list[Row]:
    """One row per clip and way of reading: the fastest time of each reader in milliseconds a frame, and how many
    times as fast as the faster of the plain ones the pack is.
    """
    from _pack import load_pack

    load_pack()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, clip in CLIPS.items():
            short, long = Path(folder, "short.mp4"), Path(folder, "long.mp4")
            write_clip(short, *clip, frames)
            write_clip(long, *clip, frames * SPARSE_TIMES)
            groups = frames * SPARSE_TIMES // GROUP
            sparse = [groups * k // SPARSE * GROUP + GROUP // 2 for k in range(SPARSE)]
            ways: dict[str, tuple[Path, list[int] | None, tuple[int, int] | None]] = {
                "sequential": (short, None, None),
                "scaled": (short, None, SCALED),
                "sparse": (long, sparse, None),
            }
            for way, arguments in ways.items():
                count = SPARSE if arguments[1] else frames
                times = _measure(rounds, count, *arguments)
                plain = min(times["PyAV"], times["eva-decord"])
                rows.append({"clip": name, "reading": way, **times, "ratio": plain / times["pack"]})
    return rows


def _measure(rounds: int, count: int, *arguments: Any) -> dict[str, float]:
    """Milliseconds a frame of each reader, the fastest of several rounds in which they take turns."""
    best = dict.fromkeys(READERS, float("inf"))
    for _ in range(rounds):
        for reader, function in FUNCTIONS.items():
            start = time.perf_counter()
            result = function(*arguments)
            best[reader] = min(best[reader], (time.perf_counter() - start) * 1000 / count)
            assert len(result) == count
            del result
    return best


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description="Time reading videos with PyAV, eva-decord and the pack.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each reader (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=60, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = run(options.rounds, options.frames)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'clip':<14}{'reading':<12}" + "".join(f"{reader:>12}" for reader in READERS) + f"{'ratio':>9}")
    for row in rows:
        times = "".join(f"{row[reader]:>9.1f} ms" for reader in READERS)
        print(f"{row['clip']:<14}{row['reading']:<12}{times}{row['ratio']:>7.2f} x")


if __name__ == "__main__":
    main()
