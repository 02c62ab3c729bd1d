"""scripts/video.py as people run it: what it prints, the files it makes, exit status and messages."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from apple_silicon_video.tests.unit.commands import inside as inside
from apple_silicon_video.tests.unit.commands import run as run
from apple_silicon_video.tests.video_fixtures import read_number
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.numbered_picture import picture
from apple_silicon_video.video.reader import FrameSelection, open_video
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "video.py"


def draw(folder, numbers, name="{}.png"):
    folder.mkdir()
    for number in numbers:
        pixels = np.round(picture(number, 64, 64) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name.format(number))
    return folder


def numbers_in(path):
    with open_video(path) as reader:
        return [read_number(frame) for frame in reader.frames(FrameSelection())]


def test_info_tells_what_a_video_holds(video_files, run):
    result = run("info", video_files("größe 视频 ви́део 🎬.mp4"))
    assert (result.returncode, result.stderr) == (0, "")
    path, length, codec, colour, sound, *tags = result.stdout.splitlines()
    assert path.endswith("größe 视频 ви́део 🎬.mp4") and length == "64x64, 6 frames, 0.250 s, 24 fps"
    assert codec.startswith("h264 yuv420p 8 bit mov,mp4") and "matrix bt709" in colour and sound == "no sound"
    assert "major_brand: isom" in tags


def test_info_as_json(video_files, inside):
    _, out, _ = inside("info", video_files("clockwise.mp4"), "--json")
    report = json.loads(out)
    assert (report["width"], report["height"], report["rotation"], report["frames"]) == (64, 96, 90, 24)
    assert (report["fps"], report["duration"], report["audio"]) == ("24", "1", None)
    audio = json.loads(inside("info", video_files("surround.mp4"), "--json")[1])["audio"]
    assert (audio["channels"], audio["sample_rate"], audio["layout"]) == (6, 44100, "5.1")
    assert float(Fraction(audio["duration"])) == pytest.approx(1, abs=0.05)


def test_frames_and_back(video_files, tmp_path, inside):
    """Frames of a video as pictures, and a video of those pictures."""
    arguments = (video_files("h264.mp4"), "--start", 5, "--count", 3, "--out", tmp_path / "five on")
    status, out, err = inside("frames", *arguments)
    assert (status, err) == (0, "") and out.endswith("five on: 3 frames\n")
    pictures = sorted((tmp_path / "five on").iterdir())
    assert [read_number(np.asarray(Image.open(path))) for path in pictures] == [5, 6, 7]
    arguments = (tmp_path / "five on", tmp_path / "out.mp4", "--format", "h264-mp4", "--fps", "23.976")
    status, out, err = inside("encode", *arguments)
    assert (status, err) == (0, "") and "out.mp4: 64x64, 3 frames at 24000/1001 (23.976), " in out
    assert numbers_in(tmp_path / "out.mp4") == [5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five on", "out.mp4"]


def test_last_frames_of_a_deep_video_are_deep(video_files, tmp_path, inside):
    _, out, _ = inside("frames", video_files("hevc_10bit.mp4"), "--start", -2, "--out", tmp_path / "last")
    assert out.endswith("last: 2 frames\n")
    first = tmp_path / "last" / "frame_000001.png"
    assert read_number(np.asarray(Image.open(first))) == 22
    assert first.read_bytes()[24] == 16  # bits of a sample, in the PNG's header


def test_pictures_are_taken_by_number_and_the_ending_names_the_format(tmp_path, inside):
    draw(tmp_path / "in", [1, 2, 10, 11], "shot{}.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    status, _, err = inside("encode", tmp_path / "in", tmp_path / "out.gif", "--fps", "12")
    assert (status, err) == (0, "")
    assert numbers_in(tmp_path / "out.gif") == [1, 2, 10, 11]


@pytest.mark.parametrize(
    "name, message",
    [
        ("text.mp4", "text.mp4"),
        ("folder.mp4", "is a folder"),
        ("missing.mp4", "missing.mp4"),
        ("sound_only.m4a", "sound_only.m4a"),
    ],
)
def test_files_that_are_no_video(video_files, tmp_path, inside, name, message):
    for command in (("info",), ("frames", "--out", tmp_path / "new")):
        status, out, err = inside(command[0], video_files(name), *command[1:])
        assert status == 1 and out == ""
        assert message in err and err.endswith(".\n") and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_frames_that_are_not_there(video_files, tmp_path, inside):
    status, _, err = inside("frames", video_files("h264.mp4"), "--start", 24, "--out", tmp_path / "new")
    assert status == 1 and "has no frame in the chosen range; it has 24 frames" in err
    (tmp_path / "new").mkdir()
    status, _, err = inside("frames", video_files("h264.mp4"), "--out", tmp_path / "new")
    assert status == 1 and "new: the name is in use" in err
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "out, options, message",
    [
        ("out.mov", ["--format", "h264-mp4"], "out.mov does not end with .mp4, as h264-mp4 does; rename it."),
        ("out.xyz", [], "out.xyz does not end like a video; let it end with one of"),
        ("no/where/out.mp4", [], "its folder does not exist"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, inside, out, options, message):
    folder = draw(tmp_path / "in", [1])
    status, _, err = inside("encode", folder, tmp_path / out, "--fps", "8", *options)
    assert status == 1 and message in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_folders_that_hold_no_clip(tmp_path, inside):
    (tmp_path / "empty").mkdir()
    mixed = draw(tmp_path / "mixed", [1, 2])
    Image.new("RGB", (32, 64)).save(mixed / "3.png")
    draw(tmp_path / "broken", [1, 2])
    (tmp_path / "broken" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut off")
    for folder, message in (
        (tmp_path / "empty", "empty holds no images"),
        (tmp_path / "nowhere", "No file is called"),
        (mixed, "3.png is 32x64 and the first picture 64x64"),
        (tmp_path / "broken", "2.png"),
    ):
        status, _, err = inside("encode", folder, tmp_path / "out.mp4", "--fps", "8")
        assert status == 1 and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "COMMAND"),
        (("info",), "FILE"),
        (("frames", "x.mp4"), "--out"),
        (("frames", "x.mp4", "--out", "y", "--count", "0"), "must be 1 or more"),
        (("encode", "in", "out.mp4"), "--fps"),
        (("encode", "in", "out.mp4", "--fps", "0"), "'0' is no number of frames a second"),
        (("encode", "in", "out.mp4", "--fps", "8", "--format", "vhs"), "invalid choice: 'vhs'"),
    ],
)
def test_wrong_usage(inside, arguments, message):
    status, _, err = inside(*arguments)
    assert status == 2 and message in err.splitlines()[-1]


def test_status_and_message_of_the_process(tmp_path, run):
    (tmp_path / "notes.mp4").write_text("shopping list")
    wrong_file, wrong_usage = run("info", tmp_path / "notes.mp4"), run("encode")
    assert (wrong_file.returncode, wrong_file.stdout, len(wrong_file.stderr.splitlines())) == (1, "", 1)
    assert wrong_usage.returncode == 2 and "usage:" in wrong_usage.stderr


def test_interrupt_leaves_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.round(picture(1, 1280, 704) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "0.png", compress_level=0)
    for number in range(1, 200):
        os.link(folder / "0.png", folder / f"{number}.png")
    command = [sys.executable, str(SCRIPT), "encode", folder, tmp_path / "out.mp4", "--fps", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.mp4*")):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (1, "", "Interrupted: nothing was written.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
