"""The planner's table (tests/data/plan_table.json), measured again in a few rows, and the text encoder's stage.

../plan_table.py makes the table; every row of it is compared with the prediction in tests/unit/test_plan.py.
"""

import gc
import json
from dataclasses import asdict

import plan_measure
import pytest
import simulated_mps as sim
import torch
from apple_silicon_video.memory import plan_stages
from apple_silicon_video.memory.plan_models import read_table, wan_model
from apple_silicon_video.memory.plan_stages import Compute, Video
from plan_measure import comfy_loader
from simulated_mps.plan_table import ROWS, TABLE, combinations
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
        table = read_table(plan_measure.write_model(tmp_path, row.variant, row.recipe))
        video = Video(row.width, row.height, row.frames)
        needed = plan_stages.sampling(wan_model(table), video, row.cfg, Compute(torch_version=TORCH), False).total
        assert abs(sum(table.device_sizes) + needed - found["peak"]) < 0.01 * found["peak"]

    def test_the_table_is_complete():
        assert [asdict(row) for row in combinations(TORCH)] == [
            {name: value for name, value in row.items() if name not in ("weights", "peak")} for row in STORED
        ]


def test_text_encoding(tmp_path):
    management = plan_measure.comfy.model_management
    with plan_measure.DryDevice():
        path = write_full_size_encoder(tmp_path / "encoder.gguf", "Q5_K_M")
        clip = comfy_loader.load_text_encoder(path)
        start = sim.stats().live
        management.load_models_gpu([clip.patcher])
        weights = sim.stats().live - start
        sim.reset()
        clip.encode_from_tokens_scheduled(clip.tokenize("A red fox walks through fresh snow"))
        needed = sim.stats().peak - start - weights
        management.unload_all_models()
        management.current_loaded_models.clear()
        del clip
        gc.collect()
    assert abs(sum(read_table(path).device_sizes) - weights) < 1 << 20
    assert abs(plan_stages.text_encoding().total - needed) < 0.05 * needed
