"""Tiles, their weights and budgets, canvases, and which module is which VAE: without ComfyUI, in small numbers."""

import re
import shutil
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from apple_silicon_video.memory import vae_tiles
from apple_silicon_video.memory.vae_canvas import LEVELS, SPARE_BYTES, FileCanvas, ScratchError
from apple_silicon_video.memory.vae_streaming import KINDS, frame_count, latent_count, wan_kind
from apple_silicon_video.memory.vae_tiles import GIB, BudgetError, Span, make_tiling, peak_bytes, plan_tiles
from torch import nn


def test_a_tile_s_border_has_no_say():
    """Of 8 shared cells the outer quarter on either side is the neighbour's alone, and between them it rises."""
    tiling = make_tiling(3, 40, 1, 2, 8)
    first, second = tiling.columns
    assert (first.last - second.first, len(tiling)) == (8, 2)
    weights = tiling.weights(tiling.rows[0], second, 4)
    assert weights.shape == (12, second.size * 4)
    rise = weights[0, :32]
    assert (rise[:8] == 0).all() and (rise[24:] == 1).all() and (rise[8:24].diff() > 0).all()
    assert rise[8:24].sum().item() == pytest.approx(8)


@pytest.mark.parametrize("overlap", vae_tiles.OVERLAP.values())
def test_tiles_of_a_grid_overlap_their_neighbours_alone(overlap):
    for length in range(1, 180):
        tilings = list(vae_tiles._candidates(length, 1, overlap))
        assert [len(tiling.rows) for tiling in tilings] == list(range(1, len(tilings) + 1))
        assert make_tiling(length, 1, len(tilings) + 1, 1, overlap).tile[0] < 2 * overlap + 2
        for spans in (tiling.rows for tiling in tilings[1:]):
            assert spans[0].first == 0 and spans[-1].last == length
            assert all(span.size >= 2 * overlap + 2 for span in spans)
            assert all(before.last - after.first >= overlap for before, after in pairwise(spans))
            assert all(after.first >= before.last for before, after in zip(spans, spans[2:]))


@pytest.mark.parametrize("operation", ["decode", "encode"])
@pytest.mark.parametrize(("width", "height"), [(832, 480), (1280, 720), (960, 544), (640, 368), (1920, 1088)])
def test_the_least_budget_that_is_named_is_the_least(operation, width, height):
    size = (operation, KINDS["wan2.1"], width, height, 81, torch.float16)
    with pytest.raises(BudgetError) as refused:
        plan_tiles(*size, 1)
    named = re.search(r"at least (\S+) GiB", str(refused.value))[1]
    assert re.fullmatch(r"\d\.\d{1,2}", named)
    assert len(plan_tiles(*size, int(float(named) * GIB))) > 1
    with pytest.raises(BudgetError):
        plan_tiles(*size, int((float(named) - 0.01) * GIB))
    smallest = vae_tiles.smallest_tiles(*size[:4])
    assert smallest.tile[0] * smallest.tile[1] == min(
        tiling.tile[0] * tiling.tile[1] for tiling in vae_tiles._candidates(height // 8, width // 8, 8)
    )


def test_the_peak_is_in_proportion_to_area_width_and_element_size():
    kind = replace(KINDS["wan2.1"], width=48)
    half, single = torch.float16, torch.float32
    for frames, dtype, per_pixel in ((81, half, 6790 / 2), (1, half, 781 / 2), (81, single, 6790)):
        latents = 2 * 16 * latent_count(frames) * dtype.itemsize
        expected = 60 * 104 * (per_pixel * 64 + latents)
        assert peak_bytes("decode", kind, 832, 480, frames, None, dtype) == int(expected)
        halves = make_tiling(60, 104, 1, 2)
        assert peak_bytes("decode", kind, 832, 480, frames, halves, dtype) == int(expected / 2)


def test_frames_and_latent_frames():
    assert [frame_count(latents) for latents in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert [latent_count(frames) for frames in (1, 4, 5, 8, 81)] == [1, 1, 2, 2, 21]


# ---- canvases


def test_a_canvas_on_the_disk_adds_where_it_should_in_whole_levels(tmp_path):
    folder = tmp_path / "made" / "here"
    with FileCanvas((4, 6, 5, 3), folder) as canvas:
        tile = torch.full((2, 3, 2, 3), 10.6 / LEVELS)
        for _ in range(2):
            canvas.add(1, Span(2, 5), Span(1, 3), tile)
        found = (canvas.frames(0, 4) * LEVELS).round()
        canvas.add(0, Span(0, 6), Span(0, 5), torch.full((4, 6, 5, 3), 1.0))
        canvas.add(3, Span(0, 6), Span(0, 5), torch.full((1, 6, 5, 3), -3.0))
        full = canvas.frames(0, 4)
    expected = torch.zeros(4, 6, 5, 3)
    expected[1:3, 2:5, 1:3] = 22
    assert torch.equal(found, expected)
    assert (full[:3] == 1).all() and (full[3] == 0).all()
    with pytest.raises(ValueError, match="closed file"):
        canvas.frames(0, 1)
    assert list(folder.iterdir()) == []


def test_a_canvas_leaves_the_disk_a_gigabyte(tmp_path, monkeypatch):
    needed = 2 * 6 * 5 * 3 * 2
    for free in (needed + SPARE_BYTES, needed + SPARE_BYTES - 1):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, usage=usage: usage)
        if free < needed + SPARE_BYTES:
            with pytest.raises(ScratchError, match="make room there"):
                FileCanvas((2, 6, 5, 3), tmp_path)
        else:
            FileCanvas((2, 6, 5, 3), tmp_path).__exit__(None, None, None)


# ---- which VAE


def module(nested=False, fine=True, channels=3, downsamples=3, left_out=""):
    """What wan_kind looks at of core's VAE modules."""
    made = nn.Module()
    made.encoder, made.decoder = nn.Module(), nn.Module()
    made.encoder.conv1 = nn.Conv3d(channels, 4, 1)
    block = nn.Module()
    if nested:
        block.upsamples = nn.Sequential()
    made.decoder.upsamples = nn.ModuleList([block])
    if fine:
        made.decoder.run_up = None
    made.conv1 = made.conv2 = nn.Identity()
    made.temperal_downsample, made.dim = [True] * downsamples, 24
    if left_out:
        delattr(made, left_out)
    return made


def test_modules_are_told_by_their_structure():
    for nested, fine in product((False, True), repeat=2):
        name = "wan2.2" if nested else "wan2.1" if fine else "wan2.1-coarse"
        found = wan_kind(module(nested, fine, channels=12 if nested else 3))
        assert found == replace(KINDS[name], width=24)


@pytest.mark.parametrize(
    "other",
    [
        module(nested=True, channels=3),
        module(downsamples=2),
        module(left_out="conv2"),
        module(left_out="dim"),
        nn.Linear(1, 1),
        SimpleNamespace(),
    ],
)
def test_other_modules_are_none(other):
    assert wan_kind(other) is None
