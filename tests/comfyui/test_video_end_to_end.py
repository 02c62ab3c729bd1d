"""A clip's way through the real server: uploaded, loaded, cut, joined, saved, fetched, and its workflow read back."""

import json
from fractions import Fraction
from urllib.parse import urlencode

import av
import pytest
from apple_silicon_video.tests.video_fixtures import read_number, read_time
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.video.reader import FrameSelection, open_video

from .server import PromptError, server
from .trees import VERSIONS

NAME = "größe 视频 1.mp4"
WORKFLOW = {"last_node_id": 2, "nodes": [{"id": 2, "type": "Note", "widgets_values": ["säen \\ } 狐"]}], "links": []}
SAVE = {"fps": 24.0, "filename_prefix": "clip", "format": "h264-mp4", "quality": "high"}
LOAD = {
    "start_time": 0.0,
    "length": 0.0,
    "fps": 0.0,
    "every_nth": 1,
    "frame_limit": 0,
    "frames_4n1": False,
    "width": 0,
    "height": 0,
    "fit": "crop",
    "multiple_of": "1",
}
TRIM = {"unit": "frames", "mode": "exact", "format": "h264-mp4", "quality": "high", "path": ""}


@pytest.fixture(scope="module", params=VERSIONS)
def comfy(request, tmp_path_factory):
    with server(request.param, tmp_path_factory.mktemp("video"), arguments=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="module")
def uploaded(comfy, video_files):
    return comfy.upload_image(video_files("h264.mp4").read_bytes(), NAME)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def fetch(comfy, outputs, key, tmp_path):
    """What a node says it saved, as the browser gets it, in a file of its own."""
    (entry,) = outputs[key]["images"]
    status, body = comfy.request("GET", f"/view?{urlencode(entry)}")
    assert status == 200
    path = tmp_path / f"{key}-{entry['filename']}"
    path.write_bytes(body)
    return path


def as_sent(prompt):
    """A prompt without what core's executor adds to nodes that watch a file."""
    return {key: {name: value for name, value in node.items() if name != "is_changed"} for key, node in prompt.items()}


def contents(path):
    with open_video(path) as reader:
        return [read_number(frame) for frame in reader.frames(FrameSelection())], reader.info, reader.audio()


def heard(audio, moment):
    rate = audio["sample_rate"]
    return read_time(audio["waveform"][0, 0, int((moment - 0.02) * rate) : int((moment + 0.02) * rate)], rate)


def test_uploaded_clip_is_saved_with_its_workflow(comfy, uploaded, tmp_path):
    """Once as frames and sound, once as VIDEO; both carry the prompt and the workflow as they were sent."""
    prompt = {
        "load": node("MPSLoadVideo", file=uploaded, **LOAD),
        "frames": node("MPSSaveVideo", images=["load", 0], audio=["load", 2], **SAVE),
        "video": node("MPSSaveVideo", video=["load", 5], **SAVE | {"filename_prefix": "folder/video"}),
    }
    outputs = comfy.run(prompt, workflow=WORKFLOW)
    for key in ("frames", "video"):
        path = fetch(comfy, outputs, key, tmp_path)
        numbers, info, audio = contents(path)
        assert numbers == list(range(24)) and info.fps == Fraction(24) and info.duration == 1
        assert heard(audio, 0.5) == pytest.approx(0.5, abs=0.01)
        with av.open(str(path)) as container:
            assert as_sent(json.loads(container.metadata["prompt"])) == prompt
            assert json.loads(container.metadata["workflow"]) == WORKFLOW


def test_part_of_a_clip_at_another_rate_and_size(comfy, uploaded, tmp_path):
    load = LOAD | {"start_time": 0.25, "fps": 12.0, "width": 96, "height": 96, "frames_4n1": True}
    prompt = {
        "load": node("MPSLoadVideo", file=uploaded, **load),
        "save": node("MPSSaveVideo", images=["load", 0], audio=["load", 2], **SAVE | {"fps": ["load", 3]}),
    }
    numbers, info, audio = contents(fetch(comfy, comfy.run(prompt), "save", tmp_path))
    assert numbers == [6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert (info.width, info.height, info.fps) == (96, 96, 12)
    assert heard(audio, 0.3) == pytest.approx(0.55, abs=0.01)


def test_clips_are_cut_and_joined(comfy, uploaded, tmp_path):
    """Trim and Concatenate on VIDEOs, with previews in the temporary folder."""
    prompt = {
        "load": node("MPSLoadVideo", file=uploaded, **LOAD),
        "head": node("MPSTrimVideo", video=["load", 5], start=0.0, end=6.0, **TRIM),
        "tail": node("MPSTrimVideo", video=["load", 5], start=-6.0, end=0.0, **TRIM),
        "join": node(
            "MPSConcatenateVideos",
            **{"videos.video0": ["tail", 0], "videos.video1": ["head", 0]},
            mode="auto",
            format="h264-mp4",
            quality="high",
        ),
        "save": node("MPSSaveVideo", video=["join", 0], **SAVE),
    }
    outputs = comfy.run(prompt)
    assert contents(fetch(comfy, outputs, "save", tmp_path))[0] == [*range(18, 24), *range(6)]
    assert outputs["join"]["images"][0]["type"] == "temp"
    numbers, _, audio = contents(fetch(comfy, outputs, "join", tmp_path))
    assert numbers == [*range(18, 24), *range(6)]
    assert heard(audio, 0.1) == pytest.approx(0.85, abs=0.015) and heard(audio, 0.4) == pytest.approx(0.15, abs=0.015)


def test_segments_are_extended_with_their_sound(comfy, uploaded, tmp_path):
    """Two overlapping segments of one clip give the clip again; a still from it starts the next."""
    first = node("MPSLoadVideo", file=uploaded, **LOAD | {"length": 0.5})
    second = node("MPSLoadVideo", file=uploaded, **LOAD | {"start_time": 0.375})
    clips = {"clips.clip0": ["first", 0], "clips.clip1": ["second", 0]}
    sounds = {"sounds.audio0": ["first", 2], "sounds.audio1": ["second", 2]}
    prompt = {
        "first": first,
        "second": second,
        "extend": node(
            "MPSExtendVideo", **clips, **sounds, overlap=3, transition="smooth", match_color=False, fps=24.0
        ),
        "save": node("MPSSaveVideo", images=["extend", 0], audio=["extend", 1], **SAVE),
        "silent": node("MPSExtendVideo", **clips, overlap=3, transition="cut", match_color=True, fps=24.0),
        "save silent": node("MPSSaveVideo", images=["silent", 0], audio=["silent", 1], **SAVE),
        "last": node("MPSLastFrames", images=["extend", 0], count=2),
        "save last": node("MPSSaveVideo", images=["last", 0], **SAVE),
        "frame": node("MPSGetFrame", path=NAME, index=-1),
        "save frame": node("MPSSaveVideo", images=["frame", 0], **SAVE),
    }
    outputs = comfy.run(prompt)
    numbers, _, audio = contents(fetch(comfy, outputs, "save", tmp_path))
    assert numbers == list(range(24))
    for moment in (0.2, 0.44, 0.8):
        assert heard(audio, moment) == pytest.approx(moment, abs=0.01)
    numbers, _, audio = contents(fetch(comfy, outputs, "save silent", tmp_path))
    assert numbers == list(range(24)) and audio is None
    assert contents(fetch(comfy, outputs, "save last", tmp_path))[0] == [22, 23]
    assert contents(fetch(comfy, outputs, "save frame", tmp_path))[0] == [23]


def test_wrong_file_is_one_sentence(comfy):
    name = comfy.upload_image(b"This is a shopping list.\n", "list.mp4")
    prompt = {
        "load": node("MPSLoadVideo", file=name, **LOAD),
        "save": node("MPSSaveVideo", images=["load", 0], **SAVE),
    }
    with pytest.raises(PromptError, match=r"failed: list\.mp4 cannot be read: .*; choose another file"):
        comfy.run(prompt)
