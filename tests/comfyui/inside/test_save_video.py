"""Save Video inside ComfyUI: images, a mask, core's VIDEO values; previews, progress, interruption, refusals."""

import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from apple_silicon_video.nodes.video import SaveVideo
from apple_silicon_video.nodes.video_inputs import settings
from apple_silicon_video.tests.unit.video_clips import clip, decode, number_in, tone
from apple_silicon_video.video.comfy_formats import formats, user_folder
from apple_silicon_video.video.comfy_saving import Settings
from apple_silicon_video.video.errors import VideoError
from comfy_api.latest import InputImpl, Types
from PIL import Image

PLAIN = {"fps": 24.0, "filename_prefix": "clip", "format": "h264-mp4", "quality": "standard"}
SHOWN = {
    "h264-mp4": ("output", "clip_00001_.mp4", True),
    "h264-10bit-mp4": ("temp", "preview_00001_.mp4", True),
    "hevc-mp4": ("temp", "preview_00001_.mp4", True),
    "hevc-10bit-mp4": ("temp", "preview_00001_.mp4", True),
    "prores422-mov": ("temp", "preview_00001_.mp4", True),
    "prores4444-mov": ("temp", "preview_00001_.mp4", True),
    "av1-mp4": ("output", "clip_00001_.mp4", True),
    "vp9-webm": ("output", "clip_00001_.webm", True),
    "gif": ("output", "clip_00001_.gif", False),
    "webp": ("output", "clip_00001_.webp", True),
    "png-8bit": ("temp", "preview_00001_.mp4", True),
    "png-16bit": ("temp", "preview_00001_.mp4", True),
}


def run(**inputs):
    """Run the node as ComfyUI does; returns (path, ui, VIDEO)."""
    hidden = SimpleNamespace(prompt={"1": {"x": "}"}}, extra_pnginfo={"workflow": {"nodes": [1]}})
    node = type("Node", (SaveVideo,), {"hidden": hidden})
    output = node.execute(**(PLAIN | inputs))
    shown = output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui
    return Path(output.args[1]), shown, output.args[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def numbers(path):
    return [number_in(picture) for picture in decode(path)]


@pytest.mark.parametrize("name", SHOWN)
def test_every_format_is_saved_and_shown(folders, name):
    path, shown, video = run(images=clip(5), format=name, audio=tone(1, 44100))
    place, file, animated = SHOWN[name]
    (result,) = shown["images"]
    assert (result["filename"], result["type"], bool(shown.get("animated", [False])[0])) == (file, place, animated)
    seen = folders[place] / result["subfolder"] / file
    assert seen.is_file() and path.exists()
    if place == "temp":
        assert numbers(seen) == [0, 1, 2, 3, 4]
        with av.open(str(seen)) as container:
            assert len(container.streams.audio) == 1
    else:
        assert files(folders["temp"]) == []
    components = video.get_components()
    assert components.images.shape == (5, 96, 160, 3)
    assert components.frame_rate == 24
    assert [number_in(image.numpy()) for image in components.images] == [0, 1, 2, 3, 4]


def test_the_table_is_complete(folders):
    assert SHOWN.keys() == formats().keys()


def test_formats_of_the_user(folders):
    user_folder().mkdir()
    mine = json.loads((Path(__file__).parents[3] / "video" / "formats" / "h264-mp4.json").read_text())
    (user_folder() / "mine.json").write_text(json.dumps(mine | {"suffix": ".m4v"}))
    (format_input,) = (i for i in SaveVideo.define_schema().inputs if i.id == "format")
    assert format_input.options[0] == "h264-mp4" and "mine" in format_input.options
    assert run(images=clip(2), format="mine")[0].name == "clip_00001_.m4v"


def test_inputs_become_settings():
    assert settings("clip", "gif", "best") == Settings("clip", "gif", "best")
    chosen = settings("clip", "gif", "best", encoder="software only", audio_codec="pcm", encoder_options="a=1", loop=2)
    assert chosen == Settings(
        "clip", "gif", "best", loop=2, software_only=True, audio_codec="pcm", encoder_options="a=1"
    )


def test_loop_ping_pong_first_frame_and_mask(folders):
    path, *_ = run(images=clip(4), ping_pong=True, loop=1, first_frame=True)
    assert numbers(path) == [0, 1, 2, 3, 2, 1] * 2
    with Image.open(path.with_suffix(".png")) as image:
        assert number_in(np.asarray(image) / 255) == 0
        assert json.loads(image.text["prompt"]) == {"1": {"x": "}"}}
        assert json.loads(image.text["workflow"]) == {"nodes": [1]}
    mask = torch.zeros(1, 96, 160)
    mask[:, :, 80:] = 1
    path, *_ = run(images=clip(2), mask=mask, format="webp", loop=2)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (2, 3)
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    assert (alpha[:, :80] == 255).all() and (alpha[:, 80:] == 0).all()
    again, *_ = run(images=clip(2), filename_prefix="clip", first_frame=True, format="webp")
    assert again.with_suffix(".png").is_file()


@pytest.fixture
def saved(folders):
    return run(images=clip(30), fps=23.976, filename_prefix="source", audio=tone(2, 48000))[0]


def test_a_video_is_copied_where_it_fits(folders, saved):
    for source in (str(saved), BytesIO(saved.read_bytes())):
        path, shown, _ = run(video=InputImpl.VideoFromFile(source), first_frame=True)
        with av.open(str(path)) as ours, av.open(str(saved)) as theirs:
            ours, theirs = ([bytes(packet) for packet in file.demux(video=0)] for file in (ours, theirs))
        assert ours == theirs and shown["images"][0]["filename"] == path.name
        assert path.with_suffix(".png").is_file()
    encoded, *_ = run(video=InputImpl.VideoFromFile(str(saved)), copy_streams=False, quality="small")
    assert encoded.stat().st_size < saved.stat().st_size
    assert numbers(encoded) == list(range(30))


def test_a_copy_that_no_browser_plays_is_shown_as_a_small_copy(folders):
    saved, *_ = run(images=clip(4), format="prores422-mov", filename_prefix="source")
    path, shown, _ = run(video=InputImpl.VideoFromFile(str(saved)), format="prores422-mov")
    assert shown["images"][0]["type"] == "temp"
    with av.open(str(path)) as ours, av.open(str(saved)) as theirs:
        ours, theirs = ([bytes(packet) for packet in file.demux(video=0)] for file in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize("name", ["hevc-10bit-mp4", "webp", "png-8bit"])
def test_a_video_is_encoded_frame_by_frame_where_it_does_not_fit(folders, saved, name, monkeypatch):
    video = InputImpl.VideoFromFile(str(saved))
    monkeypatch.setattr(type(video), "get_components", lambda self: pytest.fail("all frames are decoded at once"))
    path, shown, _ = run(video=video, format=name, ping_pong=True)
    if name != "hevc-10bit-mp4":
        assert (len(list(path.iterdir())) if path.is_dir() else Image.open(path).n_frames) == 58
        return
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (58, av.open(str(saved)).streams.video[0].average_rate)
        sound = container.streams.audio[0]
        assert abs(float(sound.duration * sound.time_base) - 30 / 23.976) < 0.03
    assert numbers(folders["temp"] / shown["images"][0]["subfolder"] / shown["images"][0]["filename"])[28:31] == [
        28, 29, 28,
    ]  # fmt: skip


def test_a_cut_video_and_one_of_frames(folders, saved):
    path, *_ = run(video=InputImpl.VideoFromFile(str(saved), start_time=0.5, duration=0.25))
    assert numbers(path) == [12, 13, 14, 15, 16, 17]
    parts = Types.VideoComponents(images=clip(6), audio=tone(1, 44100), frame_rate=12.5)
    path, *_ = run(video=InputImpl.VideoFromComponents(parts))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 12.5
        assert len(container.streams.audio) == 1
    assert numbers(path) == list(range(6))


def test_a_cut_is_found_where_the_clock_does_not_begin_with_the_first_frame(folders, saved):
    late = folders["temp"] / "late.ts"
    with av.open(str(saved)) as source, av.open(str(late), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(late)) as container:
        begin = float(container.streams.video[0].start_time * container.streams.video[0].time_base)
    assert begin > 0.04
    path, *_ = run(video=InputImpl.VideoFromFile(str(late), start_time=begin + 0.5, duration=0.25))
    assert numbers(path) == [12, 13, 14, 15, 16, 17]
    path, *_ = run(video=InputImpl.VideoFromFile(str(late), start_time=0.01, duration=0.25))
    assert numbers(path) == [0, 1, 2, 3, 4, 5]


def test_progress_shows_pictures(folders, monkeypatch):
    heard = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: heard.append((value, total, preview)),
    )
    run(images=torch.nn.functional.interpolate(clip(9).permute(0, 3, 1, 2), scale_factor=8).permute(0, 2, 3, 1))
    assert heard[0][:2] == (0, 9) and heard[-1][:2] == (9, 9)
    (kind, image, size), *_ = (preview for _, _, preview in heard if preview is not None)
    assert (kind, image.size, size) == ("JPEG", (512, 308), 512)
    assert number_in(np.asarray(image) / 255) == next(value for value, _, preview in heard if preview) - 1


def test_a_gif_is_not_hidden_behind_a_preview(folders, monkeypatch):
    """The front end would go on showing the preview in place of the finished GIF."""
    heard = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: heard.append(preview)
    )
    run(images=clip(3), format="gif")
    assert heard and all(preview is None for preview in heard)
    run(images=clip(3), format="webp")
    assert any(preview is not None for preview in heard)


@pytest.mark.parametrize("name", ["h264-mp4", "prores422-mov", "gif", "png-8bit"])
def test_an_interruption_leaves_nothing(folders, monkeypatch, name):
    def hook(value, total, preview, node_id=None):
        if value == 1:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(images=clip(9), format=name, first_frame=True)
    assert files(folders["output"]) == [] and files(folders["temp"]) == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, r"Connect either images or a video to Save Video\."),
        ({"images": torch.zeros(0, 8, 8, 3)}, "There are no frames to save"),
        ({"images": clip(2), "filename_prefix": "../../x"}, "leads outside of the output folder"),
        ({"images": clip(2), "encoder_options": "crf 17"}, "The encoder options hold 'crf'"),
        ({"images": clip(2), "encoder_options": "no_such=1"}, "libx264 has no option 'no_such'"),
        ({"images": clip(2), "audio": tone(1, 8000), "format": "vp9-webm", "audio_codec": "aac"}, "cannot hold aac"),
        ({"images": clip(2), "mask": torch.zeros(3, 8, 8)}, "3 masks for 2 frames"),
    ],
)
def test_refusals_are_one_sentence(folders, inputs, words):
    with pytest.raises(VideoError, match=words) as caught:
        run(**inputs)
    assert "\n" not in str(caught.value)
    assert files(folders["output"]) == []


def test_images_and_a_video_at_once_are_refused(folders, saved):
    with pytest.raises(VideoError, match="either images or a video"):
        run(images=clip(2), video=InputImpl.VideoFromFile(str(saved)))


def test_a_video_that_is_none(folders, tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        run(video=InputImpl.VideoFromFile(str(tmp_path / "a.mp4")))
