"""Files as they go wrong: cut, overwritten, turned, renamed, without frames, or no video at all.

A track's transformation matrix lies in its tkhd box (ISO/IEC 14496-12, 8.3.2): nine numbers in 16.16 or, the last
column, 2.30 fixed point, before the track's width and height, which are the last 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from .clips import Clip, _sound_stream, write, write_sound
from .numbered_picture import picture
from .sound import Sound

ONE, UNIT = 1 << 16, 1 << 30
MATRICES: dict[str, tuple[int, int, int, int]] = {
    "clockwise": (0, 1, -1, 0),
    "half a turn": (-1, 0, 0, -1),
    "anticlockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
}
"""What a player does with the stored picture: a, b, c, d of x' = a x + c y, y' = b x + d y."""

Maker = Callable[[Path], None]


def turned(clip: Clip, how: str) -> Maker:
    """A clip whose first track asks the player to turn it."""

    def make(path: Path) -> None:
        write(clip, path)
        data = bytearray(path.read_bytes())
        box = data.index(b"tkhd") - 4
        end = box + struct.unpack_from(">I", data, box)[0]
        width, height = (side >> 16 for side in struct.unpack_from(">II", data, end - 8))
        a, b, c, d = MATRICES[how]
        x = max(0, -a) * width + max(0, -c) * height
        y = max(0, -b) * width + max(0, -d) * height
        struct.pack_into(">9i", data, end - 44, a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, x * ONE, y * ONE, UNIT)
        path.write_bytes(data)

    return make


def cut(clip: Clip, part: float) -> Maker:
    """The first part of a file."""

    def make(path: Path) -> None:
        write(clip, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * part)])

    return make


def overwritten(clip: Clip, packet: int) -> Maker:
    """A file in which noise covers one packet of the first stream, all but its first 8 bytes."""

    def make(path: Path) -> None:
        write(clip, path)
        with av.open(str(path)) as container:
            packets = [found for found in container.demux(video=0) if found.size]
            begin, size = packets[packet].pos, packets[packet].size
        assert begin is not None
        data = bytearray(path.read_bytes())
        noise = np.random.default_rng(packet).integers(0, 256, size - 8, np.uint8)
        data[begin + 8 : begin + size] = noise.tobytes()
        path.write_bytes(data)

    return make


def from_key_frame(clip: Clip, key_frame: int) -> Maker:
    """The packets of a clip from its n-th key frame on, as a recording that begins in the middle."""

    def make(path: Path) -> None:
        whole = path.with_name(f"whole-{path.name}")
        write(clip, whole)
        with av.open(str(whole)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            seen = -1
            for packet in source.demux(video=0):
                seen += packet.is_keyframe
                if seen >= key_frame and packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        whole.unlink()

    return make


def without_frames(path: Path) -> None:
    """A video track and a sound track, and samples only in the second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 64
        sound = Sound()
        write_sound(container, _sound_stream(container, sound), sound)


def of(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content) and None


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(5).integers(0, 256, 50_000, np.uint8).tobytes())


def still(path: Path) -> None:
    """A PNG picture, whatever the file's name says."""
    Image.fromarray(np.round(picture(0, 64, 64) * 255).astype(np.uint8)).save(path, "PNG")


def folder(path: Path) -> None:
    path.mkdir()


def under_another_name(clip: Clip, ending: str) -> Maker:
    """A clip written for one ending and named with another."""

    def make(path: Path) -> None:
        written = path.with_name(f"{path.name}{ending}")
        write(clip, written)
        written.rename(path)

    return make


def delayed(clip: Clip, seconds: Fraction) -> Clip:
    """The same clip with every frame shown later, or, for a negative number, the first ones not at all."""
    return replace(clip, times=tuple(moment + seconds for moment in clip.moments))
