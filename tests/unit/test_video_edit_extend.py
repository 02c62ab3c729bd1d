"""Clips joined with an overlap: numbers and sound across the seams, the fade's light, colour matching, refusals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from apple_silicon_video.tests.video_fixtures import read_number, read_time
from apple_silicon_video.tests.video_fixtures.numbered_picture import picture
from apple_silicon_video.tests.video_fixtures.sound import PITCH_A_SECOND, PITCH_AT_0
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.extend import CURVES, fade, join_audio, join_images, last_frames, mix

FPS, RATE = 16, 48000
DEVICES = ["cpu"] + ["mps"] * torch.backends.mps.is_available()


def numbered(first, count, device="cpu"):
    frames = np.stack([picture(number, 48, 32) for number in range(first, first + count)])
    return torch.from_numpy(frames).to(device)


def tone(first, count, channels=2, fps=FPS):
    """The rising tone from the moment of frame `first` on, for `count` frames."""
    time = torch.arange(round(count * RATE / fps), dtype=torch.float64) / RATE + first / fps
    wave = 0.4 * torch.sin(2 * torch.pi * (PITCH_AT_0 * time + PITCH_A_SECOND / 2 * time**2))
    return {"waveform": wave.float().expand(1, channels, -1), "sample_rate": RATE}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [0, 1, 5])
@pytest.mark.parametrize("curve", CURVES)
def test_four_segments_count_on_across_the_seams(device, overlap, curve):
    """Each of four segments shows the last frames of the one before again, so the joined numbers have no gap."""
    length = 17
    starts = [index * (length - overlap) for index in range(4)]
    joined = join_images([numbered(start, length, device) for start in starts], overlap, curve)
    assert joined.device.type == device
    assert [read_number(frame) for frame in joined] == list(range(4 * length - 3 * overlap))


def test_four_segments_of_sound_go_on_across_the_seams():
    length, overlap = 17, 5
    starts = [index * (length - overlap) for index in range(4)]
    joined = join_audio([tone(start, length) for start in starts], [length] * 4, overlap, FPS)
    samples = joined["waveform"]
    assert samples.shape == (1, 2, (4 * length - 3 * overlap) * RATE // FPS) and joined["sample_rate"] == RATE
    for moment in np.arange(0.05, samples.shape[-1] / RATE - 0.05, 0.03):
        window = samples[0, 0, int((moment - 0.02) * RATE) : int((moment + 0.02) * RATE)]
        assert read_time(window, RATE) == pytest.approx(moment, abs=0.004)
        assert window.square().mean().sqrt() == pytest.approx(0.4 / 2**0.5, rel=0.05)


def test_sound_is_cut_and_filled_to_the_frames():
    short, long = tone(0, 8), tone(8, 40)
    joined = join_audio([short, long], [16, 16], 0, FPS)["waveform"]
    assert joined.shape[-1] == 32 * RATE // FPS
    assert joined[..., 8 * RATE // FPS : 16 * RATE // FPS].abs().max() == 0
    torch.testing.assert_close(joined[0, 0, -RATE:], long["waveform"][0, 0, :RATE])


def test_lengths_of_sound_do_not_add_up_rounding():
    fps = Fraction(30000, 1001)
    clips = [{"waveform": torch.ones(1, 1, 44100), "sample_rate": 44100}] * 10
    assert join_audio(clips, [7] * 10, 1, float(fps))["waveform"].shape[-1] == round(61 * 44100 / fps)


def test_mono_joins_stereo_and_other_rates_are_refused():
    joined = join_audio([tone(0, 8, 1), tone(8, 8, 2)], [8, 8], 0, FPS)["waveform"]
    assert joined.shape[1] == 2 and torch.equal(joined[0, 0], joined[0, 1])
    with pytest.raises(VideoError, match=r"^The clips' sounds have \[44100, 48000\] samples a second; .*\.$"):
        join_audio([tone(0, 8), tone(0, 8) | {"sample_rate": 44100}], [8, 8], 0, FPS)
    with pytest.raises(VideoError, match=r"^Sound 2 has 2 channels and another 6; .*\.$"):
        join_audio([tone(0, 8, 6), tone(8, 8, 2)], [8, 8], 0, FPS)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_light_is_mixed(share):
    """Against sRGB in float64, and by its known point: half black, half white is code value 0.735."""

    def light(value):
        return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)

    a, b = torch.rand(2, 8, 8, 3)
    mixed = light(mix(a, b, share).double().numpy())
    expected = (1 - share) * light(a.double().numpy()) + share * light(b.double().numpy())
    np.testing.assert_allclose(mixed, expected, atol=2e-6)
    black_and_white = mix(torch.zeros(1, 1, 3), torch.ones(1, 1, 3), 0.5)
    torch.testing.assert_close(black_and_white, torch.full((1, 1, 3), 0.735357), atol=1e-5, rtol=0)


def test_alpha_is_mixed_as_it_is():
    mixed = mix(torch.zeros(2, 2, 4), torch.ones(2, 2, 4), 0.25)
    assert torch.equal(mixed[..., 3], torch.full((2, 2), 0.25))


def test_curves():
    torch.testing.assert_close(fade(3, "linear"), torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(fade(3, "smooth"), torch.tensor([0.15625, 0.5, 0.84375]))
    assert fade(4, "cut").tolist() == [0, 0, 1, 1]


def test_frames_outside_of_the_overlap_are_untouched():
    a, b = torch.rand(2, 9, 8, 8, 3)
    joined = join_images([a, b], 4)
    assert torch.equal(joined[:5], a[:5]) and torch.equal(joined[9:], b[4:])
    assert not torch.equal(joined[5:9], a[5:]) and not torch.equal(joined[5:9], b[:4])


def test_half_precision_stays():
    assert join_images([torch.rand(3, 4, 4, 3).half()] * 2, 1).dtype == torch.float16


@pytest.mark.parametrize("overlap", [0, 3])
def test_drift_of_colour_is_undone(overlap):
    """Segments that come out brighter, flatter and warmer each time are brought back to the first one."""
    scene = torch.rand(1, 16, 16, 3) * 0.5 + 0.2
    clean = [scene.expand(9, -1, -1, -1)] * 3
    gain, offset = torch.tensor([0.9, 0.85, 0.8]), torch.tensor([0.08, 0.05, 0.02])
    drifted = [clip * gain**index + offset * index for index, clip in enumerate(clean)]
    joined = join_images(drifted, overlap, match_color=True)
    torch.testing.assert_close(joined, scene.expand(27 - 2 * overlap, -1, -1, -1), atol=2e-3, rtol=0)
    assert (join_images(drifted, overlap) - scene).abs().max() > 0.05


def test_flat_pictures_are_matched_without_noise():
    joined = join_images([torch.full((3, 4, 4, 3), 0.5), torch.full((3, 4, 4, 3), 0.6)], 1, match_color=True)
    torch.testing.assert_close(joined, torch.full((5, 4, 4, 3), 0.5))


def test_progress_and_interrupt():
    seen = []
    join_images([torch.rand(3, 4, 4, 3)] * 4, 1, on_segment=seen.append)
    assert seen == [1, 2, 3, 4]

    def stop(done):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        join_images([torch.rand(3, 4, 4, 3)] * 4, 1, on_segment=stop)


def test_last_frames_are_views():
    clip = numbered(0, 10)
    last, before = last_frames(clip, 3)
    assert [read_number(frame) for frame in last] == [7, 8, 9] and len(before) == 7
    assert last.untyped_storage().data_ptr() == clip.untyped_storage().data_ptr()
    with pytest.raises(VideoError, match=r"^The last 11 frames are wanted and the clip has 10; ask for 1 to 10\.$"):
        last_frames(clip, 11)


@pytest.mark.parametrize(
    "shapes, overlap, curve, sentence",
    [
        (
            [(3, 4, 4, 3), (3, 4, 6, 3)],
            1,
            "smooth",
            r"^Clip 2 is 6x4 with 3 channels and the first is 4x4 with 3; .*\.$",
        ),
        ([(3, 4, 4, 3), (3, 4, 4, 4)], 1, "smooth", r"^Clip 2 is 4x4 with 4 channels .*\.$"),
        (
            [(3, 4, 4, 3), (2, 4, 4, 3)],
            3,
            "smooth",
            r"^Clip 2 has 2 frames, too few to overlap by 3 on one side; .*\.$",
        ),
        ([(9, 4, 4, 3), (5, 4, 4, 3), (9, 4, 4, 3)], 3, "smooth", r"^Clip 2 has 5 frames, .* on both sides; .*\.$"),
        ([(3, 4, 4, 3), (0, 4, 4, 3)], 0, "smooth", r"^Clip 2 has 0 frames, .*\.$"),
        ([], 1, "smooth", r"^There is nothing to join; .*\.$"),
        ([(3, 4, 4, 3), (3, 4, 4, 3)], 1, "wipe", r"^The transition 'wipe' is none of smooth, linear, cut; .*\.$"),
    ],
)
def test_refusals_are_one_sentence(shapes, overlap, curve, sentence):
    with pytest.raises(VideoError, match=sentence):
        join_images([torch.rand(*shape) for shape in shapes], overlap, curve)
