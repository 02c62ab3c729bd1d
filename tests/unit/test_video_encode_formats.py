"""Every video format: pictures, alpha, sound, length and tags come back as they went in.

ffprobe (Debian's ffmpeg) reads the tags; pixels are compared through float64 formulas of our own and, for images, by
Pillow.
"""

import json
import shutil
import struct
import subprocess
import zlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from apple_silicon_video.tests.unit.video_clips import clip, leftovers, number_in, psnr, save, tone
from apple_silicon_video.video.color import COLOR_SPACES
from apple_silicon_video.video.metadata import exif, plain_json, workflow_tags
from apple_silicon_video.video.pixel_formats import PIXEL_FORMATS, fill
from apple_silicon_video.video.video_formats import QUALITIES, load_formats
from PIL import Image

FORMATS = load_formats()
CONTAINERS = [name for name, video_format in FORMATS.items() if video_format.writer == "container"]
IMAGES = [name for name in FORMATS if name not in CONTAINERS]
SUFFIX = {name: video_format.suffix for name, video_format in FORMATS.items()}
# PSNR in dB of the gradient below the number, at quality "standard", a little below what was measured.
FLOORS = {
    "h264-mp4": 40, "h264-10bit-mp4": 40, "hevc-mp4": 39, "hevc-10bit-mp4": 39, "av1-mp4": 38, "vp9-webm": 38,
    "prores422-mov": 46, "prores4444-mov": 46, "gif": 24, "webp": 36, "png-8bit": 58, "png-16bit": 100,
}  # fmt: skip
# What ffprobe must say: codec, tag, profile, pixel format.
STREAMS = {
    "h264-mp4": ("h264", "avc1", "High", "yuv420p"),
    "h264-10bit-mp4": ("h264", "avc1", "High 10", "yuv420p10le"),
    "hevc-mp4": ("hevc", "hvc1", "Main", "yuv420p"),
    "hevc-10bit-mp4": ("hevc", "hvc1", "Main 10", "yuv420p10le"),
    "av1-mp4": ("av1", "av01", "Main", "yuv420p10le"),
    "vp9-webm": ("vp9", "[0][0][0][0]", "Profile 0", "yuv420p"),
    "prores422-mov": ("prores", "apcn", "Standard", "yuv422p10le"),
    "prores4444-mov": ("prores", "ap4h", "4444", "yuv444p12le"),
}
WITH_ALPHA = {"vp9-webm": 38, "prores4444-mov": 60, "gif": 100, "webp": 100, "png-8bit": 100, "png-16bit": 100}


def write(folder: Path, name: str, frames=None, **options):
    return save(folder / f"clip{SUFFIX[name]}", frames, video_format=FORMATS[name], **options)


def probe(path: Path) -> dict:
    program = shutil.which("ffprobe")
    assert program, "ffprobe is missing: install Debian's ffmpeg, or Homebrew's"
    command = [program, "-v", "error", "-show_streams", "-show_format", "-of", "json", path]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def components(frame: av.VideoFrame) -> list[np.ndarray]:
    """Y', Cb, Cr and alpha in 0..1 as stored, limited range undone, chroma repeated; for planar formats."""
    bits = frame.format.components[0].bits
    dtype, scale = (np.uint8, 1) if bits == 8 else ("<u2", 1 << (bits - 8))
    planes = []
    for index, plane in enumerate(frame.planes):
        values = np.frombuffer(plane, dtype).reshape(plane.height, -1)[:, : plane.width].astype(np.float64)
        if index == 3:
            planes.append(values / ((1 << bits) - 1))
            continue
        values = (values / scale - (128 if index else 16)) / (224 if index else 219)
        repeats = -(-frame.height // plane.height), -(-frame.width // plane.width)
        planes.append(np.kron(values, np.ones(repeats))[: frame.height, : frame.width])
    return planes


def pictures(path: Path, name: str) -> list[np.ndarray]:
    """Frames as R'G'B' or R'G'B'A in 0..1 by BT.709's formulas, or as Pillow reads them."""
    if path.is_dir():
        return [read_png(file) for file in sorted(path.iterdir())]
    if FORMATS[name].writer != "container":
        with Image.open(path) as image:
            frames = []
            for index in range(image.n_frames):
                image.seek(index)
                frames.append(np.asarray(image.convert("RGBA"), np.float64) / 255)
            return frames
    result = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        if name == "vp9-webm":  # FFmpeg's own decoder leaves the alpha out
            context = av.CodecContext.create("libvpx-vp9", "r")
        for packet in container.demux(stream):
            for frame in context.decode(packet if packet.size else None):
                luma, blue, red, *alpha = components(frame)
                r, b = luma + 2 * (1 - 0.2126) * red, luma + 2 * (1 - 0.0722) * blue
                result.append(np.stack((r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b, *alpha), -1))
    return result


def read_png(path: Path) -> np.ndarray:
    """A PNG of 8 or 16 bits, without a filter of the libraries under test in between."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        content = data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + content)
        if kind == b"IHDR":
            width, height, bits, color = struct.unpack(">IIBB", content[:10])
        elif kind == b"IDAT":
            packed += content
        at += 12 + length
    channels = {2: 3, 6: 4}[color]
    pixel = channels * bits // 8
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * pixel)
    values, above = [], np.zeros(width * pixel, np.uint8)
    for row in rows:
        above = unfiltered(row[0], row[1:], above, pixel)
        values.append(above)
    return np.stack(values).view(np.uint8 if bits == 8 else ">u2").reshape(height, width, channels) / (2.0**bits - 1)


def unfiltered(kind: int, row: np.ndarray, above: np.ndarray, pixel: int) -> np.ndarray:
    result = [0] * pixel + row.tolist()
    upper = [0] * pixel + above.tolist()
    for i in range(pixel, len(result)):
        a, b, c = result[i - pixel], upper[i], upper[i - pixel]
        estimate = min((a, b, c), key=lambda value: abs(a + b - c - value))
        result[i] = (result[i] + (0, a, b, (a + b) // 2, estimate)[kind]) & 255
    return np.array(result[pixel:], np.uint8)


# ---- pictures


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_come_back(tmp_path, name):
    images = clip(9)
    video = write(tmp_path, name, images)
    assert (video.width, video.height, video.frames) == (160, 96, 9)
    frames = pictures(video.path, name)
    assert [number_in(frame[..., :3]) for frame in frames] == list(range(9))
    worst = min(psnr(f[18:, :, :3], image[18:].numpy()) for f, image in zip(frames, images.double()))
    assert worst > FLOORS[name]
    assert leftovers(tmp_path) == [video.path.name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_clips(tmp_path, name, count):
    video = write(tmp_path, name, clip(count), fps=24)
    assert [number_in(frame[..., :3]) for frame in pictures(video.path, name)] == list(range(count))
    if name in CONTAINERS and name != "vp9-webm":
        stream = probe(video.path)["streams"][0]
        assert (int(stream["nb_frames"]), Fraction(stream["duration"])) == (count, round(Fraction(count, 24), 6))


@pytest.mark.parametrize("name", WITH_ALPHA)
def test_alpha_comes_back(tmp_path, name):
    """Nothing, half (where there is a half) and all of the picture is seen, and colours stay where it is."""
    alpha = torch.tensor([0.0, 1.0, 0.0 if name == "gif" else 0.5, 1.0]).repeat_interleave(40)[None, None, :, None]
    images = torch.cat((clip(5), alpha.expand(5, 96, -1, -1)), -1)
    frames = pictures(write(tmp_path, name, images, quality="best").path, name)
    inner = np.arange(160) % 40 // 8 == 2  # away from the edges, which lossy alpha softens
    for frame, image in zip(frames, images.double().numpy(), strict=True):
        assert psnr(frame[:, inner, 3], np.round(image[:, inner, 3] * 255) / 255) > min(WITH_ALPHA[name], 50)
        opaque = inner & (image[0, :, 3] == 1)
        assert psnr(frame[18:, opaque, :3], image[18:, opaque, :3]) > min(FLOORS[name], 40)


def test_a_webp_with_loss_keeps_its_alpha(tmp_path):
    """Its frames are of two chunks then, alpha and colours."""
    images = torch.cat((clip(2), torch.linspace(0, 1, 160)[None, None, :, None].expand(2, 96, -1, -1)), -1)
    for frame, image in zip(pictures(write(tmp_path, "webp", images).path, "webp"), images.double().numpy()):
        assert np.abs(frame[..., 3] - image[..., 3]).max() < 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_odd_sizes(tmp_path, name):
    """Stored as they are where the format can, else with the last column and row repeated."""
    images = clip(3)[:, :95, :159]
    video = write(tmp_path, name, images, quality="best")
    padded = name.startswith(("h264", "hevc"))
    expected = (160, 96) if padded else (160, 95) if name == "prores422-mov" else (159, 95)
    assert (video.width, video.height) == expected
    for frame, image in zip(pictures(video.path, name), images.double().numpy(), strict=True):
        assert frame.shape[:2] == expected[::-1]
        assert psnr(frame[18:95, :, :3][:, :159], image[18:]) > FLOORS[name]
        edge = [0.2126, 0.7152, 0.0722]
        assert psnr(frame[18:95, 158, :3] @ edge, image[18:, 158] @ edge) > min(FLOORS[name], 34)


@pytest.mark.parametrize("name", PIXEL_FORMATS)
@pytest.mark.parametrize(("height", "width"), [(96, 64), (75, 128)])
def test_every_layout_holds_the_same_picture(name, height, width):
    """FFmpeg repacks each layout without loss into a planar one, where the formulas read it.

    Widths are multiples of 64: at others its threads write over each other's first pixels.
    """
    planar = {
        "nv12": "yuv420p", "p010le": "yuv420p10le", "p210le": "yuv422p10le", "p410le": "yuv444p10le",
        "ayuv64le": "yuva444p16le", "rgb24": "gbrp", "rgba": "gbrap", "bgra": "gbrap", "rgb48be": "gbrp16le",
        "rgba64be": "gbrap16le",
    }.get(name, name)  # fmt: skip
    layout = PIXEL_FORMATS[name]
    width, height = (
        -(-width // layout.chroma[0]) * layout.chroma[0],
        -(-height // layout.chroma[1]) * layout.chroma[1],
    )
    image = torch.rand(height, width, 4, generator=torch.Generator().manual_seed(0))
    picture = av.VideoFrame(width, height, name)
    assert fill(picture, image, COLOR_SPACES["bt709"]) is False
    planes = picture.reformat(format=planar).planes if planar != name else picture.planes
    top = (1 << layout.bits) - 1
    values = [
        np.frombuffer(p, np.uint8 if layout.bits == 8 else "<u2").reshape(p.height, -1)[:, : p.width].astype(float)
        for p in planes
    ]
    rgb = image.double().numpy()
    if layout.alpha:
        assert np.abs(values[3] - rgb[..., 3] * top).max() <= 0.51
    if layout.rgb:
        assert np.abs(np.stack([values[2], values[0], values[1]], -1) - rgb[..., :3] * top).max() <= 0.51
        return
    luma = rgb[..., :3] @ [0.2126, 0.7152, 0.0722]
    scale = 1 << (layout.bits - 8)
    assert np.abs(values[0] - scale * (16 + 219 * luma)).max() <= 0.51
    columns, rows = layout.chroma
    sited = rgb[0::2, :, :3] / 2 + rgb[1::2, :, :3] / 2 if rows == 2 else rgb[..., :3]
    if columns == 2:
        left = np.concatenate((sited[:, :1], sited[:, 1:-1:2]), 1)
        sited = (left + 2 * sited[:, 0::2] + sited[:, 1::2]) / 4
    sited_luma = sited @ [0.2126, 0.7152, 0.0722]
    assert np.abs(values[1] - scale * (128 + 224 * (sited[..., 2] - sited_luma) / 1.8556)).max() <= 0.52
    assert np.abs(values[2] - scale * (128 + 224 * (sited[..., 0] - sited_luma) / 1.5748)).max() <= 0.52


@pytest.mark.parametrize("name", ["hevc-mp4", "av1-mp4", "vp9-webm", "prores422-mov", "webp", "gif"])
def test_quality_orders_size_and_fidelity(tmp_path, name):
    noise = torch.rand(6, 96, 160, 3, generator=torch.Generator().manual_seed(1)) * 0.2
    images = clip(6) * 0.8 + noise
    sizes, fidelities = [], []
    for quality in QUALITIES:
        path = save(tmp_path / f"{quality}{SUFFIX[name]}", images, quality=quality, video_format=FORMATS[name]).path
        sizes.append(path.stat().st_size)
        soft = np.array(pictures(path, name))[..., :3].reshape(6, 24, 4, 40, 4, 3).mean((2, 4))  # dither averages out
        fidelities.append(psnr(soft, images.double().numpy().reshape(6, 24, 4, 40, 4, 3).mean((2, 4))))
    assert sizes == sorted(sizes) or (name == "gif" and sizes[0] == min(sizes) and sizes[-1] == max(sizes))
    assert all(later > earlier - 0.3 for earlier, later in pairwise(fidelities))
    assert fidelities[-1] > fidelities[0] + 1


# ---- length, tags, sound


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("fps", [23.976, 12.5])
def test_ffprobe_reads_rate_length_and_colours(tmp_path, name, fps):
    video = write(tmp_path, name, clip(25), fps=fps, audio=tone(3, 48000))
    report = probe(video.path)
    stream, sound = report["streams"]
    codec, tag, profile, pixels = STREAMS[name]
    assert (stream["codec_name"], stream["codec_tag_string"], stream["profile"], stream["pix_fmt"]) == (
        codec, tag, profile, pixels,
    )  # fmt: skip
    colors = [stream[key] for key in ("color_space", "color_primaries", "color_transfer", "color_range")]
    assert colors == ["bt709", "bt709", "bt709", "tv"]
    assert Fraction(stream["r_frame_rate"]) == video.fps
    with av.open(str(video.path)) as container:
        clock = container.streams.video[0].time_base
        times = sorted(packet.pts * clock for packet in container.demux(video=0) if packet.size)
    exact = [index / video.fps for index in range(25)]
    if name == "vp9-webm":  # Matroska's clock counts milliseconds
        assert all(abs(time - wanted) <= Fraction(1, 2000) for time, wanted in zip(times, exact, strict=True))
        assert abs(float(report["format"]["duration"]) - float(video.duration)) < 0.021
        return
    assert times == exact
    assert int(stream["nb_frames"]) == 25
    assert abs(Fraction(stream["duration"]) - video.duration) < Fraction(1, 10**6)
    assert abs(float(sound["duration"]) - float(video.duration)) < 0.03


@pytest.mark.parametrize(
    ("name", "codec"),
    [(name, encoding.name) for name in CONTAINERS for encoding in FORMATS[name].audio],
)
def test_sound_stays_with_its_picture(tmp_path, name, codec):
    codecs = {"aac": "aac", "opus": "opus", "pcm": "pcm_s24le"}
    video = write(tmp_path, name, clip(48), fps=24, audio=tone(3, 44100, start=1.0), audio_codec=codec)
    with av.open(str(video.path)) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.codec.canonical_name == codecs[codec]
        frames = list(container.decode(stream))
    samples = np.concatenate([av.AudioResampler("fltp").resample(frame)[0].to_ndarray() for frame in frames], 1)[0]
    onset = float(frames[0].pts * frames[0].time_base) + np.argmax(np.abs(samples) > 0.2) / frames[0].sample_rate
    assert abs(onset - 1.0) < 1 / 24
    assert abs(samples.size / frames[0].sample_rate - 2) < 0.05


@pytest.mark.parametrize("name", ["gif", "webp"])
@pytest.mark.parametrize(("loops", "shown"), [(None, 0), (3, 3)])
def test_animated_pictures_keep_time_and_loop(tmp_path, name, loops, shown):
    video = write(tmp_path, name, clip(16), fps=Fraction(16), loops=loops)
    with Image.open(video.path) as image:
        assert image.n_frames == 16
        durations = []
        for index in range(16):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
        assert image.info["loop"] == (shown + (name == "webp") * bool(shown))
    assert sum(durations) == 1000
    assert set(durations) <= ({60, 70} if name == "gif" else {62, 63})


def test_a_gif_above_50_frames_a_second_keeps_its_length(tmp_path, caplog):
    with caplog.at_level("INFO"):
        video = write(tmp_path, "gif", clip(60), fps=60)
    assert (video.frames, video.fps) == (50, 50)
    assert any("50 of 60 frames are kept" in record.getMessage() for record in caplog.records)
    with Image.open(video.path) as image:
        assert image.n_frames == 50


def test_gifs_of_streams_have_a_palette_for_each_frame(tmp_path):
    """A stream cannot be read twice; its frames come back as well as those of a clip."""
    images = clip(6)
    video = write(tmp_path, "gif", iter(images))
    frames = pictures(video.path, "gif")
    assert [number_in(frame[..., :3]) for frame in frames] == list(range(6))
    worst = min(psnr(frame[18:, :, :3], image[18:].numpy()) for frame, image in zip(frames, images.double()))
    assert worst > FLOORS["gif"]


# ---- metadata


@pytest.mark.parametrize("name", ["webp", "png-8bit", "png-16bit"])
def test_pictures_carry_the_workflow(tmp_path, name):
    tags = workflow_tags({"1": {"text": "a fox } 狐"}}, {"workflow": {"nodes": ["x" * 70_000]}, "other": 3})
    path = write(tmp_path, name, metadata=tags).path
    if path.is_dir():
        for file in path.iterdir():
            with Image.open(file) as image:
                assert image.text == tags
        return
    with Image.open(path) as image:
        texts = dict(value.rstrip("\0").split(":", 1) for value in image.getexif().values())
    assert texts == tags


def test_json_has_no_braces_inside_strings():
    value = {"a": 'x { "}" \\{ \\" }', "b{": [1.5, None, "狐"], "c": "\\"}
    text = plain_json(value)
    assert json.loads(text) == value and text.isascii()
    assert text.count("{") == text.count("}") == 1


def test_exif_without_tags_is_left_out(tmp_path):
    assert exif({}) == b""
    data = write(tmp_path, "webp").path.read_bytes()
    assert b"EXIF" not in data and data[20] & 0x08 == 0
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8


# ---- user formats


def test_a_dropped_file_adds_a_format(tmp_path):
    """An MKV of lossless FFV1 with FLAC, which the pack does not ship."""
    encoder = {"name": "ffv1", "options": {"level": "3"}, "qualities": {quality: {} for quality in QUALITIES}}
    fields = {
        "container": "matroska", "suffix": ".mkv", "preview": "copy",
        "video": {"pixel_format": "yuv444p10le", "color_space": "bt709", "odd_sizes": True, "encoders": [encoder]},
        "audio": [{"name": "flac", "encoder": "flac"}],
    }  # fmt: skip
    (tmp_path / "ffv1-mkv.json").write_text(json.dumps(fields))
    (tmp_path / "h264-mp4.json").write_text(json.dumps(fields | {"suffix": ".mine"}))
    formats = load_formats(Path(__file__).parents[2] / "video" / "formats", tmp_path, tmp_path / "missing")
    assert next(iter(formats)) == "h264-mp4" and formats["h264-mp4"].suffix == ".mine"
    assert formats.keys() == FORMATS.keys() | {"ffv1-mkv"}
    video = save(tmp_path / "a.mkv", clip(4), video_format=formats["ffv1-mkv"], audio=tone(1, 44100))
    frames = pictures(video.path, "h264-mp4")
    assert min(psnr(f[18:], i[18:].numpy()) for f, i in zip(frames, clip(4).double(), strict=True)) > 55
    assert [stream["codec_name"] for stream in probe(video.path)["streams"]] == ["ffv1", "flac"]


@pytest.mark.parametrize("name", FORMATS)
def test_videotoolbox_then_its_software_then_the_others(name, tmp_path, caplog, monkeypatch):
    """On a Mac whose VideoToolbox refuses, as here, each step down is one log line."""
    monkeypatch.setattr("sys.platform", "darwin")
    labels = [encoder.label for encoder in FORMATS[name].encoders_here()]
    hardware = [label for label in labels if "videotoolbox" in label]
    expected = {"h264-mp4": "h264", "hevc-mp4": "hevc", "hevc-10bit-mp4": "hevc"}.get(
        name, name.startswith("prores") and "prores"
    )
    assert hardware == ([f"{expected}_videotoolbox", f"{expected}_videotoolbox allow_sw=1"] if expected else [])
    assert labels[: len(hardware)] == hardware and len(labels) > len(hardware)
    allowed = [encoder.options.get("allow_sw") for encoder in FORMATS[name].encoders_here()]
    assert allowed == ([None, "1"] if hardware else []) + [None] * (len(labels) - len(hardware))
    video = write(tmp_path, name, clip(2))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.split(" failed")[0] for line in lines] == hardware
    assert all(line.endswith(f"; trying {label}.") for line, label in zip(lines, labels[1:]))
    assert video.encoder == labels[len(hardware)]
    caplog.clear()
    save(tmp_path / f"software{SUFFIX[name]}", clip(2), video_format=FORMATS[name], software_only=True)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_encoder_options_outdo_the_quality(tmp_path):
    big = write(tmp_path, "h264-mp4", quality="small", encoder_options={"crf": "2", "preset": "ultrafast"})
    small = save(tmp_path / "b.mp4", quality="best", video_format=FORMATS["h264-mp4"], encoder_options={"crf": "40"})
    assert big.path.stat().st_size > 2 * small.path.stat().st_size
