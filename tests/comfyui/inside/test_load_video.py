"""The reading nodes inside a real ComfyUI: files, VIDEO of core's nodes, what they return and what they refuse."""

import asyncio
import os
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import execution
import folder_paths
import pytest
import torch
from apple_silicon_video.nodes.load_video import NODES
from comfy_api.latest import InputImpl, Types
from comfy_extras.nodes_primitive import String

import nodes as core_nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from video_fixtures import make, read_number, read_time

RANGE = {"start_time": 0.0, "length": 0.0, "fps": 0.0}
COUNT = {"every_nth": 1, "frame_limit": 0, "frames_4n1": False}
SIZE = {"width": 0, "height": 0, "fit": "crop", "multiple_of": "1"}
LOAD = RANGE | COUNT | SIZE


@pytest.fixture
def nodes():
    return {node.GET_SCHEMA().node_id: node.PREPARE_CLASS_CLONE(None) for node in NODES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return lambda name: make(name, folder)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's input and output folders, empty."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def numbers(images):
    return [read_number(frame) for frame in images]


def test_every_output_of_load_video(nodes, files, folders):
    path = files("h264.mp4")
    (folders / "input" / "clip.mp4").write_bytes(path.read_bytes())
    node = nodes["MPSLoadVideo"]
    assert node.validate_inputs(file="clip.mp4") is True
    images, mask, audio, fps, count, video = node.execute(file="clip.mp4", **LOAD | {"start_time": 0.5}).result
    assert numbers(images) == list(range(12, 24)) and (fps, count) == (24.0, 12)
    assert mask.shape == images.shape[:3] and float(mask.max()) == 0
    assert audio["waveform"].shape == (1, 2, 24000) and audio["sample_rate"] == 48000
    assert abs(read_time(audio["waveform"][0, 0, 4000:8000], 48000) - (0.5 + 6000 / 48000)) < 0.01
    assert video.get_stream_source() == str(folders / "input" / "clip.mp4")
    assert numbers(video.get_components().images) == list(range(12, 24))


def test_combo_lists_videos_gif_and_webp(nodes, folders):
    for name in ("b.mp4", "a.mov", "c.gif", "d.webp", "e.txt", "f.png"):
        (folders / "input" / name).write_bytes(b"x")
    options = nodes["MPSLoadVideo"].define_schema().inputs[0].options
    assert options == ["a.mov", "b.mp4", "c.gif", "d.webp"]


@pytest.mark.parametrize(
    ("options", "expected", "fps"),
    [
        ({}, list(range(24)), 24.0),
        ({"start_time": 0.25, "length": 0.25}, list(range(6, 12)), 24.0),
        ({"start_time": -0.25}, list(range(18, 24)), 24.0),
        ({"every_nth": 5}, [0, 5, 10, 15, 20], 4.8),
        ({"fps": 12.0}, list(range(0, 24, 2)), 12.0),
        ({"frame_limit": 7, "frames_4n1": True}, [0, 1, 2, 3, 4], 24.0),
    ],
)
def test_video_output_is_the_same_section(nodes, files, options, expected, fps):
    """Core's nodes read from VIDEO every frame of the section that was loaded."""
    path = str(files("h264.mp4"))
    images, _, audio, rate, count, video = nodes["MPSLoadVideoPath"].execute(path=path, **LOAD | options).result
    assert numbers(images) == expected and count == len(expected) and rate == pytest.approx(fps)
    parts = video.get_components()
    section = numbers(parts.images)
    assert section[0] == expected[0] and section == list(range(section[0], section[-1] + 1))
    step = round(24 / fps)
    assert len(section) == min(len(expected) * step, 24 - expected[0])
    assert audio["waveform"].shape[2] == pytest.approx(len(section) * 2000, abs=1)


def test_video_of_other_nodes_is_read_like_a_file(nodes, files):
    path = files("h264.mp4")
    load = nodes["MPSLoadVideoPath"]
    whole = InputImpl.VideoFromFile(str(path))
    images, _, _, _, _, same = load.execute(path="", video=whole, **LOAD).result
    assert numbers(images) == list(range(24)) and same is whole
    memory = InputImpl.VideoFromFile(BytesIO(path.read_bytes()))
    assert torch.equal(load.execute(path="", video=memory, **LOAD).result[0], images)
    trimmed = whole.as_trimmed(0.5, 0.25, strict_duration=False)
    images, _, audio, _, count, again = load.execute(path="", video=trimmed, **LOAD | {"start_time": 0.125}).result
    assert numbers(images) == [15, 16, 17] and count == 3 and audio["waveform"].shape[2] == 6000
    assert numbers(again.get_components().images) == [15, 16, 17]
    ends = InputImpl.VideoFromFile(str(path), start_time=-0.25)
    assert numbers(load.execute(path="", video=ends, **LOAD).result[0]) == list(range(18, 24))


def test_frames_in_memory_are_read_without_encoding(nodes):
    images = torch.rand(9, 32, 48, 3)
    sound = {"waveform": torch.rand(1, 2, 900), "sample_rate": 800}
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=sound, frame_rate=Fraction(8)))
    result = (
        nodes["MPSLoadVideoPath"].execute(path="", video=video, **LOAD | {"start_time": 0.25, "length": 0.5}).result
    )
    assert torch.equal(result[0], images[2:6]) and result[3:5] == (8.0, 4)
    assert torch.equal(result[2]["waveform"], sound["waveform"][..., 200:600])
    assert torch.equal(result[5].get_components().images, images[2:6])
    frame, mask, time = nodes["MPSGetFrame"].execute(path="", index=-1, video=video).result
    assert torch.equal(frame, images[8:]) and time == 1.0 and mask.shape == (1, 32, 48)
    info = nodes["MPSVideoInfo"].execute(path="", video=video).result
    assert info[:6] == (48, 32, 9, 8.0, 1.125, True)


def test_size_and_transparency(nodes, files):
    options = LOAD | {"width": 48, "height": 30, "multiple_of": "16", "frame_limit": 2}
    images, mask, audio, *_ = nodes["MPSLoadVideoPath"].execute(path=str(files("alpha.webm")), **options).result
    assert images.shape == (2, 32, 48, 3) and mask.shape == (2, 32, 48) and audio is None
    assert images.is_contiguous() and float(mask[:, :10].max()) < 0.02
    assert float((mask[:, 22:] - 0.5).abs().max()) < 0.02


def test_get_frame(nodes, files):
    path = str(files("b_frames.mp4"))
    for index, number in ((0, 0), (-1, 23), (-24, 0), (13, 13)):
        image, _, time = nodes["MPSGetFrame"].execute(path=path, index=index).result
        assert numbers(image) == [number] and time == pytest.approx(number / 24)
    with pytest.raises(ValueError, match="has no frame 24; it has 24, numbered 0 to 23"):
        nodes["MPSGetFrame"].execute(path=path, index=24)


def test_video_info(nodes, files):
    *values, report = nodes["MPSVideoInfo"].execute(path=str(files("clockwise.mp4"))).result
    assert values == [64, 96, 24, 24.0, 1.0, False]
    assert "turned by 90 degrees" in report and "h264 yuv420p 8 bit" in report and "no sound" in report


def test_paths_inside_comfyui_folders(nodes, files, folders):
    content = files("one_frame.mp4").read_bytes()
    (folders / "output" / "sub").mkdir()
    (folders / "output" / "sub" / "saved.mp4").write_bytes(content)
    node = nodes["MPSGetFrame"]
    assert node.validate_inputs(path="sub/saved.mp4") is True
    assert numbers(node.execute(path="sub/saved.mp4", index=0).result[0]) == [0]
    assert node.validate_inputs(path="nothing.mp4").startswith("nothing.mp4 does not exist; ")
    assert "is a folder" in node.validate_inputs(path=str(folders))
    assert node.validate_inputs(path="") is True
    with pytest.raises(ValueError, match="There is no video; connect one or enter a path"):
        node.execute(path="", index=0)


def test_fingerprint_follows_the_file(nodes, files, folders):
    path = folders / "input" / "clip.mp4"
    path.write_bytes(files("one_frame.mp4").read_bytes())
    node = nodes["MPSLoadVideo"]
    before = node.fingerprint_inputs(file="clip.mp4", **LOAD)
    assert node.fingerprint_inputs(file="clip.mp4", **LOAD) == before
    path.write_bytes(files("h264.mp4").read_bytes())
    assert node.fingerprint_inputs(file="clip.mp4", **LOAD) != before
    assert nodes["MPSLoadVideoPath"].fingerprint_inputs(path=str(path), **LOAD)


@pytest.mark.parametrize("name", ["MPSLoadVideoPath", "MPSLoadImageSequence", "MPSVideoInfo", "MPSGetFrame"])
def test_a_path_may_come_from_another_node(nodes, monkeypatch, name):
    """Before the run ComfyUI knows no value for it, asks all the same, and must neither refuse nor rely on a result."""
    for node_id, node in {name: nodes[name], "PrimitiveString": String}.items():
        monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, node_id, node)
    defaults = {entry.id: entry.default for entry in nodes[name].GET_SCHEMA().inputs if not entry.optional}
    prompt = {
        "1": {"class_type": "PrimitiveString", "inputs": {"value": "anywhere"}},
        "2": {"class_type": name, "inputs": defaults | {"path": ["1", 0]}},
    }
    assert asyncio.run(execution.validate_inputs("id", prompt, "2", {}))[0] is True
    values = {
        key: value for key, (value,) in execution.get_input_data(prompt["2"]["inputs"], nodes[name], "2")[0].items()
    }
    assert nodes[name].fingerprint_inputs(**values) != nodes[name].fingerprint_inputs(**values)


def test_a_file_may_come_from_another_node(nodes):
    node = nodes["MPSLoadVideo"]
    assert node.validate_inputs(file=None) is True
    assert node.fingerprint_inputs(file=None, **LOAD) != node.fingerprint_inputs(file=None, **LOAD)


def test_a_connected_video_needs_no_path(nodes, files, folders, monkeypatch):
    for name in ("MPSLoadVideoPath", "MPSGetFrame"):
        monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, name, nodes[name])
    prompt = {
        "1": {"class_type": "MPSLoadVideoPath", "inputs": LOAD | {"path": str(files("h264.mp4"))}},
        "2": {"class_type": "MPSGetFrame", "inputs": {"path": "gone.mp4", "index": 0, "video": ["1", 5]}},
    }
    assert asyncio.run(execution.validate_inputs("id", prompt, "2", {}))[0] is True
    del prompt["2"]["inputs"]["video"]
    assert asyncio.run(execution.validate_inputs("id", prompt, "2", {}))[0] is False
    node = nodes["MPSGetFrame"]
    before = node.fingerprint_inputs(path="", index=0), node.fingerprint_inputs(path="new.mp4", index=0, video=None)
    (folders / "input" / "new.mp4").touch()
    os.utime(folders / "input", (0, 0))
    after = node.fingerprint_inputs(path="", index=0), node.fingerprint_inputs(path="new.mp4", index=0, video=None)
    assert after == before


def test_missing_file_is_one_sentence(nodes, folders):
    assert nodes["MPSLoadVideo"].validate_inputs(file="gone.mp4") == (
        "gone.mp4 is not in the input folder; upload it, or choose another file."
    )


def test_interrupt_ends_a_read(nodes, files):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        nodes["MPSLoadVideoPath"].execute(path=str(files("h264.mp4")), **LOAD)
    management.interrupt_current_processing(False)
    assert len(nodes["MPSLoadVideoPath"].execute(path=str(files("h264.mp4")), **LOAD).result[0]) == 24


def test_image_sequence(nodes, folders):
    from PIL import Image

    folder = folders / "output" / "frames"
    folder.mkdir()
    for number in (10, 9, 1, 2):
        Image.new("RGBA", (16, 8), (number, 0, 0, 128)).save(folder / f"img_{number}.png")
    node = nodes["MPSLoadImageSequence"]
    for path in ("frames", "frames/img_*.png", "frames/img_%d.png", str(folder)):
        assert node.validate_inputs(path=path) is True
        images, mask, count = node.execute(path=path, start_image=0, **COUNT | SIZE).result
        assert [round(float(v) * 255) for v in images[:, 0, 0, 0]] == [1, 2, 9, 10] and count == 4
        assert torch.allclose(mask, torch.full((4, 8, 16), 1 - 128 / 255))
    assert node.execute(path="frames", start_image=-2, **COUNT | SIZE).result[2] == 2
    assert "holds no images" in node.validate_inputs(path=str(folders / "input"))
    with av.open(str(folders / "input" / "x.png"), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 8, "rgb48be"
        pixels = torch.arange(16 * 8 * 3).reshape(8, 16, 3).to(torch.uint16).numpy()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le").reformat(format="rgb48be")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    images, _, _ = node.execute(path="x.png", start_image=0, **COUNT | SIZE).result
    assert torch.equal((images[0] * 65535).round().int(), torch.arange(16 * 8 * 3).reshape(8, 16, 3).int())
