"""Files broken at random, and a child process that reads them one after another, for the fuzz test.

Every mutation follows from its number, so that one that fails can be made again: ``mutated(content, seed)``.
As a script: ``mutation.py FOLDER FIRST LAST`` reads a JSON list of base files from stdin, reads the mutations FIRST to
LAST - 1 with the pack's reader, and writes one JSON line before and after each.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x00FFFFFF)
HEAD = 1024
ADDRESS_SPACE = 12 << 30
FRAMES_READ = 30


def mutated(content: bytes, seed: int) -> bytes:
    """A file's content with one to four kinds of damage; the beginning, where headers lie, is hit most often."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(DAMAGES)(data, rng)
        if not data:
            break
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """An offset: in the head, in the tail (an MP4 has its tables there), or anywhere."""
    size = len(data)
    ranges = ((0, min(HEAD, size)), (max(0, size - 2 * HEAD), size), (0, size))
    return rng.randrange(*rng.choice(ranges))


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 3, 20, 100))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _replace_bytes(data: bytearray, rng: random.Random) -> None:
    begin = _place(data, rng)
    for at in range(begin, min(len(data), begin + rng.choice((1, 4, 40, 400)))):
        data[at] = rng.randrange(256)


def _write_extreme(data: bytearray, rng: random.Random) -> None:
    at, value = _place(data, rng), rng.choice(EXTREMES)
    packed = struct.pack(rng.choice((">I", "<I")), value)[: len(data) - at]
    data[at : at + len(packed)] = packed


def _zero(data: bytearray, rng: random.Random) -> None:
    begin = _place(data, rng)
    end = min(len(data), begin + rng.choice((4, 64, 1000)))
    data[begin:end] = bytes(end - begin)


def _remove(data: bytearray, rng: random.Random) -> None:
    begin = _place(data, rng)
    del data[begin : begin + rng.choice((1, 8, 200, 5000))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    begin = _place(data, rng)
    data[begin:begin] = data[begin : begin + rng.choice((1, 8, 200, 5000))] * rng.choice((1, 2, 50))


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _swap(data: bytearray, rng: random.Random) -> None:
    length = rng.choice((4, 16, 500))
    a, b = _place(data, rng), _place(data, rng)
    first, second = bytes(data[a : a + length]), bytes(data[b : b + length])
    data[a : a + len(second)] = second
    data[b : b + len(first)] = first


Damage = Callable[[bytearray, random.Random], None]
DAMAGES: tuple[Damage, ...] = (_flip_bits, _replace_bytes, _write_extreme, _zero, _remove, _repeat, _cut, _swap)


def read_all(path: Path) -> str:
    """Read a file as the nodes do; what came of it in one word: "frames" or "error"."""
    from apple_silicon_video.video.errors import VideoError
    from apple_silicon_video.video.reader import FrameSelection, FrameSize, open_video
    from apple_silicon_video.video.remux import read_source

    with contextlib.suppress(VideoError):
        read_source(path)
    try:
        with open_video(path) as reader:
            selection = FrameSelection(limit=FRAMES_READ)
            frames = reader.read(selection, size=FrameSize(64, 64), alpha=reader.info.has_alpha)
            reader.audio(*reader.section(selection))
            reader.read([-1], size=FrameSize(64, 64))
            if not 0 < frames.shape[0] <= FRAMES_READ or not bool(frames.isfinite().all()):
                return f"wrong frames: {list(frames.shape)}"
    except VideoError as error:
        sentence = str(error)
        return "error" if sentence.endswith(".") and "\n" not in sentence else f"no sentence: {sentence}"
    return "frames"


def state() -> dict[str, int]:
    """What this process holds: resident memory in bytes, open files, threads; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, threads = len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return {"memory": 0, "files": 0, "threads": 0}
    return {"memory": pages * resource.getpagesize(), "files": files, "threads": threads}


def main(folder: Path, first: int, last: int) -> None:
    """Read mutations and tell of each."""
    import logging

    import av
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
    from _pack import load_pack

    load_pack()
    torch.set_num_threads(1)
    av.logging.set_level(None)
    logging.disable(logging.CRITICAL)
    bases = [Path(path) for path in json.load(sys.stdin)]
    contents = [path.read_bytes() for path in bases]
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for base in bases:
        read_all(base)
    for seed in range(first, last):
        base = bases[seed % len(bases)]
        path = folder / f"mutated{base.suffix}"
        path.write_bytes(mutated(contents[seed % len(bases)], seed))
        tell(seed=seed, base=base.name)
        try:
            outcome: Any = read_all(path)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        tell(seed=seed, base=base.name, outcome=outcome, **state())


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
