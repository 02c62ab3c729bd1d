"""The planner's table (tests/data/plan_table.json), measured again in a few rows, and the text encoder's stage.

../plan_table.py makes the table; every row of it is compared with the prediction in tests/unit/test_plan.py.
"""

import json
from dataclasses import asdict

import full_size_sampling as full
import plan_measure
import pytest
import simulated_mps as sim
import torch
from apple_silicon_video.memory import plan_stages
from apple_silicon_video.memory.plan_models import read_table, wan_model
from apple_silicon_video.memory.plan_stages import Compute, Video
from simulated_mps.plan_table import ROWS, SETS, TABLE, combinations
from small_models import write_full_size_encoder

TORCH = ".".join(sim.installed()["torch"].split(".")[:2])
STORED = [row for row in json.loads(TABLE.read_text()) if row["torch"] == TORCH]
CHOSEN = (0, 2, 4)
"""Rows of each op table that are cheap: 1.3B, 14B, and image to video with both prompts."""


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


if TORCH in ROWS:

    @pytest.mark.parametrize("number", CHOSEN)
    def test_a_row_measured_again(number, tmp_path):
        row = list(combinations(TORCH))[number]
        found = plan_measure.measure(row, tmp_path)
        stored = STORED[number]
        assert found["weights"] == stored["weights"]
        assert abs(found["peak"] - stored["peak"]) < 0.005 * stored["peak"]  # a latent or two wait for the collector
        table = read_table(full.write_full(tmp_path, row.variant, row.recipe))
        video = Video(row.width, row.height, row.frames)
        needed = plan_stages.sampling(wan_model(table), video, row.cfg, Compute(torch_version=TORCH), False).total
        assert abs(sum(table.device_sizes) + needed - found["peak"]) < 0.01 * found["peak"]

    @pytest.mark.parametrize("held_out", SETS)
    def test_the_table_is_complete(held_out):
        stored = [row for row in json.loads(SETS[held_out][1].read_text()) if row["torch"] == TORCH]
        assert [asdict(row) for row in combinations(TORCH, held_out)] == [
            {name: value for name, value in row.items() if name not in ("weights", "peak")} for row in stored
        ]


def test_text_encoding(tmp_path):
    sim.mac(plan_measure.RAM_GB)
    with full.dry_device(lambda: plan_measure.FREE["none"]):
        path = write_full_size_encoder(tmp_path / "encoder.gguf", "Q5_K_M")
        clip = full.comfy_loader.load_text_encoder(path)
        start = sim.stats().live
        full.management.load_models_gpu([clip.patcher])
        weights = sim.stats().live - start
        sim.reset()
        clip.encode_from_tokens_scheduled(clip.tokenize("A red fox walks through fresh snow"))
        needed = sim.stats().peak - start - weights
    assert abs(sum(read_table(path).device_sizes) - weights) < 1 << 20
    assert abs(plan_stages.text_encoding().total - needed) < 0.05 * needed
