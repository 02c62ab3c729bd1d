"""What a sampling stage really needs: the pack's loader and core's sampler at full size in dry mode.

../plan_table.py makes tests/data/plan_table.json of it, test_plan.py measures some rows again.
"""

import gc
from pathlib import Path

import full_size_sampling as full
import simulated_mps as sim
from simulated_mps.plan_table import Combination

RAM_GB = 512  # the device refuses nothing
FREE = {"batched": 1 << 50, "apart": 1 << 32, "none": 1 << 32}
"""Free memory with which core batches cfg or does not."""


def measure(row: Combination, folder: Path) -> dict[str, int]:
    """Bytes: ``weights`` after loading, ``peak`` while sampling two steps with euler, weights included."""
    full.check_blocks(folder, row.variant)
    sim.mac(RAM_GB)
    with full.dry_device(lambda: FREE[row.cfg]):
        patcher = full.load_full(folder, row.variant, row.recipe, row.lora_rank)
        gc.collect()
        start = sim.stats().live
        full.management.load_models_gpu([patcher], force_full_load=True)
        weights = sim.stats().live - start
        sim.reset()
        latent = full.blank(row.variant, row.width, row.height, row.frames)
        full.sample(patcher, row.variant, latent, cfg=1.0 if row.cfg == "none" else 5.0)
        peak = sim.stats().peak - start
    del patcher
    gc.collect()
    return {"weights": weights, "peak": peak}
