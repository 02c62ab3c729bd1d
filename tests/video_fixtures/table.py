"""Every fixture of the video tests: the file's name, what makes it, and exactly what must be read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from . import damage
from .clips import Clip, write, write_sound_only, write_webp
from .sound import Sound

X264 = {"g": "12"}
X265 = {"x265-params": "log-level=error:keyint=12"}
VPX = {"deadline": "realtime", "cpu-used": "8"}
SVT = {"preset": "12", "crf": "20", "g": "12"}
RGB: dict[str, Any] = {"matrix": "rgb", "transfer": "unspecified", "full_range": True}
MATROSKA = Fraction(1, 1000)
IRREGULAR = (0, 1, 2, 3, 5, 6, 10, 11, 12, 20, 21, 23, 24, 30, 31, 32, 33, 41, 43, 44, 45, 46, 47, 48)


@dataclass(frozen=True)
class Fixture:
    """A file and what it holds.

    numbers: the frames as read_number reads them, in presentation order. times: seconds at which each is shown, on
    the file's own clock. size: width and height as shown. fps: the mean rate, None where it is not a constant one.
    sound: None for a file without. error: what the one-sentence error says (a regular expression, any case), None
    for a file that can be read. unreadable: numbers which damage makes missing or unreadable; every other one is
    exact. cut_off: the file ends in the middle of a frame, of which decoders may make something after the numbers
    given. codec: FFmpeg's name. bits: of each component. alpha: of a mask as clips.mask makes it. matrix, transfer:
    FFmpeg's names of the colour tags. turned: what the player does with the stored picture.
    """

    name: str
    maker: Callable[[Path], None]
    numbers: tuple[int, ...] = ()
    times: tuple[Fraction, ...] = ()
    size: tuple[int, int] = (64, 64)
    fps: Fraction | None = Fraction(24)
    sound: Sound | None = None
    error: str | None = None
    unreadable: frozenset[int] = frozenset()
    cut_off: bool = False
    codec: str = "h264"
    bits: int = 8
    alpha: bool = False
    matrix: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False
    turned: str | None = None


CODECS = {
    "libx264": "h264",
    "libx265": "hevc",
    "libvpx-vp9": "vp9",
    "libsvtav1": "av1",
    "prores_ks": "prores",
    "libwebp": "webp",
}


def _of(name: str, clip: Clip, maker: Callable[[Path], None] | None = None, **changes: Any) -> Fixture:
    """A fixture that expects what its clip says."""
    container = Path(name).suffix
    moments = clip.moments
    if container in (".mkv", ".webm"):
        moments = tuple(round(moment / MATROSKA) * MATROSKA for moment in moments)
    expected = Fixture(
        name,
        maker or (lambda path: write(clip, path)),
        numbers=tuple(range(clip.first, clip.first + clip.frames)),
        times=moments,
        size=clip.size,
        fps=None if clip.times else clip.fps,
        sound=clip.sound,
        codec=CODECS.get(clip.encoder, clip.encoder),
        bits=10 if clip.deep else 8,
        alpha=clip.alpha,
        matrix=clip.matrix,
        transfer=clip.transfer,
        full_range=clip.full_range,
    )
    return replace(expected, **changes)


def _some(clip: Clip, numbers: range, clock: Fraction | None = None) -> dict[str, Any]:
    """Numbers and times of a part of a clip, on the clock of its container."""
    moments = [clip.moments[number] for number in numbers]
    times = tuple(round(moment / clock) * clock if clock else moment for moment in moments)
    return {"numbers": tuple(numbers), "times": times}


def _hdr(transfer: str) -> Clip:
    return Clip(
        "libx265", "yuv420p10le", matrix="bt2020nc", primaries="bt2020", transfer=transfer, tag="hvc1", options=X265
    )


def _codecs() -> Iterable[Fixture]:
    yield _of("h264.mp4", Clip(options=X264, sound=Sound()))
    yield _of("h264.mkv", Clip(options=X264, sound=Sound(encoder="flac")))
    yield _of("hevc.mp4", Clip("libx265", tag="hvc1", options=X265, sound=Sound()))
    yield _of("vp9.webm", Clip("libvpx-vp9", options=VPX, sound=Sound(encoder="libopus")))
    yield _of("av1.mp4", Clip("libsvtav1", options=SVT))
    yield _of("prores.mov", Clip("prores_ks", "yuv422p10le", sound=Sound(encoder="pcm_s16le")))
    yield _of("mpeg4.mp4", Clip("mpeg4", options={"g": "12", "q": "3"}))
    yield _of("mpeg4.avi", Clip("mpeg4", options={"g": "12", "q": "3"}), matrix="unspecified", transfer="unspecified")
    mjpeg = Clip("mjpeg", "yuvj420p", full_range=True, matrix="smpte170m", options={"q": "3"})
    yield _of("mjpeg.avi", replace(mjpeg, sound=Sound(encoder="pcm_s16le")), transfer="unspecified")
    gif = Clip("gif", "rgb8", fps=Fraction(25))
    yield _of("gif.gif", gif, **RGB)
    webp = Clip("libwebp", fps=Fraction(25))
    yield _of("webp.webp", webp, lambda p: write_webp(webp, p), **RGB)


def _timing() -> Iterable[Fixture]:
    irregular = tuple(Fraction(step, 24) for step in IRREGULAR)
    vfr = Clip(times=irregular, options={**X264, "bf": "2"})
    yield _of("variable_rate.mp4", vfr)
    yield _of("variable_rate.mkv", vfr)
    yield _of("ntsc.mp4", Clip(fps=Fraction(30000, 1001), frames=31, options=X264))
    yield _of("b_frames.mp4", Clip(options={"g": "24", "bf": "3", "x264-params": "b-pyramid=normal:scenecut=0"}))
    open_gop = {"x264-params": "keyint=8:min-keyint=8:open-gop=1:bframes=2:b-adapt=0:scenecut=0"}
    yield _of("open_gop.mp4", Clip(options=open_gop))
    leading = {"x265-params": "log-level=error:keyint=8:min-keyint=8:open-gop=1:bframes=2:b-adapt=0:scenecut=0"}
    hevc = Clip("libx265", options=leading)
    yield _of("open_gop_cut.mkv", hevc, damage.from_key_frame(hevc, 1), **_some(hevc, range(8, 24), MATROSKA))
    hidden = damage.delayed(Clip(options=X264, sound=Sound()), Fraction(-10, 24))
    shown = tuple(Fraction(index, 24) for index in range(14))
    yield _of("edit_list_negative.mp4", hidden, numbers=tuple(range(10, 24)), times=shown, fps=Fraction(24))
    yield _of(
        "edit_list_delay.mp4", damage.delayed(Clip(options=X264, sound=Sound()), Fraction(1, 2)), fps=Fraction(24)
    )
    late = Sound(start=Fraction(1, 4), seconds=Fraction(3, 4))
    yield _of("late_sound.mp4", Clip(options=X264, sound=late))


def _pictures() -> Iterable[Fixture]:
    turns: dict[str, Callable[[Any], Any]] = {
        "clockwise": lambda shown: np.rot90(shown, 1),
        "half a turn": lambda shown: np.rot90(shown, 2),
        "anticlockwise": lambda shown: np.rot90(shown, -1),
        "mirrored": lambda shown: shown[:, ::-1],
    }
    for how, turn in turns.items():
        clip = Clip(size=(64, 96), turn=turn, options=X264)
        yield _of(f"{how.replace(' ', '_')}.mp4", clip, damage.turned(clip, how), turned=how)
    yield _of("odd.webm", Clip("libvpx-vp9", size=(65, 49), options=VPX))
    yield _of("odd_444.mp4", Clip(pixel_format="yuv444p", size=(65, 49), options=X264))
    yield _of("h264_10bit.mp4", Clip(pixel_format="yuv420p10le", options=X264))
    yield _of("hevc_10bit.mp4", Clip("libx265", "yuv420p10le", tag="hvc1", options=X265))
    yield _of("av1_10bit.mp4", Clip("libsvtav1", "yuv420p10le", options=SVT))
    yield _of("pq.mp4", _hdr("smpte2084"))
    yield _of("hlg.mp4", _hdr("arib-std-b67"))
    yield _of("bt601.mp4", Clip(matrix="smpte170m", primaries="smpte170m", transfer="smpte170m", options=X264))
    yield _of("full_range.mp4", Clip(pixel_format="yuvj420p", full_range=True, options=X264))
    yield _of("alpha.webm", Clip("libvpx-vp9", "yuva420p", alpha=True, options=VPX))
    yield _of("alpha.mov", Clip("prores_ks", "yuva444p10le", alpha=True, options={"profile": "4"}), bits=12)


def _sounds() -> Iterable[Fixture]:
    for name, channels in (("mono", 1), ("stereo", 2), ("surround", 6)):
        yield _of(f"{name}.mp4", Clip(options=X264, sound=Sound(channels, rate=44100)))
    yield _of("surround.mov", Clip(options=X264, sound=Sound(6, encoder="pcm_s16le")))
    sound = Sound()
    yield Fixture("sound_only.m4a", lambda p: write_sound_only(sound, p), sound=sound, error="no video|only sound")


def _lengths() -> Iterable[Fixture]:
    yield _of("one_frame.mp4", Clip(frames=1, options=X264))
    yield _of("one_frame.gif", Clip("gif", "rgb8", frames=1, fps=Fraction(25)), fps=None, **RGB)
    yield Fixture("no_frame.mp4", damage.without_frames, error="no video|no frame|no picture|only sound")
    many = Clip(frames=20_000, options={"preset": "ultrafast", "g": "250", "crf": "30"})
    yield _of("20000_frames.mp4", many)


def _damaged() -> Iterable[Fixture]:
    clip = Clip(options=X264)
    yield Fixture("truncated.mp4", damage.cut(clip, 0.6), error="damaged|cut off|incomplete|truncated|cannot be read")
    whole = range(10)
    yield _of("truncated.mkv", clip, damage.cut(clip, 0.6), **_some(clip, whole, MATROSKA), cut_off=True)
    front = replace(clip, container_options={"movflags": "faststart"})
    yield _of("truncated_front.mp4", front, damage.cut(front, 0.7), **_some(front, whole), cut_off=True)
    yield _of("corrupt.mp4", clip, damage.overwritten(clip, 4), unreadable=frozenset(range(1, 12)))
    mjpeg = Clip("mjpeg", "yuvj420p", full_range=True, matrix="smpte170m", options={"q": "3"})
    broken = damage.overwritten(mjpeg, 8)
    yield _of("corrupt.avi", mjpeg, broken, unreadable=frozenset({8}), transfer="unspecified")


def _names() -> Iterable[Fixture]:
    clip = Clip(options=X264, frames=6)
    for name in (
        "name with spaces.mp4",
        "größe 视频 ви́део 🎬.mp4",
        "100% %03d.mp4",
        "time 12:30, #1 'a' & \"b\" [x]*?.mp4",
        "-dash.mp4",
    ):
        yield _of(name, clip)
    yield _of("mp4_named.avi", clip, damage.under_another_name(clip, ".mp4"))
    yield _of("mp4_named.gif", clip, damage.under_another_name(clip, ".mp4"))
    yield _of("mp4_named.txt", clip, damage.under_another_name(clip, ".mp4"))
    yield _of("no_ending", clip, damage.under_another_name(clip, ".mp4"))


def _others() -> Iterable[Fixture]:
    wrong = "not a video|no video|cannot be read"
    yield Fixture("text.mp4", damage.of(b"This is a shopping list.\n" * 50), error=wrong)
    yield Fixture("noise.mp4", damage.noise, error=wrong)
    yield Fixture("zip.mp4", damage.of(b"PK\x03\x04" + bytes(200)), error=wrong)
    yield Fixture("page.webm", damage.of(b"<!doctype html><title>404 Not Found</title>\n"), error=wrong)
    yield Fixture("playlist.mp4", damage.of(b"#EXTM3U\n#EXTINF:1,\nfile:///nowhere/x.ts\n"), error=wrong)
    yield Fixture("empty.mp4", damage.of(b""), error="empty|not a video|no video|cannot be read")
    yield Fixture("folder.mp4", damage.folder, error="folder|directory")
    yield Fixture("missing.mp4", lambda _: None, error="does not exist|no such file|not found|no file")
    one = _of("picture_named.mp4", Clip(frames=1), damage.still, codec="png")
    yield replace(one, fps=None, **RGB)


GROUPS = (_codecs, _timing, _pictures, _sounds, _lengths, _damaged, _names, _others)
FIXTURES: dict[str, Fixture] = {fixture.name: fixture for group in GROUPS for fixture in group()}
