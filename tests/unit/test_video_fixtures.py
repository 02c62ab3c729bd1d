"""The generated videos hold what their table says, seen with plain PyAV and Pillow; numbers and times read back."""

from fractions import Fraction

import av
import numpy as np
import pytest
from apple_silicon_video.tests.video_fixtures import FIXTURES, UnreadableNumber, make, read_number, read_time
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.clips import mask
from apple_silicon_video.tests.video_fixtures.numbered_picture import LARGEST, bits_of, picture
from apple_silicon_video.tests.video_fixtures.sound import Sound, wave
from PIL import Image, ImageSequence

READABLE = [name for name, fixture in FIXTURES.items() if not fixture.error and len(fixture.numbers) < 1000]
WITH_SOUND = [name for name in READABLE if FIXTURES[name].sound]
UNTURN = {
    None: lambda shown: shown,
    "clockwise": lambda shown: np.rot90(shown, -1),
    "half a turn": lambda shown: np.rot90(shown, 2),
    "anticlockwise": lambda shown: np.rot90(shown, 1),
    "mirrored": lambda shown: shown[:, ::-1],
}
MATRICES = {"rgb": 0, "bt709": 1, "unspecified": 2, "smpte170m": (5, 6), "bt2020nc": 9}
TRANSFERS = {"bt709": 1, "unspecified": 2, "smpte170m": 6, "smpte2084": 16, "arib-std-b67": 18}


def frames_of(path):
    """Frames and the second at which each is shown; a packet that cannot be decoded is passed over."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            try:
                yield from ((frame, frame.pts * frame.time_base) for frame in packet.decode())
            except av.FFmpegError:
                continue


def number_or_none(pixels):
    try:
        return read_number(pixels)
    except UnreadableNumber:
        return None


@pytest.mark.parametrize("name", [name for name in READABLE if name != "webp.webp"])
def test_frames_are_those_of_the_table(video_files, name):
    fixture = FIXTURES[name]
    found = {}
    for frame, time in frames_of(video_files(name)):
        pixels = UNTURN[fixture.turned](frame.to_ndarray(format="rgb24"))
        assert pixels.shape[1::-1] == fixture.size
        found[time] = number_or_none(pixels)
    expected = dict(zip(fixture.times, fixture.numbers))
    assert fixture.cut_off or found.keys() <= expected.keys()
    intact = {time: number for time, number in expected.items() if number not in fixture.unreadable}
    assert {time: found.get(time) for time in intact} == intact
    assert fixture.unreadable or fixture.cut_off or list(found.values()) == list(fixture.numbers)


@pytest.mark.parametrize("name", [name for name in READABLE if name != "webp.webp"])
def test_properties_are_those_of_the_table(video_files, name):
    fixture = FIXTURES[name]
    with av.open(f"file:{video_files(name)}") as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert stream.codec_context.codec.canonical_name == fixture.codec
        assert fixture.fps in (None, stream.average_rate)
        assert frame.format.components[0].bits == fixture.bits
        matrix = 0 if frame.format.is_rgb else frame.colorspace
        assert matrix in np.atleast_1d(MATRICES[fixture.matrix])
        assert frame.color_trc == TRANSFERS[fixture.transfer]
        is_full = frame.color_range == 2 or frame.format.is_rgb or frame.format.name.startswith("yuvj")
        assert is_full == fixture.full_range
        assert bool(container.streams.audio) == bool(fixture.sound)


def test_animated_webp_holds_the_numbers(video_files):
    fixture = FIXTURES["webp.webp"]
    with Image.open(video_files("webp.webp")) as image:
        numbers = [read_number(np.asarray(shown.convert("RGB"))) for shown in ImageSequence.Iterator(image)]
        assert numbers == list(fixture.numbers) and image.info["duration"] == 1000 / fixture.fps


def test_long_clip_counts_to_the_end(video_files):
    fixture = FIXTURES["20000_frames.mp4"]
    with av.open(str(video_files(fixture.name))) as container:
        assert container.streams.video[0].frames == len(fixture.numbers) == 20_000
        for number in (0, 4321, 19_999):
            container.seek(int(fixture.times[number] * av.time_base))
            last = next(f for f in container.decode(video=0) if f.pts * f.time_base >= fixture.times[number])
            assert read_number(last.to_ndarray(format="rgb24")) == number


@pytest.mark.parametrize("name", WITH_SOUND)
def test_sound_tells_the_time(video_files, name):
    """In mid-clip, every channel but the low-frequency one (index 3 of 5.1, cut by AAC) has the moment's pitch."""
    fixture = FIXTURES[name]
    sound = fixture.sound
    with av.open(str(video_files(name))) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=sound.layout, rate=stream.rate)
        pieces = [
            (piece.pts * piece.time_base, piece.to_ndarray())
            for frame in container.decode(stream)
            for piece in resampler.resample(frame)
        ]
    samples, start = np.concatenate([piece for _, piece in pieces], 1), pieces[0][0]
    assert (stream.rate, samples.shape[0]) == (sound.rate, sound.channels)
    assert abs(samples.shape[1] / stream.rate - float(sound.seconds)) < 0.06
    middle = sound.start + sound.seconds / 2
    begin = int((middle - start - Fraction(1, 50)) * stream.rate)
    window = samples[:, begin : begin + stream.rate // 25]
    for channel in set(range(sound.channels)) - ({3} if sound.channels == 6 else set()):
        assert read_time(window[channel], stream.rate, channel) == pytest.approx(float(middle), abs=0.008)


@pytest.mark.parametrize("name", ["alpha.mov"])
def test_alpha_is_the_mask(video_files, name):
    with av.open(str(video_files(name))) as container:
        alpha = next(container.decode(video=0)).to_ndarray(format="rgba")[..., 3] / 255
    np.testing.assert_allclose(alpha, mask(64, 64), atol=0.01)


def test_alpha_of_vp9_is_in_the_second_layer(video_files):
    """FFmpeg's own VP9 decoder leaves it out; libvpx, asked by name, has it."""
    with av.open(str(video_files("alpha.webm"))) as container:
        stream = container.streams.video[0]
        decoder = av.CodecContext.create("libvpx-vp9", "r")
        decoder.extradata = stream.codec_context.extradata
        frame = next(frame for packet in container.demux(stream) for frame in decoder.decode(packet))
    alpha = frame.to_ndarray(format="rgba")[..., 3] / 255
    np.testing.assert_allclose(alpha[:28], 1, atol=0.03)
    np.testing.assert_allclose(alpha[36:], 0.5, atol=0.03)


@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if fixture.error])
def test_unreadable_files_have_no_frames(video_files, name):
    path = video_files(name)
    assert path.exists() == (name != "missing.mp4") and path.is_dir() == (name == "folder.mp4")
    with pytest.raises((av.FFmpegError, IndexError)):
        list(frames_of(path))


def test_issue_is_covered():
    fixtures = FIXTURES.values()
    codecs = {"h264", "hevc", "vp9", "av1", "prores", "mpeg4", "mjpeg", "gif", "webp"}
    assert codecs <= {fixture.codec for fixture in fixtures}
    assert {1, 2, 6} <= {fixture.sound.channels for fixture in fixtures if fixture.sound}
    assert {"smpte2084", "arib-std-b67"} <= {fixture.transfer for fixture in fixtures}


def test_files_are_made_once(tmp_path):
    first = make("one_frame.mp4", tmp_path / "new folder")
    stamp = first.stat().st_mtime_ns
    assert make("one_frame.mp4", tmp_path / "new folder") == first and first.stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == ["one_frame.mp4"]


def test_every_number_reads_back():
    for number in [*range(300), 20_000, LARGEST]:
        shown = picture(number, 48, 32)
        assert read_number(shown) == read_number(np.round(shown * 65535).astype(np.uint16)[None]) == number


def test_numbers_survive_what_videos_do():
    rng = np.random.default_rng(1)
    for number in (0, 1, 777, LARGEST):
        image = Image.fromarray(np.round(picture(number, 64, 64) * 255).astype(np.uint8))
        for size in ((32, 32), (24, 16), (97, 45), (832, 480)):
            assert read_number(np.asarray(image.resize(size, Image.Resampling.BICUBIC))) == number
        noisy = (np.asarray(image) + rng.normal(0, 25, (64, 64, 3))).clip(0, 255)
        assert read_number(noisy) == read_number(noisy**2.2) == read_number(noisy * 0.3) == number


def test_pictures_that_are_no_frame_are_told_apart():
    shown = picture(1234, 64, 64)
    others = (
        shown[::-1],
        shown[:, ::-1],
        shown[::-1, ::-1],
        np.rot90(shown),
        np.rot90(shown, -1),
        shown * 0,
        1 - shown,
    )
    blends = (0.5 * (shown + picture(4321, 64, 64)),)
    for wrong in (*others, *blends):
        with pytest.raises(UnreadableNumber):
            read_number(wrong)


def test_no_single_cell_turns_one_number_into_another():
    numbers = {tuple(bits_of(number)) for number in range(LARGEST + 1)}
    for number in (0, 1, 85, 4096, LARGEST):
        bits = bits_of(number)
        for cell in range(len(bits)):
            changed = list(bits)
            changed[cell] = not changed[cell]
            assert tuple(changed) not in numbers


def test_time_is_read_from_short_windows():
    sound = Sound(channels=2, seconds=Fraction(3))
    samples = wave(sound)
    for middle in (0.1, 0.77, 1.5, 2.9):
        for channel in range(2):
            begin = int((middle - 0.02) * sound.rate)
            window = samples[channel, begin : begin + sound.rate // 25]
            assert read_time(window, sound.rate, channel) == pytest.approx(middle, abs=0.003)
    with pytest.raises(ValueError, match="silence"):
        read_time(np.zeros(2000), 48000)
