"""Colours of decoded frames against float64 formulas written here: matrices, ranges, depths, HDR, alpha, turns."""

import logging
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from apple_silicon_video.tests.video_fixtures import FIXTURES
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.clips import mask
from apple_silicon_video.video import decode_convert, tone_mapping
from apple_silicon_video.video.decode_color import PictureColor, picture_color, reference_rgb
from apple_silicon_video.video.decode_convert import FrameConverter, Orientation, PictureFormat
from apple_silicon_video.video.geometry import FrameSize, Placement
from apple_silicon_video.video.media_info import ColorTags
from apple_silicon_video.video.reader import FrameSelection, open_video

# Red and blue weights of ITU-R BT.601, BT.709 and BT.2020.
WEIGHTS = {"smpte170m": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}
ROUNDED = 0.52 / 255  # half a level of an 8-bit result
EXACT = 0.02 / 255
FORMATS = {
    "yuv420p": (2, 2, 8),
    "yuv422p": (2, 1, 8),
    "yuv444p": (1, 1, 8),
    "yuv420p10le": (2, 2, 10),
    "yuv422p10le": (2, 1, 10),
    "yuv444p12le": (1, 1, 12),
    "yuva420p": (2, 2, 8),
    "yuva444p10le": (1, 1, 10),
    "gray": (0, 0, 8),
}


def random_frame(pixel_format, width=96, height=80, full=False):
    """A frame of noise within its range, and its planes."""
    columns, rows, bits = FORMATS[pixel_format]
    generator, unit = np.random.default_rng(0), 1 << (bits - 8)
    low, high = (0, 256 * unit) if full else (16 * unit, 236 * unit)
    planes = [generator.integers(low, high, (height, width))]
    if columns:
        size = (-(-height // rows), -(-width // columns))
        planes += [generator.integers(96 * unit, 160 * unit, size) for _ in range(2)]
    if pixel_format.startswith("yuva"):
        planes.append(generator.integers(0, 256 * unit, (height, width)))
    frame = av.VideoFrame(width, height, pixel_format)
    frame.time_base = Fraction(1, 24)
    kind = np.uint8 if bits == 8 else np.uint16
    for plane, values in zip(frame.planes, planes):
        padded = np.zeros((values.shape[0], plane.line_size // kind().itemsize), kind)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    return frame, planes


def upsample(chroma, columns, rows, height, width):
    """Linear, from sites on the left column and midway between rows, by coordinates."""

    def at(values, positions):
        low = np.clip(np.floor(positions).astype(int), 0, len(values) - 1)
        high = np.clip(low + 1, 0, len(values) - 1)
        part = np.clip(positions, 0, len(values) - 1) - low
        return values[low] * (1 - part)[:, None] + values[high] * part[:, None]

    chroma = chroma.astype(np.float64)
    if rows == 2:
        chroma = at(chroma, (np.arange(height) - 0.5) / 2)
    if columns == 2:
        chroma = at(chroma.T, np.arange(width) / 2).T
    return chroma


def expected_rgb(planes, pixel_format, matrix, full):
    columns, rows, bits = FORMATS[pixel_format]
    unit, top = 1 << (bits - 8), (1 << bits) - 1
    height, width = planes[0].shape
    luma = planes[0] / top if full else (planes[0] - 16 * unit) / (219 * unit)
    if not columns:
        return np.repeat(luma[..., None], 3, 2)
    blue, red = (
        (upsample(plane, columns, rows, height, width) - 128 * unit) / (top if full else 224 * unit)
        for plane in planes[1:3]
    )
    kr, kb = WEIGHTS[matrix]
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return np.clip(np.stack((r, (luma - kr * r - kb * b) / (1 - kr - kb), b), -1), 0, 1)


def convert(frame, picture, place=None, alpha=False):
    place = place or Placement(frame.width, frame.height, frame.width, frame.height)
    rgb = np.empty((place.height, place.width, 3), np.float32)
    mask = np.empty(rgb.shape[:2], np.float32) if alpha else None
    FrameConverter(picture, place, alpha).convert(frame, rgb, mask)
    return rgb, mask


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_every_matrix_range_and_depth(pixel_format, matrix, full, caplog):
    frame, planes = random_frame(pixel_format, full=full)
    alpha = pixel_format.startswith("yuva")
    rgb, mask = convert(frame, PictureFormat(PictureColor(matrix, full), alpha), alpha=alpha)
    deep = FORMATS[pixel_format][2] > 8
    expected = expected_rgb(planes, pixel_format, matrix, full)
    assert np.abs(rgb - expected).max() < (EXACT if deep else ROUNDED)
    assert not caplog.records
    if alpha:
        assert np.abs(mask - planes[3] / planes[3].max()).max() < ROUNDED


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_plain_formulas_are_the_same(pixel_format):
    for full in (False, True):
        frame, planes = random_frame(pixel_format, full=full)
        rgb = reference_rgb(frame, PictureColor("bt709", full)).permute(1, 2, 0).numpy()
        assert np.abs(rgb - expected_rgb(planes, pixel_format, "bt709", full)).max() < 1e-9


@pytest.mark.parametrize("size", [(97, 80), (96, 81), (65, 49)])
def test_odd_sides(size, caplog):
    frame, planes = random_frame("yuv420p", *size)
    rgb, _ = convert(frame, PictureFormat(PictureColor("bt709", False)))
    assert np.abs(rgb - expected_rgb(planes, "yuv420p", "bt709", False)).max() < ROUNDED
    assert not caplog.records


def test_disagreeing_scaler_is_replaced_with_one_log_line(monkeypatch, caplog):
    """As with a libswscale that ignores the matrix."""
    frame, planes = random_frame("yuv420p")
    build = FrameConverter._build

    def wrong(self, *arguments):
        right = self._picture
        self._picture = PictureFormat(PictureColor("smpte170m", True))
        graph = build(self, *arguments)
        self._picture = right
        return graph

    monkeypatch.setattr(FrameConverter, "_build", wrong)
    converter = FrameConverter(PictureFormat(PictureColor("bt709", False)), Placement(96, 80, 96, 80), False)
    rgb = np.empty((80, 96, 3), np.float32)
    for _ in range(3):
        converter.convert(frame, rgb)
    assert np.abs(rgb - expected_rgb(planes, "yuv420p", "bt709", False)).max() < EXACT
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "is off by" in caplog.text


@pytest.mark.parametrize(
    ("tags", "pixel_format", "codec", "size", "expected"),
    [
        (ColorTags(), "yuv420p", "h264", (720, 576), ("smpte170m", False)),
        (ColorTags(), "yuv420p", "h264", (720, 578), ("bt709", False)),
        (ColorTags(), "yuv420p", "h264", (1280, 536), ("bt709", False)),
        (ColorTags(matrix="bt709"), "yuv420p", "h264", (64, 64), ("bt709", False)),
        (ColorTags(matrix="bt470bg", range="pc"), "yuv420p", "h264", (1920, 1080), ("smpte170m", True)),
        (ColorTags(range="tv"), "yuvj420p", "h264", (64, 64), ("smpte170m", False)),
        (ColorTags(), "yuvj420p", "mjpeg", (4000, 3000), ("smpte170m", True)),
        (ColorTags(matrix="bt2020c"), "yuv420p10le", "hevc", (64, 64), ("bt2020nc", False)),
        (ColorTags(matrix="bt709", range="tv"), "gbrp", "h264", (64, 64), ("rgb", True)),
    ],
)
def test_what_tags_and_their_absence_mean(tags, pixel_format, codec, size, expected):
    color = picture_color(tags, pixel_format, codec, *size)
    assert (color.matrix, color.full_range) == expected


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_and_mirrored(turns, mirrored):
    frame, _ = random_frame("yuv444p")
    picture = PictureFormat(PictureColor("bt709", False))
    plain, _ = convert(frame, picture)
    turned = PictureFormat(picture.color, orientation=Orientation(turns, mirrored))
    size = (80, 96) if turns % 2 else (96, 80)
    rgb, _ = convert(frame, turned, FrameSize().place(*size))
    flipped = plain[:, ::-1] if mirrored else plain
    assert np.array_equal(rgb, np.rot90(flipped, -turns))


def test_cropped_and_padded_places():
    frame, _ = random_frame("yuva420p")
    picture = PictureFormat(PictureColor("bt709", False), alpha=True)
    whole, whole_mask = convert(frame, picture, alpha=True)
    rgb, mask = convert(frame, picture, Placement(64, 112, 96, 80, -16, 16), alpha=True)
    assert np.array_equal(rgb[16:96], whole[:, 16:80]) and np.array_equal(mask[16:96], whole_mask[:, 16:80])
    assert not rgb[:16].any() and not rgb[96:].any() and not mask[:16].any() and not mask[96:].any()


def test_ten_bits_are_kept():
    """Neighbouring levels of 10 bits stay apart and evenly spaced."""
    frame = av.VideoFrame(1024, 8, "yuv444p10le")
    frame.time_base = Fraction(1)
    levels = np.tile(np.arange(1024, dtype=np.uint16), (8, 1))
    for plane, values in zip(frame.planes, (levels, np.full_like(levels, 512), np.full_like(levels, 512))):
        plane.update(values.tobytes())
    rgb, _ = convert(frame, PictureFormat(PictureColor("bt709", True)))
    assert np.abs(rgb[0, :, 1] - np.arange(1024) / 1023).max() < EXACT


@pytest.mark.parametrize("name", ["alpha.webm", "alpha.mov"])
def test_alpha_of_files(video_files, name):
    with open_video(video_files(name)) as video:
        images, alpha = video.read_images(FrameSelection(limit=3))
        both = video.read(FrameSelection(limit=3), alpha=True)
    assert torch.equal(both[..., :3], images) and torch.equal(both[..., 3], alpha) and images.is_contiguous()
    expected = torch.from_numpy(mask(*FIXTURES[name].size))
    assert float((alpha - expected).abs().mean()) < 0.01 and float((alpha[:, :28] - 1).abs().max()) < 0.02


def test_no_alpha_is_opaque(video_files):
    with open_video(video_files("h264.mp4")) as video:
        assert video.read_images([0])[1] is None and float(video.read([0], alpha=True)[..., 3].min()) == 1


def test_pq_is_bt2100s():
    """Code values of ITU-R BT.2100 and BT.2408: 100 cd/m2 is 0.508, 203 is 0.581, 1000 is 0.752."""
    nits = torch.tensor([0.0, 100.0, 203.0, 1000.0, 10000.0], dtype=torch.float64)
    assert torch.allclose(
        tone_mapping.nits_to_pq(nits)[1:], torch.tensor([0.508, 0.581, 0.752, 1.0]).double(), atol=6e-4
    )
    assert torch.allclose(tone_mapping.pq_to_nits(tone_mapping.nits_to_pq(nits)), nits, atol=1e-6)


def test_hlg_is_bt2100s():
    """Reference white, 75 percent, is 203 cd/m2 on a display of 1000; the peak is 1000 (ITU-R BT.2408, table 1)."""
    code = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64)
    nits = tone_mapping.hlg_to_nits(code.expand(3, 3))
    assert torch.allclose(nits[0], torch.tensor([0.0, 203.0, 1000.0]).double(), atol=1.5)


def test_tone_curve_is_bt2390s():
    nits = torch.linspace(0, 1000, 2001, dtype=torch.float64)
    out = tone_mapping.compress(nits)
    assert (out.diff() > 0).all() and abs(float(out[-1]) - 203) < 1e-6
    dark = nits < 60
    assert torch.allclose(out[dark], nits[dark], atol=1e-9)
    scale = tone_mapping.nits_to_pq(torch.tensor([1000.0, 203.0, 400.0]).double())
    largest, value = float(scale[1] / scale[0]), float(scale[2] / scale[0])
    knee = 1.5 * largest - 0.5
    t = (value - knee) / (1 - knee)
    hermite = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * largest
    expected = tone_mapping.pq_to_nits(torch.tensor(hermite).double() * scale[0])
    assert float(out[800]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", tone_mapping.TO_NITS)
def test_sdr_of_gray_stays_gray_and_order_is_kept(kind):
    code = torch.linspace(0, 1, 101).expand(3, 1, 101)
    sdr = tone_mapping.to_sdr(code, kind)
    assert float((sdr[0] - sdr[1]).abs().max()) < 2e-3 and (sdr[1, 0].diff() >= 0).all()
    assert float(sdr[1, 0, 0]) == 0 and float(sdr[1, 0, -1]) == pytest.approx(1, abs=1e-3)
    white = {"pq": 58, "hlg": 75}[kind]
    assert 0.75 < float(sdr[1, 0, white]) < 0.95


@pytest.mark.parametrize("name", ["pq.mp4", "hlg.mp4"])
def test_hdr_files_are_tone_mapped(video_files, name):
    """The decoded code values through the formulas, in float64."""
    with av.open(str(video_files(name))) as container:
        frame = next(container.decode(video=0))
    code = reference_rgb(frame, PictureColor("bt2020nc", False))
    with open_video(video_files(name)) as video:
        kind, image = video.info.hdr, video.read([0])[0]
    expected = tone_mapping.to_sdr(code, kind).permute(1, 2, 0)
    assert float((image - expected).abs().max()) < 2 / 255


@pytest.mark.parametrize(
    "name", ["bt601.mp4", "full_range.mp4", "h264.mp4", "hevc_10bit.mp4", "vp9.webm", "prores.mov"]
)
def test_files_are_converted_by_their_tags(video_files, name):
    fixture = FIXTURES[name]
    with av.open(str(video_files(name))) as container:
        frame = next(container.decode(video=0))
    expected = reference_rgb(frame, PictureColor(fixture.matrix, fixture.full_range)).permute(1, 2, 0)
    with open_video(video_files(name)) as video:
        image = video.read([0])[0].double()
    assert float((image - expected).abs().max()) < ROUNDED


def test_scaled_frames_are_those_of_a_good_scaler(video_files):
    """FFmpeg's bicubic scaling of Y'CbCr against torch's antialiased one of the exact R'G'B'."""
    with open_video(video_files("h264.mp4")) as video:
        whole = video.read([3]).permute(0, 3, 1, 2)
        small = video.read([3], size=FrameSize(32, 48))
    expected = torch.nn.functional.interpolate(whole, (48, 32), mode="bicubic", antialias=True).clamp(0, 1)
    error = (small.permute(0, 3, 1, 2) - expected).square().mean()
    assert float(-10 * error.log10()) > 35


def test_the_check_looks_at_a_part_of_large_frames_only():
    frame, _ = random_frame("yuv420p", 64, 4 * decode_convert.CHECKED_ROWS)
    assert reference_rgb(frame, PictureColor("bt709", False), rows=decode_convert.CHECKED_ROWS).shape[1] == 64
