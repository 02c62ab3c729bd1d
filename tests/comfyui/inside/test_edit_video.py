"""The nodes that join and cut videos, with every kind of VIDEO that core has, inside a real ComfyUI."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import folder_paths
import pytest
import torch
from apple_silicon_video.nodes.edit_video import ConcatenateVideos, ExtendVideo, LastFrames, TrimVideo
from apple_silicon_video.tests.video_fixtures import read_number
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.numbered_picture import picture
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.reader import FrameSelection, open_video
from comfy_api.latest import InputImpl, Types

ENCODING = {"format": "h264-mp4", "quality": "high"}
RANGE = {"unit": "frames", "mode": "exact", **ENCODING}


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path):
    before = folder_paths.get_temp_directory()
    folder_paths.set_temp_directory(str(tmp_path / "temp"))
    yield tmp_path / "temp"
    folder_paths.set_temp_directory(before)


def numbered(first, count):
    return torch.stack([torch.from_numpy(picture(number, 64, 64)) for number in range(first, first + count)])


def numbers_of(video):
    with open_video(video.get_stream_source()) as reader:
        return [read_number(frame) for frame in reader.frames(FrameSelection())]


def videos(path):
    """The numbers 6..17 of a file of 0..23 as every kind of VIDEO, by kind."""
    whole = InputImpl.VideoFromFile(str(path))
    yield "cut file", whole.as_trimmed(0.25, 0.5)
    yield "cut memory", InputImpl.VideoFromFile(BytesIO(path.read_bytes())).as_trimmed(0.25, 0.5)
    yield "frames", InputImpl.VideoFromComponents(Types.VideoComponents(numbered(6, 12), Fraction(24)))


def test_extend_joins_segments_and_their_sound():
    segments = {f"clip{index}": numbered(8 * index, 9) for index in range(4)}
    rate = 16000
    sounds = {f"audio{index}": {"waveform": torch.full((1, 1, rate), 0.5), "sample_rate": rate} for index in (0, 2)}
    images, audio, count = ExtendVideo.execute(segments, 1, "smooth", False, 16.0, sounds).args
    assert [read_number(frame) for frame in images] == list(range(33)) and count == 33
    waveform = audio["waveform"]
    assert waveform.shape[-1] == 33 * rate // 16
    heard = [bool(waveform[..., int((frame + 0.5) * rate / 16)].abs() > 0.1) for frame in range(33)]
    assert heard[:8] == [True] * 8 and heard[9:16] == [False] * 7
    assert heard[17:24] == [True] * 7 and heard[25:] == [False] * 8


def test_extend_without_sound_has_none():
    images, audio, count = ExtendVideo.execute(
        {"clip0": numbered(0, 3), "clip1": numbered(2, 3)}, 1, "cut", True, 8
    ).args
    assert audio is None and count == len(images) == 5


def test_last_frames_start_the_next_segment():
    last, before = LastFrames.execute(numbered(0, 9), 2).args
    assert [read_number(frame) for frame in last] == [7, 8] and len(before) == 7


@pytest.mark.parametrize("kind", ["cut file", "cut memory", "frames"])
def test_every_kind_of_video_is_joined(video_files, kind):
    path = video_files("h264.mp4")
    video = dict(videos(path))[kind]
    inputs = {"video0": InputImpl.VideoFromFile(str(path)), "video1": video}
    joined, report = ConcatenateVideos.execute(inputs, "auto", **ENCODING).args
    assert numbers_of(joined) == [*range(24), *range(6, 18)]
    assert report.endswith(".")


@pytest.mark.parametrize("kind", ["cut file", "cut memory", "frames"])
def test_every_kind_of_video_is_trimmed(video_files, temporary_folder, kind):
    video = dict(videos(video_files("h264.mp4")))[kind]
    part, _ = TrimVideo.execute(**RANGE, start=2, end=-2, video=video).args
    assert numbers_of(part) == list(range(8, 16))
    assert Path(part.get_stream_source()).parent == temporary_folder


def test_copies_say_so_and_are_previewed(video_files):
    path = str(video_files("h264.mp4"))
    output = ConcatenateVideos.execute({"video0": InputImpl.VideoFromFile(path)}, "copy", **ENCODING)
    shown = output.ui.as_dict()["images"][0]
    assert output.args[1] == "Copied without encoding the pictures."
    assert Path(output.args[0].get_stream_source()).name == shown["filename"] and shown["type"] == "temp"


def test_core_reads_the_results(video_files):
    """Core's own decoder sees the frames of a copied and of an encoded part."""
    path = str(video_files("h264.mp4"))
    for mode, start in (("exact", 0), ("encode", 6)):
        part, _ = TrimVideo.execute(**RANGE | {"mode": mode}, start=start, end=0, path=path).args
        components = part.get_components()
        assert [read_number(frame) for frame in components.images] == list(range(start, 24))
        assert components.frame_rate == 24


def test_seconds_and_paths(video_files):
    seconds = {"unit": "seconds", "mode": "encode", **ENCODING}
    part, _ = TrimVideo.execute(**seconds, start=-0.5, end=0, path=f"  {video_files('h264.mp4')} ").args
    assert numbers_of(part) == list(range(12, 24))


def test_a_name_in_the_output_folder(video_files, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "saved.mp4").write_bytes(video_files("h264.mp4").read_bytes())
    part, _ = TrimVideo.execute(**RANGE, start=20, end=0, path="saved.mp4").args
    assert numbers_of(part) == [20, 21, 22, 23]
    before = TrimVideo.fingerprint_inputs(**RANGE, path="saved.mp4")
    (tmp_path / "saved.mp4").write_bytes(b"another")
    assert TrimVideo.fingerprint_inputs(**RANGE, path="saved.mp4") != before
    assert TrimVideo.validate_inputs(path="gone.mp4").startswith("gone.mp4 does not exist; ")


def test_nothing_to_cut_is_one_sentence(video_files):
    with pytest.raises(VideoError, match=r"^Trim Video \(MPS\) has no video; connect one or enter a path\.$"):
        TrimVideo.execute(**RANGE, start=0, end=0)
    with pytest.raises(VideoError, match=r"missing\.mp4.*\.$"):
        TrimVideo.execute(**RANGE, start=0, end=0, path=str(video_files("h264.mp4").parent / "missing.mp4"))


def test_interrupt_ends_the_work(video_files, temporary_folder):
    import comfy.model_management as management

    path = str(video_files("h264.mp4"))
    clips = {"clip0": numbered(0, 3), "clip1": numbered(0, 3)}
    for node in (
        lambda: TrimVideo.execute(**RANGE, start=1, end=0, path=path),
        lambda: ExtendVideo.execute(clips, 0, "cut", False, 8),
    ):
        management.interrupt_current_processing(True)
        with pytest.raises(management.InterruptProcessingException):
            node()
    management.interrupt_current_processing(False)
    assert list(temporary_folder.iterdir()) == []


def test_formats_are_those_that_make_one_file():
    for node in (ConcatenateVideos, TrimVideo):
        options = next(item for item in node.define_schema().inputs if item.id == "format").options
        assert "h264-mp4" in options and not any("png" in option or "gif" in option for option in options)
