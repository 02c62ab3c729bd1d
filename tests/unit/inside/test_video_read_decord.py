"""eva-decord as a second reader, and the module that stands in for it where it has no wheel.

Runs in a process of its own (../test_video_read_decord.py): on Linux eva-decord loads its libraries for everybody, and
after that PyAV's libvpx encoder fails, so that files are made first and no other test comes after.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from apple_silicon_video.tests.video_fixtures import FIXTURES, make, read_number
from apple_silicon_video.video import decord_module, decord_readers
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.reader import FrameSelection, FrameSize, open_video

AGREED = [
    "h264.mp4", "h264.mkv", "vp9.webm", "mpeg4.mp4", "mpeg4.avi", "variable_rate.mp4", "variable_rate.mkv",
    "ntsc.mp4", "b_frames.mp4", "bt601.mp4", "surround.mov", "one_frame.mp4", "odd_444.mp4",
    "größe 视频 ви́део 🎬.mp4", "mp4_named.gif",
]  # fmt: skip
REFUSED = {
    "hevc.mp4": "wrong frames in open groups",
    "open_gop.mp4": "wrong frames in open groups",
    "prores.mov": "no more than 8 bits",
    "pq.mp4": "no more than 8 bits",
    "alpha.webm": "no alpha",
    "gif.gif": "no alpha",
    "clockwise.mp4": "does not turn pictures",
    "full_range.mp4": "takes every picture for limited range",
    "edit_list_negative.mp4": "has other frames for eva-decord",
    "edit_list_delay.mp4": "has other frames for eva-decord",
    "open_gop_cut.mkv": "wrong frames in open groups",
}
LEAST_PSNR = 34.0  # of saturated edges, where eva-decord repeats chroma
WITHOUT_DECORD = """
import importlib.machinery, sys
sys.path.append(sys.argv[1])
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] == "decord" else find(name, *rest))
from _pack import load_pack
load_pack()
from apple_silicon_video.video import decord_module
assert decord_module.register() and decord_module.register()
assert "decord" not in sys.modules and "av" not in sys.modules, "registering imports nothing"
import decord
from decord import VideoReader, AudioReader, cpu, gpu
import decord.bridge
from decord.bridge import set_bridge
set_bridge("torch")
frame = VideoReader(sys.argv[2], ctx=cpu(0), num_threads=1)[3]
assert type(frame).__name__ == "Tensor" and decord.__version__ and decord.REPLACEMENT
decord.bridge.set_bridge("native")
decord.logging.set_level(decord.logging.ERROR)
print(VideoReader(sys.argv[2]).get_batch([0, 5]).asnumpy().shape)
from apple_silicon_video.video.reader import open_video
try:
    open_video(sys.argv[2], backend="decord")
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="session")
def video_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in (*AGREED, *REFUSED, "text.mp4"):
        make(name, folder)
    return lambda name: folder / name


@pytest.fixture(scope="session")
def decord(video_files):
    """eva-decord, imported after every file has been made."""
    return importlib.import_module("decord")


@pytest.mark.parametrize("name", AGREED)
def test_both_backends_agree_frame_by_frame(decord, video_files, name):
    with open_video(video_files(name)) as ours, open_video(video_files(name), backend="decord") as theirs:
        assert (ours.backend, theirs.backend) == ("pyav", "decord")
        assert theirs.timestamps() == ours.timestamps() and theirs.info == ours.info
        ours_frames, their_frames = ours.read(FrameSelection()), theirs.read(FrameSelection())
        some = [0, theirs.info.frames - 1, theirs.info.frames // 2]
        assert torch.equal(theirs.read(some), their_frames[some])
    assert [read_number(frame) for frame in their_frames] == list(FIXTURES[name].numbers)
    error = (ours_frames - their_frames).square().mean((1, 2, 3))
    assert float(-10 * (error.max() + 1e-12).log10()) > (100 if name == "odd_444.mp4" else LEAST_PSNR)


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_it_would_read_wrongly_are_refused(decord, video_files, name):
    with pytest.raises(VideoError, match=REFUSED[name]) as refused:
        open_video(video_files(name), backend="decord")
    assert str(refused.value).endswith("choose pyav or auto.")


def test_auto_is_pyav(video_files):
    with open_video(video_files("h264.mp4")) as video:
        assert video.backend == "pyav"


def both(decord, path, **options):
    return decord.VideoReader(str(path), **options), decord_readers.VideoReader(str(path), **options)


def same_numbers(real, replaced):
    real, replaced = (array.asnumpy() for array in (real, replaced))
    assert real.shape == replaced.shape and real.dtype == replaced.dtype == np.uint8
    frames = [array if array.ndim == 4 else array[None] for array in (real, replaced)]
    assert [read_number(frame) for frame in frames[0]] == [read_number(frame) for frame in frames[1]]
    assert np.mean((frames[0].astype(float) - frames[1]) ** 2) < 255**2 / 10 ** (LEAST_PSNR / 10)


@pytest.mark.parametrize("name", ["h264.mp4", "b_frames.mp4", "variable_rate.mp4", "vp9.webm"])
def test_replacement_answers_as_decord_does(decord, video_files, name):
    real, replaced = both(decord, video_files(name))
    assert len(real) == len(replaced)
    assert replaced.get_avg_fps() == pytest.approx(real.get_avg_fps(), rel=0.03)
    assert replaced.get_key_indices() == real.get_key_indices()
    every = list(range(len(real)))
    assert np.allclose(replaced.get_frame_timestamp(every)[:, 0], real.get_frame_timestamp(every)[:, 0], atol=2e-3)
    assert replaced.get_frame_timestamp(3).shape == real.get_frame_timestamp(3).shape == (2,)
    same_numbers(real[5], replaced[5])
    same_numbers(real[-1], replaced[-1])
    same_numbers(real[2:9:3], replaced[2:9:3])
    same_numbers(real.get_batch([7, 3, 3, -2]), replaced.get_batch([7, 3, 3, -2]))
    for reader in (real, replaced):
        reader.seek_accurate(9)
    same_numbers(real.next(), replaced.next())
    same_numbers(real.next(), replaced.next())
    replaced.seek(17)  # decord's own may land anywhere near
    assert read_number(replaced.next()) == max(key for key in real.get_key_indices() if key <= 17)
    for reader in (real, replaced):
        with pytest.raises(IndexError):
            reader[len(reader)]
        with pytest.raises(IndexError):
            reader.get_batch([0, len(reader)])


def test_replacement_in_another_size_and_from_memory(decord, video_files):
    real, replaced = both(decord, video_files("h264.mp4"), width=96, height=32)
    same_numbers(real.get_batch([1, 20]), replaced.get_batch([1, 20]))
    with video_files("h264.mp4").open("rb") as file:
        assert len(decord_readers.VideoReader(file, ctx=decord_readers.cpu(0))) == 24
    with pytest.raises(decord_readers.DECORDError, match=r"text.mp4 cannot be read"):
        decord_readers.VideoReader(str(video_files("text.mp4")))


def test_iteration_and_bridge(video_files):
    replaced = decord_readers.VideoReader(str(video_files("one_frame.mp4")))
    assert len(list(replaced)) == 1
    with decord_readers.use_torch():
        assert isinstance(replaced[0], torch.Tensor)
    assert isinstance(replaced[0], np.ndarray)
    with pytest.raises(StopIteration):
        replaced.next()
    with pytest.raises(AssertionError, match="valid bridges"):
        decord_readers.set_bridge("mxnet")


@pytest.mark.parametrize("mono", [True, False])
def test_replacement_sound(decord, video_files, mono):
    path = str(video_files("prores.mov"))
    real, replaced = (module.AudioReader(path, sample_rate=48000, mono=mono) for module in (decord, decord_readers))
    assert replaced.shape == real.shape and len(replaced) == len(real)
    assert replaced.duration() == pytest.approx(real.duration(), abs=0.01)
    first = [reader[100:200].asnumpy()[0] for reader in (replaced, real)]  # decord's second channel is wrong
    assert np.allclose(*first, atol=2e-2)
    assert replaced[7].asnumpy().shape == real[7].asnumpy().shape


def test_a_real_decord_is_left_alone(decord):
    before = list(sys.meta_path)
    assert not decord_module.register() and sys.meta_path == before
    assert not hasattr(decord, "REPLACEMENT")


def test_without_decord_the_replacement_is_imported(video_files):
    scripts = str(Path(__file__).resolve().parents[3] / "scripts")
    command = [sys.executable, "-c", WITHOUT_DECORD, scripts, str(video_files("h264.mp4"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "(2, 64, 64, 3)",
        "eva-decord is not installed; choose the backend pyav or auto.",
    ]


def test_scaled(decord, video_files):
    with open_video(video_files("h264.mp4"), backend="decord") as video:
        assert [read_number(f) for f in video.read([4, 19], size=FrameSize(48, 80))] == [4, 19]
