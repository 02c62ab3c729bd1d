"""Save Video's numeric layer: what is written is read back by PyAV, by float64 formulas and by a parser of our own."""

import logging
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from apple_silicon_video.tests.unit.video_clips import (
    AAC_FRAME,
    DEVICES,
    SOFTWARE,
    clip,
    decode,
    leftovers,
    number_in,
    psnr,
    save,
    tone,
)
from apple_silicon_video.video.audio import audio_clip
from apple_silicon_video.video.color import COLOR_SPACES
from apple_silicon_video.video.encoding import frame_rate, picture_size
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.pixel_formats import fill
from apple_silicon_video.video.video_formats import QUALITIES

# ---- pictures


@pytest.mark.parametrize(
    ("fps", "exact"),
    [(23.976, Fraction(24000, 1001)), (16.0, Fraction(16)), (12.5, Fraction(25, 2)), (7.3, Fraction(73, 10))],
)
def test_round_trip(tmp_path, fps, exact):
    images = clip(25)
    video = save(tmp_path / "clip.mp4", images, fps=fps)
    assert (video.width, video.height, video.frames, video.fps) == (160, 96, 25, exact)
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == 25
        assert stream.average_rate == exact
        assert stream.duration * stream.time_base == video.duration == 25 / exact
        assert stream.start_time == 0
        context = stream.codec_context
        assert (context.width, context.height, context.pix_fmt) == (160, 96, "yuv420p")
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        assert times == [index / exact for index in range(25)]
    pictures = decode(video.path)
    assert [number_in(picture) for picture in pictures] == list(range(25))
    assert min(psnr(p[16:], image[16:].numpy()) for p, image in zip(pictures, images.double())) > 38
    assert leftovers(tmp_path) == ["clip.mp4"]


def test_colour_bars_keep_their_colours(tmp_path):
    bars = torch.tensor([[r, g, b] for r in (0, 0.75, 1) for g in (0, 0.75, 1) for b in (0, 0.75, 1)])
    image = bars.repeat_interleave(16, 0)[None].expand(64, -1, -1)[None].expand(3, -1, -1, -1)
    path = save(tmp_path / "bars.mp4", image, quality="best").path
    inside = slice(4, -4)
    for picture in decode(path):
        columns = picture[inside].reshape(-1, 27, 16, 3)[:, :, inside]
        assert np.abs(columns.mean((0, 2)) - bars.numpy()).max() < 3 / 255
    with av.open(str(path)) as container:  # FFmpeg's own conversion; PyAV before 17 ignores the tags and equal spaces
        decoded = next(container.decode(video=0))
        frame = decoded.to_ndarray(format="rgb24", src_colorspace="ITU709", dst_colorspace="ITU601")
    columns = frame[inside].reshape(-1, 27, 16, 3)[:, :, inside].astype(np.float64)
    assert np.abs(columns.mean((0, 2)) - bars.numpy() * 255).max() < 4


def reference_yuv420(rgb: np.ndarray) -> np.ndarray:
    """BT.709 limited range in float64: chroma between two rows, on the left column of each pair."""
    rgb = np.pad(rgb, ((0, rgb.shape[0] % 2), (0, rgb.shape[1] % 2), (0, 0)), mode="edge")
    luma = rgb @ [0.2126, 0.7152, 0.0722]
    rows = (rgb[0::2] + rgb[1::2]) / 2
    padded = np.pad(rows, ((0, 0), (1, 0), (0, 0)), mode="edge")
    sited = (padded[:, 0:-1:2] + 2 * padded[:, 1::2] + padded[:, 2::2]) / 4
    sited_luma = sited @ [0.2126, 0.7152, 0.0722]
    blue = 128 + 224 * (sited[..., 2] - sited_luma) / 1.8556
    red = 128 + 224 * (sited[..., 0] - sited_luma) / 1.5748
    return np.concatenate([(16 + 219 * luma).ravel(), blue.ravel(), red.ravel()])


def yuv420(frame: torch.Tensor) -> tuple[np.ndarray, bool]:
    """The planes of one frame, one after another, and whether it held NaN."""
    height, width = frame.shape[:2]
    picture = av.VideoFrame(width + width % 2, height + height % 2, "yuv420p")
    had_nan = fill(picture, frame, COLOR_SPACES["bt709"])
    return picture.to_ndarray(), had_nan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("height", "width"), [(149, 37), (2, 2), (1, 1), (144, 64), (74, 5)])
def test_conversion_rounds_the_formula_once(height, width, device):
    frame = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height))
    planes, had_nan = yuv420(frame.to(device))
    assert not had_nan
    error = np.abs(planes.ravel() - reference_yuv420(frame.double().numpy()))
    assert error.max() <= 0.5 + 1e-4


def test_conversion_spans_exactly_the_limited_range():
    planes, _ = yuv420(torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat_interleave(8)[None, :, None].expand(2, -1, 3))
    assert np.unique(planes[:2]).tolist() == [16, 235]
    assert np.unique(planes[2:]).tolist() == [128]
    primaries = (
        torch.tensor([[0.0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]]).repeat_interleave(4, 0)[None].expand(2, -1, -1)
    )
    chroma = yuv420(primaries)[0][2:]
    assert (chroma.min(), chroma.max()) == (16, 240)


def test_quality_orders_size_and_fidelity(tmp_path):
    noise = torch.rand(8, 96, 160, 3, generator=torch.Generator().manual_seed(1)) * 0.2
    images = clip(8) * 0.8 + noise
    sizes, fidelities = [], []
    for quality in QUALITIES:
        path = save(tmp_path / f"{quality}.mp4", images, quality=quality, video_format=SOFTWARE).path
        sizes.append(path.stat().st_size)
        luma = [image @ [0.2126, 0.7152, 0.0722] for image in (np.array(decode(path)), images.double().numpy())]
        fidelities.append(psnr(*luma))
    assert sizes == sorted(sizes) and fidelities == sorted(fidelities)
    assert fidelities[1] > 33 and fidelities[-1] > 45


@pytest.mark.parametrize(("height", "width"), [(97, 161), (96, 161), (97, 160), (1, 1)])
def test_odd_sides_repeat_their_edge(tmp_path, caplog, height, width):
    images = clip(3, max(height, 16), max(width, 16))[:, :height, :width]
    with caplog.at_level(logging.INFO):
        video = save(tmp_path / "odd.mp4", images, quality="best")
    assert (video.width, video.height) == (width + width % 2, height + height % 2)
    assert len([r for r in caplog.records if f"{width}x{height} became" in r.getMessage()]) == 1
    picture = decode(video.path)[1]
    assert picture.shape[:2] == (video.height, video.width)
    wanted = np.pad(images[1].double().numpy(), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert psnr(picture @ [0.2126, 0.7152, 0.0722], wanted @ [0.2126, 0.7152, 0.0722]) > 40


def test_one_frame(tmp_path):
    video = save(tmp_path / "one.mp4", clip(1), fps=16)
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.duration * stream.time_base) == (1, Fraction(1, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_and_alpha(tmp_path, caplog, dtype):
    images = torch.cat((clip(4), torch.zeros(4, 96, 160, 1)), -1).to(dtype)
    with caplog.at_level(logging.INFO):
        path = save(tmp_path / "alpha.mp4", images).path
    assert [number_in(picture) for picture in decode(path)] == [0, 1, 2, 3]
    assert len([r for r in caplog.records if "alpha" in r.getMessage()]) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_nan_is_black_and_told_once(tmp_path, caplog, device):
    images = torch.full((6, 96, 160, 3), 0.5)
    images[2:4, 40:80] = float("nan")
    images[5, 0, 0, 0] = float("inf")
    path = save(tmp_path / "nan.mp4", images.to(device)).path
    assert [r.getMessage() for r in caplog.records] == [
        "nan.mp4: 2 frames hold NaN, from frame 2 on; those pixels are saved as black."
    ]
    pictures = decode(path)
    assert abs(pictures[3][44:76].mean()) < 0.02 and abs(pictures[4][44:76].mean() - 0.5) < 0.02


@pytest.mark.parametrize("fps", [23.976, 23.98, 24000 / 1001])
def test_film_rate(fps):
    assert frame_rate(fps) == Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (119.88, Fraction(120000, 1001)),
        (14.985, Fraction(15000, 1001)),
        (24.0, Fraction(24)),
        (25, Fraction(25)),
        (30, Fraction(30)),
        (23.5, Fraction(47, 2)),
        (16.666667, Fraction(50, 3)),
        (0.01, Fraction(1, 100)),
        (1e-9, Fraction(1, 1000)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
    ],
)
def test_rates_are_exact(fps, exact):
    assert frame_rate(fps) == exact


# ---- sound


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"),
    [
        (44100, 2, 5.0),
        (48000, 1, 5.0),
        (22050, 2, 5.0),
        (8000, 2, 5.0),
        (192000, 2, 3.0),
        (7000, 1, 3.0),
        (48000, 6, 5.0),
        (48000, 2, 0.5),
    ],
)
def test_sound_is_cut_to_the_video(tmp_path, rate, channels, seconds):
    video = save(tmp_path / "sound.mp4", clip(25), fps=23.976, audio=tone(seconds, rate, channels))
    assert video.has_audio
    with av.open(str(video.path)) as container:
        stream = container.streams.audio[0]
        wanted = min(seconds, float(video.duration))
        assert abs(float(stream.duration * stream.time_base) - wanted) <= AAC_FRAME / stream.rate
        assert abs(container.duration / av.time_base - float(video.duration)) < AAC_FRAME / stream.rate
        assert stream.codec_context.layout.nb_channels == channels
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], 1)
    for channel in {*range(channels)} - {3}:  # the fourth is the low-frequency one
        spectrum = np.abs(np.fft.rfft(samples[channel] * np.hanning(samples.shape[1])))
        assert abs(spectrum.argmax() * stream.rate / samples.shape[1] - (200 + 100 * channel)) < 5


def test_sound_starts_with_its_frame(tmp_path):
    video = save(tmp_path / "sync.mp4", clip(48), fps=24, audio=tone(3, 48000, start=1.0))
    with av.open(str(video.path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
    first = float(frames[0].pts * frames[0].time_base)
    samples = np.abs(np.concatenate([frame.to_ndarray() for frame in frames], 1)[0])
    assert abs(first + np.argmax(samples > 0.2) / stream.rate - 1.0) < 1 / 24


def test_sound_with_nan_and_overshoot_is_tamed(tmp_path):
    audio = tone(1, 48000)
    audio["waveform"] = audio["waveform"] * 4
    audio["waveform"][0, :, 1000] = float("nan")
    samples = audio_clip(audio).frame(0, 48000).to_ndarray()
    assert (samples.min(), samples.max()) == (-1, 1) and np.isfinite(samples).all()
    path = save(tmp_path / "loud.mp4", clip(12), audio=audio).path
    with av.open(str(path)) as container:
        assert all(np.isfinite(frame.to_ndarray()).all() for frame in container.decode(audio=0))


def test_empty_sound_is_left_out(tmp_path):
    video = save(tmp_path / "mute.mp4", audio={"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100})
    assert not video.has_audio
    with av.open(str(video.path)) as container:
        assert not container.streams.audio


# ---- metadata


def boxes(data: bytes, start: int, stop: int):
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, start + 8)[0], 16
        yield kind, start + head, start + size
        start += size


def container_tags(data: bytes) -> dict[str, str]:
    """The tags where ComfyUI's front end looks for them: moov/udta/meta with keys and ilst, within 64 MiB."""
    span = (0, min(len(data), 64 << 20))
    for wanted in (b"moov", b"udta", b"meta"):
        span = next((start, stop) for kind, start, stop in boxes(data, *span) if kind == wanted)
    inside = {kind: (start, stop) for kind, start, stop in boxes(data, span[0] + 4, span[1])}
    keys_start, keys_stop = inside[b"keys"]
    names = [data[start:stop].decode() for _, start, stop in boxes(data, keys_start + 8, keys_stop)]
    tags = {}
    for index, start, stop in boxes(data, *inside[b"ilst"]):
        value = next((s, e) for kind, s, e in boxes(data, start, stop) if kind == b"data")
        tags[names[struct.unpack(">I", index)[0] - 1]] = data[value[0] + 8 : value[1]].decode()
    return tags


def test_metadata_comes_back(tmp_path):
    tags = {
        "prompt": '{"1": {"text": "a fox, 狐, \\u0000"}}',
        "workflow": '{"nodes": ["' + "x" * 300_000 + '"]}',
        "other": "3",
    }
    path = save(tmp_path / "tags.mp4", metadata=tags).path
    with av.open(str(path)) as container:
        assert tags.items() <= dict(container.metadata).items()
    assert tags.items() <= container_tags(path.read_bytes()).items()


def test_the_index_lies_in_front(tmp_path):
    data = save(tmp_path / "front.mp4").path.read_bytes()
    assert [kind for kind, _, _ in boxes(data, 0, len(data)) if kind in (b"moov", b"mdat")] == [b"moov", b"mdat"]
    assert data.count(b"colrnclx" + struct.pack(">HHH", 1, 1, 1)) == 1


# ---- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": torch.zeros(0, 8, 8, 3)}, "no frames"),
        ({"frames": iter(())}, "no frames"),
        ({"frames": torch.zeros(8, 8, 3)}, "connect an IMAGE output"),
        ({"frames": torch.zeros(2, 8, 8, 1)}, "connect an IMAGE output"),
        ({"frames": torch.zeros(2, 0, 8, 3)}, "connect an IMAGE output"),
        ({"frames": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, "connect an IMAGE output"),
        ({"frames": [torch.zeros(8, 8, 3), torch.zeros(8, 10, 3)]}, "Frame 1 is 10x8 and the first one 8x8"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"quality": "great"}, "'great' is none of"),
        ({"audio": {"waveform": torch.zeros(2, 100), "sample_rate": 44100}}, "connect an AUDIO output"),
        ({"audio": {"waveform": torch.zeros(1, 7, 100), "sample_rate": 44100}}, "7 channels"),
        ({"audio": {"waveform": torch.zeros(1, 2, 100), "sample_rate": 0}}, "connect an AUDIO output"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, options, words):
    with pytest.raises(VideoError, match=words) as caught:
        save(tmp_path / "bad.mp4", **options)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_picture_size_refuses_a_list():
    with pytest.raises(VideoError, match="list"):
        picture_size([1])
