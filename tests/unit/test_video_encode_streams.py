"""Frames on their way to a file: pushed, in playing order, masked, copied from a file; and image folders when something
goes wrong."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from apple_silicon_video.tests.unit.test_video_encode_formats import FORMATS, SUFFIX, pictures, probe
from apple_silicon_video.tests.unit.video_clips import clip, decode, leftovers, number_in, save, tone
from apple_silicon_video.video import output_file
from apple_silicon_video.video.encoding import VideoWriter, encode_video, save_picture
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.frame_stream import ImageFrames, TappedFrames, VideoFrames, playing_order
from apple_silicon_video.video.output_file import OutputFolder, numbered_names
from apple_silicon_video.video.preview_copy import PreviewCopy, small_picture
from apple_silicon_video.video.reader import FrameSelection, open_video
from apple_silicon_video.video.stream_copy import copy_streams, fits
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def numbers(path: Path, name: str = "h264-mp4") -> list[int]:
    return [number_in(picture[..., :3]) for picture in pictures(path, name)]


# ---- pushed frames


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_that_are_pushed_make_the_same_file(tmp_path, name):
    """As another stage feeds them: of any length, one by one, or as a generator."""
    images, path = clip(11), tmp_path / f"pushed{SUFFIX[name]}"
    with VideoWriter(path, fps=24, video_format=FORMATS[name]) as writer:
        for chunk in (images[:4], images[4], images[5:5], iter(images[5:9]), images[9:]):
            writer.write(chunk)
        video = writer.finish()
    assert (video.path, video.frames) == (path, 11)
    assert numbers(path, name) == list(range(11))
    assert leftovers(tmp_path) == [path.name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_writer_that_is_not_finished_leaves_nothing(tmp_path, name):
    with VideoWriter(tmp_path / f"a{SUFFIX[name]}", fps=24, video_format=FORMATS[name]) as writer:
        writer.write(clip(3))
    with (
        pytest.raises(VideoError, match="no frames to save"),
        VideoWriter(tmp_path / f"b{SUFFIX[name]}", fps=24, video_format=FORMATS[name]) as writer,
    ):
        writer.finish()
    assert leftovers(tmp_path) == []


# ---- order and masks


@pytest.mark.parametrize(
    ("count", "repeats", "ping_pong", "expected"),
    [
        (4, 0, False, [0, 1, 2, 3]),
        (4, 0, True, [0, 1, 2, 3, 2, 1]),
        (3, 1, True, [0, 1, 2, 1, 0, 1, 2, 1]),
        (3, 2, False, [0, 1, 2] * 3),
        (2, 0, True, [0, 1]),
        (1, 1, True, [0, 0]),
    ],
)
def test_playing_order(tmp_path, count, repeats, ping_pong, expected):
    order = playing_order(count, repeats, ping_pong)
    frames = ImageFrames(clip(count), order=order)
    assert len(frames) == len(expected)
    assert [number_in(frame.numpy()) for frame in frames] == expected
    assert numbers(save(tmp_path / "a.mp4", frames).path) == expected


def test_frames_of_an_image_are_views():
    images = clip(3)
    assert [frame.data_ptr() for frame in ImageFrames(images)] == [image.data_ptr() for image in images]


@pytest.mark.parametrize("shape", [(96, 160), (1, 48, 80), (6, 96, 160)])
def test_white_parts_of_a_mask_become_transparent(tmp_path, shape):
    mask = torch.zeros(shape)
    mask[..., shape[-1] // 2 :] = 1
    frames = ImageFrames(clip(6), mask)
    video = save(tmp_path / "png", frames, video_format=FORMATS["png-8bit"])
    for picture in pictures(video.path, "png-8bit"):
        assert (picture[:, :76, 3] == 1).all() and (picture[:, 84:, 3] == 0).all()


def test_each_frame_has_its_own_mask_in_any_order(source):
    masks = torch.arange(5.0)[:, None, None].expand(-1, 64, 64) / 8
    order = [range(5), range(3, 0, -1)]
    expected = [1 - index / 8 for part in order for index in part]
    assert [frame[0, 0, 3].item() for frame in ImageFrames(clip(5), masks, order)] == expected
    with open_video(source) as reader:
        frames = VideoFrames(reader, reader.indices(FrameSelection(start_frame=2, end_frame=7)), masks, order)
        assert [frame[0, 0, 3].item() for frame in frames] == expected


def test_masks_are_scaled_smoothly():
    (frame,) = ImageFrames(torch.zeros(1, 4, 8, 3), torch.tensor([[[0.0, 1.0]]]))
    assert frame[0, :, 3].tolist() == [1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0]


def test_the_alpha_of_a_video_stays(tmp_path):
    images = torch.cat((clip(2), torch.full((2, 96, 160, 1), 0.25)), -1)
    path = save(tmp_path / "a.mov", images, video_format=FORMATS["prores4444-mov"]).path
    with open_video(path) as reader:
        assert all((frame[:, :, 3] - 0.25).abs().max() < 0.01 for frame in VideoFrames(reader, [0, 1]))


def test_a_wrong_number_of_masks_is_refused(source):
    with pytest.raises(VideoError, match=r"2 masks for 6 frames; connect one mask, or one for each\."):
        ImageFrames(clip(6), torch.zeros(2, 96, 160))
    with open_video(source) as reader, pytest.raises(VideoError, match="2 masks for 3 frames"):
        VideoFrames(reader, [0, 1, 2], torch.zeros(2, 96, 160))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """30 frames of H.264 with sound and two key frames."""
    path = tmp_path_factory.mktemp("source") / "source.mp4"
    options = {"encoder_options": {"g": "17"}, "audio": tone(2, 48000), "metadata": {"old": "1"}}
    return save(path, clip(30), fps=23.976, **options).path


def test_frames_of_a_video_forward_and_backward(tmp_path, source, monkeypatch):
    """Backwards no more than a few frames are asked for at a time, since all that are asked for are held."""
    with open_video(source) as reader:
        asked, read = [], reader.frames
        monkeypatch.setattr(reader, "frames", lambda wanted, **options: asked.append(len(wanted)) or
                            read(wanted, **options))  # fmt: skip
        indices = reader.indices(FrameSelection(start_frame=2, end_frame=21))
        frames = VideoFrames(reader, indices, order=playing_order(len(indices), 1, ping_pong=True))
        expected = [*range(2, 21), *range(19, 2, -1)] * 2
        assert len(frames) == len(expected)
        for _ in range(2):
            assert [number_in(frame.numpy()) for frame in frames] == expected
        assert asked == [19, 8, 8, 1] * 4
        assert numbers(save(tmp_path / "a.mp4", frames).path) == expected


def test_tapped_frames_can_be_read_again():
    seen: list[str] = []
    frames = TappedFrames(
        clip(2), lambda: seen.append("begin"), lambda frame: seen.append(str(number_in(frame.numpy())))
    )
    assert [len(list(frames)) for _ in range(2)] == [2, 2]
    assert seen == ["begin", "0", "1"] * 2


# ---- copying


@pytest.mark.parametrize("in_memory", [False, True])
def test_streams_are_copied_as_they_are(tmp_path, source, in_memory):
    given = BytesIO(source.read_bytes()) if in_memory else source
    assert fits(given, FORMATS["h264-mp4"])
    video = copy_streams(tmp_path / "copy.mp4", given, FORMATS["h264-mp4"], {"prompt": '{"1": 2}'})
    assert (video.encoder, video.frames, video.has_audio) == ("copy", 30, True)

    def packets(path):
        with av.open(str(path)) as container:
            return [
                (p.stream.type, p.pts * p.time_base, p.duration * p.time_base, hashlib.sha256(bytes(p)).hexdigest())
                for p in container.demux()
                if p.size
            ]

    assert sorted(packets(video.path)) == sorted(packets(source))
    ours, theirs = probe(video.path), probe(source)
    assert [stream["duration"] for stream in ours["streams"]] == [stream["duration"] for stream in theirs["streams"]]
    assert ours["format"]["tags"]["prompt"] == '{"1": 2}' and "old" not in ours["format"]["tags"]
    assert numbers(video.path) == list(range(30))


@pytest.mark.parametrize("name", ["hevc-mp4", "h264-10bit-mp4", "vp9-webm", "gif", "png-8bit"])
def test_other_streams_are_not_copied(source, name):
    assert not fits(source, FORMATS[name])


def test_no_video_is_not_copied(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    assert not fits(tmp_path / "a.mp4", FORMATS["h264-mp4"])
    assert not fits(tmp_path / "missing.mp4", FORMATS["h264-mp4"])


def test_an_interrupted_copy_leaves_nothing(tmp_path, source):
    def stop(done: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_streams(tmp_path / "copy.mp4", source, FORMATS["h264-mp4"], {}, stop)
    assert leftovers(tmp_path) == []


# ---- pictures beside the video


def test_first_frame_carries_the_workflow(tmp_path):
    (tmp_path / "a.png").write_bytes(b"theirs")
    names = [tmp_path / "a.png", tmp_path / "a2.png"]
    path = save_picture(names, clip(1)[0], {"prompt": '{"1": 2}', "workflow": "狐"})
    assert path == names[1] and names[0].read_bytes() == b"theirs"
    with Image.open(path) as image:
        assert image.text == {"prompt": '{"1": 2}', "workflow": "狐"}
        assert np.abs(np.asarray(image, np.float64) / 255 - clip(1)[0].double().numpy()).max() <= 0.5 / 255 + 1e-9


def test_preview_copy_is_small_and_starts_over(tmp_path):
    images = torch.nn.functional.interpolate(clip(5).permute(0, 3, 1, 2), scale_factor=8).permute(0, 2, 3, 1)
    with PreviewCopy(numbered_names(tmp_path, "p", 1, ".mp4"), 24, tone(1, 44100)) as copy:
        copy.begin()
        copy.add(images[3])
        copy.begin()
        for image in images:
            copy.add(image)
        path = copy.finish()
    stream = probe(path)["streams"][0]
    assert (stream["width"], stream["height"], stream["pix_fmt"]) == (512, 308, "yuv420p")
    assert numbers(path) == list(range(5))
    assert leftovers(tmp_path) == [path.name]


def test_a_failing_preview_is_one_log_line(tmp_path, caplog):
    with caplog.at_level("INFO"), PreviewCopy([tmp_path / "missing" / "p.mp4"], 24, None) as copy:
        copy.begin()
        copy.add(clip(1)[0])
        assert copy.finish() is None
    assert [record.getMessage()[:35] for record in caplog.records] == ["There is no preview of this video: "]


def test_transparent_parts_lie_over_grey():
    frame = torch.zeros(64, 96, 4)
    frame[:, :48, 3] = 1
    small = small_picture(frame, 48)
    assert small.shape == (32, 48, 3)
    assert (small[:, :24] == 0).all() and (small[:, 24:] == 0.5).all()


# ---- folders of pictures when something goes wrong


def test_folders_are_never_replaced(tmp_path):
    for taken in ("a_00001_", "a_00002_"):
        (tmp_path / taken).mkdir()
    video = encode_video(numbered_names(tmp_path, "a", 1, ""), clip(2), fps=24, video_format=FORMATS["png-8bit"])
    assert video.path.name == "a_00003_" and leftovers(tmp_path / "a_00001_") == []
    with pytest.raises(VideoError, match="folders are not replaced"):
        encode_video(tmp_path / "a_00003_", clip(2), fps=24, video_format=FORMATS["png-8bit"])
    assert leftovers(tmp_path) == ["a_00001_", "a_00002_", "a_00003_"]
    assert leftovers(video.path) == ["frame_000001.png", "frame_000002.png"]


def test_a_folder_name_taken_meanwhile_is_passed_over(tmp_path):
    with (
        OutputFolder(numbered_names(tmp_path, "a", 1, "")) as first,
        OutputFolder(numbered_names(tmp_path, "a", 1, "")) as second,
    ):
        for output in (first, second):
            (output.partial / "x").write_text(output.path.name)
        (tmp_path / "a_00001_").mkdir()
        assert (second.publish().name, first.publish().name) == ("a_00002_", "a_00003_")
    assert leftovers(tmp_path / "a_00001_") == []


def test_a_folder_name_taken_at_the_last_moment_is_passed_over(tmp_path, monkeypatch):
    rename = os.rename

    def beaten(source, target):
        if target.name == "a_00001_":
            (target / "theirs").mkdir(parents=True)
        rename(source, target)

    monkeypatch.setattr(os, "rename", beaten)
    video = encode_video(numbered_names(tmp_path, "a", 1, ""), clip(1), fps=24, video_format=FORMATS["png-8bit"])
    assert video.path.name == "a_00002_" and leftovers(tmp_path) == ["a_00001_", "a_00002_"]
    assert leftovers(tmp_path / "a_00001_") == ["theirs"]


def test_an_abandoned_folder_s_name_is_used_again(tmp_path):
    (tmp_path / ".a_00001_.partial").mkdir()
    (tmp_path / ".a_00001_.partial" / "frame_000009.png").touch()
    open_files = len(os.listdir("/dev/fd"))
    video = encode_video(numbered_names(tmp_path, "a", 1, ""), clip(1), fps=24, video_format=FORMATS["png-8bit"])
    assert video.path.name == "a_00001_" and leftovers(video.path) == ["frame_000001.png"]
    assert leftovers(tmp_path) == ["a_00001_"] and len(os.listdir("/dev/fd")) == open_files


def test_a_fragment_that_was_replaced_meanwhile_is_not_ours(tmp_path):
    path = tmp_path / ".a.mp4.partial"
    with path.open("wb") as ours:
        path.unlink()
        path.touch()
        assert output_file._lock(ours.fileno(), path) is False


@pytest.mark.parametrize("name", ["png-8bit", "h264-mp4"])
def test_what_is_published_is_synced_with_its_folder(tmp_path, monkeypatch, name):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.add(os.fstat(descriptor).st_ino), fsync(descriptor)))
    path = save(tmp_path / "a", clip(2), video_format=FORMATS[name]).path
    assert synced == {entry.stat().st_ino for entry in (tmp_path, path, *path.glob("*"))}


@pytest.mark.parametrize("name", ["png-8bit", "webp", "gif", "prores422-mov"])
def test_interrupts_and_vanishing_folders(tmp_path, name):
    class Interrupted(BaseException):
        pass

    def interrupt(done: int) -> None:
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        save(tmp_path / f"a{SUFFIX[name]}", clip(6), video_format=FORMATS[name], on_frame=interrupt)
    assert leftovers(tmp_path) == []
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(VideoError, match="has been removed"):
        save(
            folder / f"a{SUFFIX[name]}",
            clip(6),
            video_format=FORMATS[name],
            on_frame=lambda done: done == 3 and shutil.rmtree(folder),
        )
    assert leftovers(tmp_path) == []


HEAD = f"""
import sys; sys.path.insert(0, {str(SCRIPTS)!r})
from _pack import load_pack; load_pack()
import json, os, resource, torch
from pathlib import Path
from apple_silicon_video.video.encoding import encode_video
from apple_silicon_video.video.video_formats import load_formats
torch.set_num_threads(1)
FORMATS = load_formats()
folder = Path(sys.argv[1])
"""


def child(code: str, folder: Path, *names: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HEAD + code, folder, *names], stdout=subprocess.PIPE, text=True)


def test_full_disks_leave_nothing(tmp_path):
    """The system stops each file's growth; every format says so in one sentence and removes its fragment."""
    process = child(
        """
frames = torch.rand(4, 96, 160, 3, generator=torch.Generator().manual_seed(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
for name, video_format in FORMATS.items():
    try:
        encode_video(folder / f"a{video_format.suffix}", frames, fps=24, video_format=video_format)
        print(name, "was written")
    except ValueError as error:
        print(type(error).__name__, error)
""",
        tmp_path,
    )
    lines = process.communicate(timeout=120)[0].splitlines()
    assert len(lines) == len(FORMATS), lines
    assert all(line.startswith(f"VideoError Cannot save {tmp_path}/a") and "it grew larger" in line for line in lines)
    assert leftovers(tmp_path) == []


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    """One process saves over and over, an MP4 over itself and PNG folders beside each other, until it is killed."""
    save(tmp_path / "a.mp4", clip(4))
    for seed in range(4):
        process = child(
            """
from apple_silicon_video.tests.unit.video_clips import clip
from apple_silicon_video.video import output_file
from apple_silicon_video.video.output_file import numbered_names
frames = clip(4)
print("ready", flush=True)
while True:
    encode_video(folder / "a.mp4", frames, fps=24, video_format=FORMATS["h264-mp4"])
    names = numbered_names(folder, "b", 1, "")
    encode_video(names, frames, fps=24, video_format=FORMATS["png-8bit"])
""",
            tmp_path,
        )
        assert process.stdout.readline().strip() == "ready"
        time.sleep(random.Random(seed).uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        process.stdout.close()
        assert [number_in(picture) for picture in decode(tmp_path / "a.mp4")] == [0, 1, 2, 3]
        for path in tmp_path.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                assert leftovers(path) == [f"frame_00000{index}.png" for index in range(1, 5)]
    fragments = [name for name in leftovers(tmp_path) if name.endswith(".partial")]
    assert len(fragments) <= 2  # one for each name, however often it was killed
    save(tmp_path / "a.mp4", clip(4))
    encode_video(numbered_names(tmp_path, "b", 1, ""), clip(4), fps=24, video_format=FORMATS["png-8bit"])
    assert not [name for name in leftovers(tmp_path) if name.endswith(".partial")]


@pytest.mark.slow
def test_no_format_keeps_the_clip(tmp_path):
    """What 40 more frames (a quarter of a gigabyte as float32, held once as views of one) add to the peak is little.

    An encoder's own look-ahead is full after the first 50.
    """
    process = child(
        """
from apple_silicon_video.tests.unit.video_clips import clip
unit = 1 if sys.platform == "darwin" else 1024
def peak(video_format, count):
    images = clip(1, 540, 960).expand(count, -1, -1, -1)
    options = {} if video_format.writer != "container" else {"software_only": True}
    encode_video(folder / f"{count}{video_format.name}{video_format.suffix}", images, fps=24,
                 video_format=video_format, quality="small", **options)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
print(json.dumps({name: (peak(FORMATS[name], 50), peak(FORMATS[name], 90)) for name in sys.argv[2:]}))
""",
        tmp_path,
        "webp", "png-8bit", "gif", "vp9-webm", "hevc-10bit-mp4",
    )  # fmt: skip
    peaks = json.loads(process.communicate(timeout=600)[0])
    assert {name: many - few for name, (few, many) in peaks.items() if many - few > 40} == {}
    assert max(many for _, many in peaks.values()) < 1500
