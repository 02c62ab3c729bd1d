"""Videos joined and cut: copied where that is exact, else encoded; frame numbers, times and sound of what comes out."""

import json
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from apple_silicon_video.tests.video_fixtures import FIXTURES, read_number, read_time
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.clips import Clip, write
from apple_silicon_video.tests.video_fixtures.sound import Sound
from apple_silicon_video.video.concatenate import Encoding, concatenate
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.output_file import numbered_names
from apple_silicon_video.video.reader import FrameSelection, open_video
from apple_silicon_video.video.trim import trim
from apple_silicon_video.video.video_formats import load_formats

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ENCODING = Encoding(load_formats()["h264-mp4"])
X264 = {"g": "12", "bf": "3", "x264-params": "scenecut=0:open-gop=0"}
COPIED = [
    name
    for name, fixture in FIXTURES.items()
    if name.endswith((".mp4", ".mov", ".mkv", ".webm"))
    and not (fixture.error or fixture.unreadable or fixture.cut_off or name.startswith(("20000", "open_gop_cut")))
    and name not in ("edit_list_negative.mp4", "picture_named.mp4")
]


def packets_of(path):
    with av.open(f"file:{path}") as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def contents(path):
    """[(number, second)] as the pack's reader gives them."""
    with open_video(path) as reader:
        numbers = [read_number(frame) for frame in reader.frames(FrameSelection())]
        return list(zip(numbers, reader.timestamps()))


def sound_at(path, moments):
    """Seconds of the clips that the sound comes from at some moments of a file; None for silence."""
    found = []
    with open_video(path) as reader:
        audio = reader.audio()
    samples, rate = audio["waveform"][0, 0], audio["sample_rate"]
    for moment in moments:
        window = samples[int((moment - 0.02) * rate) : int((moment + 0.02) * rate)]
        try:
            found.append(read_time(window, rate))
        except ValueError:
            found.append(None)
    return found


@pytest.fixture
def joined(tmp_path):
    def join(*sources, **options):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        return concatenate(sources, lambda end: numbered_names(folder, "o", 1, end), ENCODING, **options)

    return join


@pytest.fixture
def trimmed(tmp_path):
    def cut(source, mode="exact", **range_):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        names = lambda end: numbered_names(folder, "o", 1, end)  # noqa: E731
        return trim(source, names, ENCODING, FrameSelection(**range_), mode=mode)

    return cut


@pytest.mark.parametrize("name", COPIED)
def test_copies_hold_every_packet_and_go_on_without_a_gap(video_files, joined, name):
    """A file joined to itself: the same packets twice, numbers twice, and times that go on at the file's rate."""
    path, fixture = video_files(name), FIXTURES[name]
    edited = joined(path, path, mode="copy")
    assert edited.report == "Copied without encoding the pictures." and edited.path.suffix == path.suffix
    assert packets_of(edited.path) == packets_of(path) * 2
    found = contents(edited.path)
    assert [number for number, _ in found] == list(fixture.numbers) * 2
    times = [time for _, time in found]
    last = fixture.times[-1] + (1 / fixture.fps if fixture.fps else Fraction(1, 24))
    first = Fraction(0) if name == "edit_list_delay.mp4" else fixture.times[0]
    expected = [time - first for time in fixture.times] + [time + last - 2 * first for time in fixture.times]
    origin = times[0] - expected[0]
    assert all(abs(found - wanted - origin) <= Fraction(1, 900) for found, wanted in zip(times, expected))
    with av.open(str(path)) as before, av.open(str(edited.path)) as after:
        assert before.streams.video[0].codec_tag == after.streams.video[0].codec_tag
    with open_video(path) as before, open_video(edited.path) as after:
        same = ("width", "height", "rotation", "mirrored", "codec", "pixel_format", "color", "has_alpha", "bit_depth")
        assert {field: getattr(before.info, field) for field in same} == {
            field: getattr(after.info, field) for field in same
        }


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "av1.mp4", "alpha.mov", "ntsc.mp4"])
def test_ffprobe_agrees_with_copies(video_files, joined, name):
    """Debian's FFmpeg, another version than PyAV's, counts the frames, has no complaint and sees the exact length."""
    fixture = FIXTURES[name]
    path = joined(video_files(name), video_files(name), mode="copy").path
    fields = ["-show_entries", "stream=duration,nb_read_frames,codec_tag_string", "-select_streams", "v", "-of", "json"]
    result = subprocess.run(
        ["ffprobe", "-v", "warning", "-count_frames", *fields, path], capture_output=True, text=True, check=True
    )
    (stream,) = json.loads(result.stdout)["streams"]
    assert result.stderr == "" and int(stream["nb_read_frames"]) == 2 * len(fixture.numbers)
    assert float(stream["duration"]) == pytest.approx(float(2 * len(fixture.numbers) / fixture.fps), abs=1e-5)
    assert stream["codec_tag_string"] == {"hevc": "hvc1", "av1": "av01", "prores": "ap4h"}.get(fixture.codec, "avc1")


HEARD = {
    "edit_list_delay.mp4": ([0.3, 0.9, 1.25, 1.8, 2.4, 2.75], [0.3, 0.9, None, 0.3, 0.9, None]),
    "late_sound.mp4": ([0.15, 0.4, 0.95, 1.15, 1.4, 1.9], [None, 0.4, 0.95, None, 0.4, 0.9]),
}
"""Moments of a file joined to itself, and those of the clip that are heard there."""


@pytest.mark.parametrize("name", [name for name in COPIED if FIXTURES[name].sound])
def test_sound_stays_with_its_pictures(video_files, joined, name):
    fixture = FIXTURES[name]
    moments, expected = HEARD.get(name, ([0.2, 0.5, 0.95, 1.05, 1.5, 1.9], [0.2, 0.5, 0.95, 0.05, 0.5, 0.9]))
    edited = joined(video_files(name), video_files(name))
    found = sound_at(edited.path, moments)
    for heard, wanted in zip(found, expected):
        assert heard == wanted if wanted is None else heard == pytest.approx(wanted, abs=0.01)
    with open_video(edited.path) as reader:
        assert reader.info.audio.channels == fixture.sound.channels
        assert reader.info.audio.sample_rate == fixture.sound.rate


@pytest.fixture(scope="module")
def segments(tmp_path_factory):
    """Four segments of 12 frames that count on, each with its part of one rising tone, as a Wan assembly has them."""
    folder = tmp_path_factory.mktemp("segments")
    paths = []
    for index in range(4):
        sound = Sound(seconds=Fraction(3, 4), start=Fraction(0), rate=44100)
        clip = Clip(first=12 * index, frames=12, fps=Fraction(16), options=X264, sound=sound)
        paths.append(folder / f"segment {index}.mp4")
        write(clip, paths[-1])
    return paths


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_four_segments_count_on(segments, joined, mode):
    edited = joined(*segments, mode=mode)
    found = contents(edited.path)
    assert [number for number, _ in found] == list(range(48))
    assert [time for _, time in found] == [Fraction(index, 16) for index in range(48)]
    moments = [0.1, 0.4, 0.7, 0.8, 1.45, 1.55, 2.2, 2.3, 2.9]
    expected = [moment % 0.75 for moment in moments]
    assert sound_at(edited.path, moments) == pytest.approx(expected, abs=0.01)
    with open_video(edited.path) as reader:
        assert abs(reader.audio()["waveform"].shape[-1] - 3 * 44100) <= 1024
        assert reader.info.duration == 3


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_seam_of_sound_has_no_gap(segments, joined, mode):
    """The tone's power does not sink where segments meet, as the priming of an encoder would make it."""
    edited = joined(*segments, mode=mode)
    with open_video(edited.path) as reader:
        samples = reader.audio()["waveform"][0, 0].double()
    for seam in (0.75, 1.5, 2.25):
        around = samples[int((seam - 0.02) * 44100) : int((seam + 0.02) * 44100)]
        power = around.unfold(0, 220, 110).square().mean(1).sqrt()
        assert power.min() > 0.8 * 0.4 / 2**0.5


LONG = """
import resource, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from _pack import load_pack
load_pack()
from apple_silicon_video.video.remux import read_source, splice, whole
from apple_silicon_video.video.reader import open_video

def join(path, out):
    splice([whole(read_source(path))] * 2, [out])
    with open_video(out) as reader:
        return reader.info.frames

short, long, out = map(Path, sys.argv[2:])
join(short, out / "short.mp4")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frames = join(long, out / "long.mp4")
print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_length(video_files, tmp_path):
    """40,000 joined frames against 48: under 100 MB more (getrusage counts KiB on Linux, bytes on a Mac)."""
    paths = [SCRIPTS, video_files("h264.mp4"), video_files("20000_frames.mp4"), tmp_path]
    result = subprocess.run([sys.executable, "-c", LONG, *paths], capture_output=True, text=True, check=True)
    frames, growth = map(int, result.stdout.split())
    assert frames == 40_000 and growth * (1 if sys.platform == "darwin" else 1024) < 100_000_000


@pytest.mark.parametrize(
    "names, reason",
    [
        (("h264.mp4", "mpeg4.avi"), r"mpeg4\.avi is AVI .*"),
        (("h264.mp4", "h264.mkv"), r"h264\.mp4 and h264\.mkv are different kinds of files"),
        (("h264.mp4", "hevc.mp4"), r"codec of h264\.mp4 and hevc\.mp4 differ \(h264 and hevc\)"),
        (("h264.mp4", "half_a_turn.mp4"), r"size of h264\.mp4 and half_a_turn\.mp4 differ \(64x64 and 64x96\)"),
        (
            ("half_a_turn.mp4", "mirrored.mp4"),
            r"rotation of half_a_turn\.mp4 and mirrored\.mp4 differ",
        ),
        (("h264.mp4", "bt601.mp4"), r"colour tags of h264\.mp4 and bt601\.mp4 differ .*"),
        (("h264.mp4", "h264_10bit.mp4"), r"pixel format of .* differ \(yuv420p and yuv420p10le\)"),
        (("edit_list_negative.mp4", "h264.mp4"), r"the edit list of edit_list_negative\.mp4 hides frames .*"),
        (("corrupt.mp4", "gif.gif"), r"gif\.gif is CompuServe .*"),
    ],
)
def test_what_cannot_be_copied_says_why(video_files, joined, names, reason):
    paths = [video_files(name) for name in names]
    with pytest.raises(
        VideoError, match=rf'^The videos cannot be joined by copying, because {reason}; choose "auto"\.$'
    ):
        joined(*paths, mode="copy")
    assert list(paths[0].parent.glob("*o_0*")) == []


def test_different_videos_are_encoded_at_the_first_ones_rate_and_size(video_files, joined):
    names = ("h264.mp4", "gif.gif", "odd.webm", "mono.mp4")
    edited = joined(*map(video_files, names))
    assert edited.report.startswith("Encoded anew, because gif.gif is ")
    numbers = [number for number, _ in contents(edited.path)]
    assert numbers[:24] == list(range(24)) and numbers[-48:] == list(range(24)) * 2
    assert numbers[24:47] == sorted(numbers[24:47]) and len(numbers) == 24 + 24 + 24 + 24
    with open_video(edited.path) as reader:
        assert (reader.info.width, reader.info.height, reader.info.fps) == (64, 64, 24)
    begin = len(numbers) / 24 - 1
    heard = sound_at(edited.path, [0.5, 1.5, begin - 0.5, begin + 0.5])
    assert heard == [pytest.approx(0.5, abs=0.01), None, None, pytest.approx(0.5, abs=0.01)]


def test_variable_rate_keeps_all_its_frames_when_encoded(video_files, joined):
    edited = joined(video_files("variable_rate.mp4"), mode="encode")
    fixture = FIXTURES["variable_rate.mp4"]
    found = contents(edited.path)
    shown = dict(reversed(found))
    assert shown == dict(zip(fixture.numbers, fixture.times))


def test_surround_and_mono_are_mixed_to_the_first_ones_channels(video_files, joined):
    edited = joined(video_files("surround.mp4"), video_files("h264.mp4"), mode="encode")
    with open_video(edited.path) as reader:
        assert (reader.info.audio.channels, reader.info.audio.sample_rate) == (6, 44100)
        assert reader.audio()["waveform"][0, 0, -20000:].abs().max() > 0.1


@pytest.mark.parametrize(
    "name, first, last",
    [("prores.mov", 5, 9), ("h264.mp4", 0, 24), ("one_frame.mp4", 0, 1), ("alpha.mov", 23, 24), ("odd.webm", 0, 24)],
)
def test_clean_ranges_are_copied(video_files, trimmed, name, first, last):
    edited = trimmed(video_files(name), start_frame=first, end_frame=last)
    assert edited.reason == "" and edited.path.suffix == video_files(name).suffix
    assert [number for number, _ in contents(edited.path)] == list(range(first, last))
    assert all(packet in packets_of(video_files(name)) for packet in packets_of(edited.path))


@pytest.mark.parametrize("first, last", [(12, 24), (12, 36), (24, 48), (0, 12)])
def test_groups_of_pictures_are_copied(tmp_path, trimmed, first, last):
    clip = Clip(frames=48, options=X264, sound=Sound(seconds=Fraction(2)))
    write(clip, tmp_path / "four groups.mp4")
    edited = trimmed(tmp_path / "four groups.mp4", start_frame=first, end_frame=last)
    assert edited.reason == ""
    found = contents(edited.path)
    assert found == [(number, Fraction(number - first, 24)) for number in range(first, last)]
    moments = np.array([0.1, 0.4])
    assert sound_at(edited.path, moments) == pytest.approx(list(moments + first / 24), abs=0.01)


@pytest.mark.parametrize("name", ["h264.mp4", "b_frames.mp4", "open_gop.mp4", "hevc.mp4", "mpeg4.avi", "gif.gif"])
def test_other_ranges_are_encoded_exactly(video_files, trimmed, name):
    edited = trimmed(video_files(name), start_frame=5, end_frame=-3)
    assert edited.report.startswith("Encoded anew, because ")
    assert [number for number, _ in contents(edited.path)] == list(range(5, 21))


@pytest.mark.parametrize("name", ["h264.mp4", "edit_list_negative.mp4", "late_sound.mp4", "prores.mov", "vp9.webm"])
@pytest.mark.parametrize("mode", ["exact", "encode"])
def test_sound_of_a_range(video_files, trimmed, name, mode):
    """What is heard 0.1 seconds after the cut is what was heard 0.1 seconds after it before."""
    edited = trimmed(video_files(name), mode, start_time=0.25, end_time=0.5)
    fixture = FIXTURES[name]
    start = min(time for time in fixture.times if time >= Fraction(1, 4))
    assert contents(edited.path)[0][0] == fixture.numbers[fixture.times.index(start)]
    assert sound_at(edited.path, [0.1]) == pytest.approx([float(start) + 0.1], abs=0.012)


@pytest.mark.parametrize(
    "name, first, last, expected",
    [
        ("b_frames.mp4", 5, 9, None),
        ("open_gop.mp4", 10, 24, range(24)),
        ("prores.mov", 5, 9, range(5, 9)),
        ("hevc.mp4", 20, 24, range(24)),
    ],
)
def test_fast_takes_the_nearest_clean_places(video_files, trimmed, name, first, last, expected):
    edited = trimmed(video_files(name), "fast", start_frame=first, end_frame=last)
    numbers = [number for number, _ in contents(edited.path)]
    assert edited.reason == "" and numbers == list(range(numbers[0], numbers[-1] + 1))
    assert numbers[0] <= first and numbers[-1] >= last - 1
    assert expected is None or numbers == list(expected)


def test_fast_refuses_what_cannot_be_copied(video_files, trimmed):
    with pytest.raises(VideoError, match=r'^gif\.gif cannot be copied, because gif\.gif is .*; choose "exact"\.$'):
        trimmed(video_files("gif.gif"), "fast", start_frame=2)


def test_tags_stay_and_can_be_replaced(tmp_path, trimmed, joined, video_files):
    source = tmp_path / "tagged.mp4"
    with (
        av.open(str(video_files("h264.mp4"))) as a,
        av.open(str(source), "w", options={"movflags": "use_metadata_tags"}) as b,
    ):
        b.metadata["prompt"] = '{"1": {}}'
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.size:
                packet.stream = stream
                b.mux(packet)
    for edited in (trimmed(source), joined(source, mode="encode"), trimmed(source, "encode")):
        with open_video(edited.path) as reader:
            assert reader.info.metadata["prompt"] == '{"1": {}}'
    with open_video(joined(source, metadata={"prompt": "new"}).path) as reader:
        assert reader.info.metadata["prompt"] == "new"


def test_interrupt_leaves_nothing(video_files, joined, tmp_path):
    def stop(part):
        raise InterruptedError

    for mode in ("copy", "encode"):
        with pytest.raises(InterruptedError):
            joined(video_files("h264.mp4"), mode=mode, on_progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_progress_rises_to_1(video_files, joined, mode):
    seen = []
    joined(video_files("h264.mp4"), video_files("h264.mp4"), mode=mode, on_progress=seen.append)
    assert all(earlier <= later for earlier, later in pairwise(seen)) and seen[-1] > 0.9 and max(seen) <= 1


@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if fixture.error])
def test_bad_files_are_one_sentence(video_files, joined, trimmed, name):
    for attempt in (lambda p: joined(video_files("h264.mp4"), p), trimmed):
        with pytest.raises(VideoError, match=r"^[^\n]*\.$") as error:
            attempt(video_files(name))
        assert name in str(error.value)


def test_wrong_settings_are_one_sentence(video_files, joined, trimmed):
    path = video_files("h264.mp4")
    with pytest.raises(VideoError, match=r"^The mode 'fast' is none of auto, copy, encode; .*\.$"):
        joined(path, mode="fast")
    with pytest.raises(VideoError, match=r"^There are no videos to join; .*\.$"):
        joined()
    with pytest.raises(VideoError, match=r"^Only one range of h264\.mp4 can be cut out; .*\.$"):
        trimmed(path, stride=2)
    with pytest.raises(VideoError, match=r"no frame in the chosen range"):
        trimmed(path, start_time=7)
