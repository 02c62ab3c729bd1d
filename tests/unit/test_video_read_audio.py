"""Sound of exactly the chosen range, in time with the pictures."""

from fractions import Fraction

import pytest
import torch
from apple_silicon_video.tests.video_fixtures import FIXTURES, read_time
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.video.audio_reading import read_all
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.reader import FrameSelection, open_video

SOUNDING = [name for name, fixture in FIXTURES.items() if fixture.sound and not fixture.error]
WINDOW = Fraction(1, 20)


def times_in(audio, begin, moments):
    """What the sound says about the time at some moments of the clip."""
    waveform, rate = audio["waveform"][0], audio["sample_rate"]
    found = []
    for moment in moments:
        middle = round((moment - begin) * rate)
        half = round(WINDOW / 2 * rate)
        found.append(read_time(waveform[0, middle - half : middle + half], rate))
    return found


@pytest.mark.parametrize("name", SOUNDING)
def test_sound_is_at_its_time(video_files, name):
    sound = FIXTURES[name].sound
    with open_video(video_files(name)) as video:
        audio = video.audio()
    assert audio["waveform"].dtype == torch.float32 and audio["waveform"].shape[:2] == (1, sound.channels)
    assert audio["sample_rate"] == sound.rate
    moments = [sound.start + sound.seconds * part for part in (Fraction(1, 5), Fraction(1, 2), Fraction(4, 5))]
    assert times_in(audio, 0, moments) == pytest.approx([float(moment) for moment in moments], abs=0.005)
    for channel in range(sound.channels):
        if name != "surround.mp4" or channel != 3:  # AAC's channel for low frequencies holds no tone as high
            at = round((sound.start + Fraction(1, 2)) * sound.rate)
            part = audio["waveform"][0, channel, at : at + sound.rate // 20]
            assert read_time(part, sound.rate, channel) == pytest.approx(float(sound.start) + 0.525, abs=0.01)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "prores.mov", "mono.mp4", "mjpeg.avi"])
@pytest.mark.parametrize(
    ("begin", "end"), [(Fraction(1, 3), Fraction(5, 6)), (Fraction(0), Fraction(1, 7)), (0.7, 0.9)]
)
def test_a_range_is_a_part_of_the_whole(video_files, name, begin, end):
    with open_video(video_files(name)) as video:
        whole, part = video.audio(), video.audio(begin, end)
    rate = whole["sample_rate"]
    first, last = round(Fraction(begin) * rate), round(Fraction(end) * rate)
    assert part["waveform"].shape[2] == last - first
    assert torch.allclose(part["waveform"], whole["waveform"][..., first:last], atol=2e-5)


def test_seeking_deep_into_a_sound_is_exact(video_files):
    """The decoder is started before the range, and its first packets do not count."""
    with open_video(video_files("h264.mp4")) as video:
        whole, part = video.audio(), video.audio(Fraction(9, 10), 1)
        assert torch.allclose(part["waveform"], whole["waveform"][..., 43200:48000], atol=1e-6)


def test_silence_where_there_is_no_sound(video_files):
    with open_video(video_files("late_sound.mp4")) as video:
        audio = video.audio()
        beyond = video.audio(Fraction(1, 2), 3)
    rate = audio["sample_rate"]
    assert float(audio["waveform"][..., : rate // 5].abs().max()) < 1e-3
    assert float(audio["waveform"][..., rate // 3 :].abs().max()) > 0.3
    assert beyond["waveform"].shape[2] == rate * 5 // 2 and float(beyond["waveform"][..., rate:].abs().max()) == 0


def test_sound_follows_a_selection(video_files):
    with open_video(video_files("h264.mp4")) as video:
        selection = FrameSelection(start_frame=6, limit=12)
        begin, end = video.section(selection)
        assert (begin, end) == (Fraction(1, 4), Fraction(3, 4))
        audio = video.audio(begin, end)
    assert audio["waveform"].shape[2] == 24000
    assert times_in(audio, begin, [Fraction(1, 2)]) == pytest.approx([0.5], abs=0.005)


def test_no_sound(video_files):
    with open_video(video_files("av1.mp4")) as video:
        assert video.info.audio is None and video.audio() is None
    with pytest.raises(VideoError, match=r"^av1.mp4 has no sound; "):
        read_all(video_files("av1.mp4"), -1, True)


@pytest.mark.parametrize(("rate", "mono"), [(-1, False), (16000, True), (44100, False)])
def test_all_samples_resampled_and_mixed(video_files, rate, mono):
    samples, found = read_all(str(video_files("stereo.mp4")), rate, mono)
    expected = rate if rate > 0 else 44100
    assert found == expected and samples.shape[0] == (1 if mono else 2)
    assert samples.shape[1] == pytest.approx(expected, rel=0.05)
