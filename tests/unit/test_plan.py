"""The planner against what the simulated device counted (tests/data/plan_table.json), its verdicts and refusals."""

import dataclasses
import functools
import json
import statistics
import tempfile
from pathlib import Path

import pytest
from apple_silicon_video.memory import plan as planner
from apple_silicon_video.memory import plan_search, plan_stages, plan_views
from apple_silicon_video.memory.plan import GIB, MACS, Compute, Machine, PlanError, Video, plan, read_table
from apple_silicon_video.memory.plan_models import Entry, Quantities, WeightTable, lora_sizes, rounded, wan_model
from published_tables import lora_table, published_table, wan_table
from small_models import write_full_size_scaled
from workflow_plans import model_files, planned
from workflow_table import SPEED_LORAS, TABLE, VAE_21, VAE_22

DATA = Path(__file__).parents[1] / "data"
ROWS = json.loads((DATA / "plan_table.json").read_text())
HELD_OUT = json.loads((DATA / "plan_held_out.json").read_text())
MOST_ERROR = 0.05
SMALL = {"width": 832, "height": 480, "frames": 81}
A14B = "Wan2.2-T2V-A14B-HighNoise-Q3_K_M.gguf"


@functools.cache
def table_of(variant, recipe):
    """From shapes and recipe; for fp8 from a file, which is a hole."""
    if not recipe.startswith("F8"):
        return wan_table("model", variant, recipe)
    with tempfile.TemporaryDirectory() as folder:
        return read_table(write_full_size_scaled(Path(folder) / "model.safetensors", variant, recipe))


def predicted(row):
    """(weights, activations) as the planner has them."""
    table = table_of(row["variant"], row["recipe"])
    loras = [lora_table("lora", row["variant"], row["lora_rank"])] if row["lora_rank"] else []
    # The table's LoRAs are in bfloat16; those in float32 take as much.
    weights = sum(table.device_sizes) + sum(size for lora in loras for size in lora_sizes(lora, table))
    video, compute = Video(row["width"], row["height"], row["frames"]), Compute(torch_version=row["torch"])
    return weights, plan_stages.sampling(wan_model(table), video, row["cfg"], compute, bool(loras)).total


def errors(part, rows=ROWS):
    """Relative errors over a table: of the whole peak, or of the activations alone."""
    found = []
    for row in rows:
        weights, needed = predicted(row)
        counted = row["peak"] if part == "peak" else row["peak"] - row["weights"]
        found.append((weights + needed if part == "peak" else needed) / counted - 1)
    return found


def test_the_table_is_wide():
    assert len(ROWS) >= 60
    assert {row["torch"] for row in ROWS} == {"2.8", "2.10", "2.13", "2.15"}
    assert {row["cfg"] for row in ROWS} == {"none", "apart", "batched"}
    assert len({row["recipe"] for row in ROWS}) >= 9 and len({row["variant"] for row in ROWS}) >= 7
    assert len({(row["width"], row["height"], row["frames"]) for row in ROWS}) >= 10


def test_peaks_are_within_5_percent():
    found = errors("peak")
    print(f"peak: largest error {max(map(abs, found)):.4f}, mean {statistics.mean(map(abs, found)):.4f}")
    assert max(map(abs, found)) < MOST_ERROR
    assert statistics.mean(map(abs, found)) < 0.005


def test_activations_alone_are_within_5_percent():
    """The weights, which are nearly exact, would hide errors here."""
    found = errors("activations")
    print(f"activations: largest error {max(map(abs, found)):.4f}, mean {statistics.mean(map(abs, found)):.4f}")
    assert max(map(abs, found)) < MOST_ERROR
    assert statistics.mean(map(abs, found)) < 0.015


def test_the_held_out_table_is_another():
    """No size, length or LoRA of it is in the table that the constants were fitted to, and few quantisations."""
    assert len(HELD_OUT) >= 12 and {row["torch"] for row in HELD_OUT} == {"2.8", "2.10", "2.13", "2.15"}
    for fields in (("width", "height"), ("frames",)):
        fitted, held_out = ({tuple(row[name] for name in fields) for row in rows} for rows in (ROWS, HELD_OUT))
        assert len(held_out) >= 3 and not fitted & held_out
    assert len({row["recipe"] for row in HELD_OUT} - {row["recipe"] for row in ROWS}) >= 3


@pytest.mark.parametrize("part", ["peak", "activations"])
def test_what_nothing_was_fitted_to_is_within_5_percent(part):
    """Never fit to it: it says what the planner is worth for settings that nobody measured."""
    found = errors(part, HELD_OUT)
    print(f"held out, {part}: largest error {max(map(abs, found)):.4f}, mean {statistics.mean(map(abs, found)):.4f}")
    assert max(map(abs, found)) < MOST_ERROR
    assert statistics.mean(map(abs, found)) < 0.015


def test_weights_are_exact():
    for row in ROWS + HELD_OUT:
        weights, _ = predicted(row)
        assert abs(weights - row["weights"]) < 1 << 15, row


@pytest.mark.parametrize("name", TABLE)
def test_each_workflow_fits_its_mac_without_prefill_kernels(name):
    """test_workflow_plans.py has them with the newest torch."""
    row = TABLE[name]
    names = model_files(row)
    models = [published_table(file) for file in names if file.startswith("Wan")]
    (vae,) = (published_table(file) for file in names if "vae" in file)
    made = plan(
        models[0],
        model_low=models[1] if len(models) > 1 else None,
        text_encoder=published_table(row.encoder),
        vae=vae,
        loras=[published_table(file) for file in names if "high_noise" in file],
        width=row.width,
        height=row.height,
        frames=row.frames,
        machine=Machine.with_ram(row.memory),
        guidance=not row.fast,
        compute=Compute(torch_version="2.10"),
    )
    assert made.verdict == "fits", made.sentence()
    assert any("sampling" in stage.name for stage in made.stages)


def test_the_16_gb_workflow_peaks_under_9_5_gib():
    made = plan(
        published_table(A14B),
        text_encoder=published_table("umt5-xxl-encoder-Q5_K_M.gguf"),
        vae=published_table(VAE_21),
        machine=MACS[16],
        **SMALL,
    )
    assert [stage.name for stage in made.stages] == ["text encoding", "sampling", "decoding", "saving"]
    assert 8 * GIB < made.peak.device < 9.5 * GIB and made.peak.name == "sampling"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.memory == 16])
def test_every_16_gb_workflow_peaks_under_9_5_gib(name):
    """With its LoRAs, as it is shipped."""
    assert planned(TABLE[name]).peak.device < 9.5 * GIB


MATRIX = "blocks.0.self_attn.q"
LORAS = [
    ("F32", f"diffusion_model.{MATRIX}.lora_up.weight", (), 32),
    ("F32", f"{MATRIX}.lora_down.weight", (), 32),
    ("F32", "lora_unet_blocks_0_self_attn_q.lora_up.weight", (), 32),
    ("F32", "lora_unet__blocks_0_self_attn_q.lora_down.weight", (), 32),
    ("F32", "lycoris_blocks_0_self_attn_q.lokr_w2_b", (), 32),
    ("F32", f"diffusion_model.{MATRIX}.lora_A.default.weight", (), 32),
    ("F32", f"diffusion_model.{MATRIX}.hada_t1", (), 32),
    ("F32", f"diffusion_model.{MATRIX}.diff", (), 32),
    ("BF16", f"diffusion_model.{MATRIX}.lora_up.weight", (), 64),
    ("F16", f"diffusion_model.{MATRIX}.lora_up.weight", (), 64),
    ("F32", f"diffusion_model.{MATRIX}.lora_up.weight", ("dora_scale",), 64),
    ("F32", f"diffusion_model.{MATRIX}.lora_up.weight", ("reshape_weight",), 64),
    ("F32", f"diffusion_model.{MATRIX}.a1.weight", (), 64),
    ("F32", f"diffusion_model.{MATRIX}.oft_blocks", (), 64),
    ("F32", f"diffusion_model.{MATRIX}.diff_b", (), 64),
    ("F32", f"diffusion_model.{MATRIX}.set_weight", (), 64),
    ("F32", "diffusion_model.patch_embedding.lora_up.weight", (), 64),
    ("F32", "diffusion_model.head.head.lora_up.weight", (), 64),
    ("F32", "diffusion_model.elsewhere.lora_up.weight", (), 64),
]


@pytest.mark.parametrize(("kind", "name", "others", "expected"), LORAS)
def test_bytes_of_a_lora_on_the_device(kind, name, others, expected):
    """Half where comfy_patcher.py keeps float16: float32 factors of quantised matrices, DoRAs and others not."""
    stem = name.rsplit(".lora", 1)[0]
    entries = {name: Entry(kind, (4, 4), 64), f"{stem}.alpha": Entry("F32", (), 4)}
    entries |= {f"{stem}.{part}": Entry("F32", (4,), 16) for part in others}
    sizes = lora_sizes(WeightTable("lora", entries), published_table(A14B))
    assert sizes == [expected, *(16 for part in others if part == "dora_scale")]


def test_a_lora_of_unquantised_matrices_is_as_in_the_file():
    lora = published_table(f"{SPEED_LORAS['t2v']}_high_noise.safetensors")
    quantised, plain = published_table(A14B), published_table(A14B.replace("Q3_K_M", "F16"))
    assert sum(lora_sizes(lora, quantised)) * 2 == sum(lora_sizes(lora, plain)) == lora.nbytes


def test_verdicts_go_with_the_macs_memory():
    order = list(planner.VERDICTS)
    made = [plan(published_table(A14B), machine=machine, **SMALL) for machine in MACS.values()]
    ranks = [order.index(one.verdict) for one in made]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 2 and ranks[-1] == 0
    assert made[0].worst.name == "sampling" and "does not fit on an 8 GB Mac" in made[0].sentence()
    assert (min(MACS), max(MACS)) == (8, 512)
    assert MACS[16].recommended / GIB == pytest.approx(10.67, abs=0.01)
    assert MACS[64].recommended == 48 * GIB


def test_swap_risk_lies_between():
    table = published_table("Wan2.2-T2V-A14B-HighNoise-Q5_K_M.gguf")
    assert plan(table, machine=MACS[16], **SMALL).verdict == "swap risk"


BOUNDS = [
    (10 * GIB, 0, "fits"),
    (10 * GIB + 1, 0, "swap risk"),
    (int(11.5 * GIB), 0, "swap risk"),
    (int(11.5 * GIB) + 1, 0, "does not fit"),
    (9 * GIB, 4 * GIB, "fits"),
    (9 * GIB, 4 * GIB + 1, "swap risk"),
    (9 * GIB, 5 * GIB, "swap risk"),
    (9 * GIB, 5 * GIB + 1, "does not fit"),
]


@pytest.mark.parametrize(("device", "host", "verdict"), BOUNDS)
def test_bounds_of_the_verdicts(device, host, verdict):
    """The working set for the device, and 3 or 2 GiB that are left to macOS."""
    stage = planner.Stage("stage", GIB, Quantities({"x": device - GIB}), Quantities({"y": host}))
    assert stage.verdict(Machine(16 * GIB, 10 * GIB)) == verdict


def test_more_costs_more():
    table = published_table(A14B)

    def peak(**changes):
        return plan(table, **({"machine": MACS[64], **SMALL} | changes)).stage("sampling").live

    base = peak()
    assert peak(frames=121) > base and peak(width=1280, height=720) > base
    assert peak(batched=True) > base and peak(guidance=False) <= base
    assert peak(loras=[published_table(f"{SPEED_LORAS['t2v']}_high_noise.safetensors")]) > base + GIB // 2
    assert peak(compute=Compute(torch_version="2.10")) > base


def test_guidance_is_batched_where_core_finds_room():
    table = published_table("Wan2.1-T2V-1.3B-Q5_K_M.gguf")
    little = {"width": 480, "height": 272, "frames": 17}
    assert plan(table, machine=MACS[16], **little).cfg == "batched"
    assert plan(table, machine=MACS[16], **SMALL).cfg == "apart"
    assert plan(table, machine=MACS[16], guidance=False, **SMALL).cfg == "none"


def test_the_vae_is_tiled_where_it_must():
    settings = {"width": 1280, "height": 704, "frames": 121}
    table, vae = published_table("Wan2.2-TI2V-5B-Q4_K_M.gguf"), published_table(VAE_22)
    whole, tiled = (plan(table, vae=vae, machine=MACS[gb], **settings).stage("decoding") for gb in (24, 8))
    assert whole.note == "" and "tiles" in tiled.note
    assert tiled.needed.total < whole.needed.total / 2


def test_buffers_are_rounded():
    assert [rounded(size) for size in (1, 16384, 16385, 10 << 20, (10 << 20) + 1)] == [
        16384, 16384, 32768, 10 << 20, 12 << 20,
    ]  # fmt: skip


REFUSALS = [
    ({"frames": 80}, "80 frames are not 4n + 1: take 77 or 81."),
    ({"width": 830}, "830x480 is not a multiple of 16 in both directions"),
    ({"model_low": published_table("Wan2.1-T2V-1.3B-Q8_0.gguf")}, "choose two files of one model"),
    ({"vae": published_table(VAE_22)}, "48 latent channels"),
    ({"vae": published_table(A14B)}, "is no VAE"),
    ({"text_encoder": published_table(VAE_21)}, "is no text encoder"),
    ({"loras": [published_table(VAE_21)]}, "is no LoRA"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_refusals_are_one_sentence(changes, words):
    with pytest.raises(PlanError, match=words.replace("+", r"\+")) as refused:
        plan(published_table(A14B), **({"machine": MACS[16], **SMALL} | changes))
    text = str(refused.value)
    assert text.endswith(".") and text.count(". ") == 0 and "\n" not in text


def test_other_refusals(tmp_path):
    with pytest.raises(PlanError, match="is no Wan diffusion model"):
        plan(WeightTable("other.gguf", {"x": Entry("F32", (1,), 4)}), machine=MACS[16], **SMALL)
    with pytest.raises(PlanError, match="no Mac's memory"):
        Machine.with_ram(1)
    with pytest.raises(PlanError, match="missing"):
        read_table(tmp_path / "none.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUFnot")
    with pytest.raises(PlanError, match=r"broken\.gguf"):
        read_table(tmp_path / "broken.gguf")
    with pytest.raises(PlanError, match="no published file"):
        published_table("something-Q8_0.gguf")


def test_this_machine_has_limits():
    machine = Machine.here()
    assert 0 < machine.recommended < machine.ram


def beside(*recipes):
    name = A14B.replace("Q3_K_M", "{}")
    return {recipe: (published_table(name.format(recipe)), None) for recipe in recipes}


def test_search_finds_the_nearest():
    big = published_table(A14B.replace("Q3_K_M", "Q8_0"))
    found = plan_search.nearest(big, beside("Q3_K_M", "Q5_K_M"), machine=MACS[16], **SMALL)
    assert all(one.plan.verdict == "fits" for one in found)
    assert found[0].changes == {"quantisation": "Q3_K_M"} and found[0].plan.video == Video(832, 480, 81)
    larger = plan_search.nearest(
        beside("Q5_K_M")["Q5_K_M"][0], beside("Q3_K_M"), machine=MACS[16], width=1280, height=720, frames=121
    )
    assert larger and [one.cost for one in larger] == sorted(one.cost for one in larger)
    for one in larger:
        assert one.plan.verdict == "fits" and one.plan.video.frames % 4 == 1
    levers = [set(one.changes) for one in larger]
    assert len(levers) > 1 and not any(one < other for one in levers for other in levers)
    assert plan_search.nearest(big, {}, machine=MACS[8], **SMALL) == []


def test_search_offers_swap_risk_where_nothing_is_better():
    """The text encoder alone is too much for 8 GB without swap risk."""
    table, encoder = published_table("Wan2.2-TI2V-5B-Q8_0.gguf"), published_table("umt5-xxl-encoder-Q5_K_M.gguf")
    settings = {"width": 1280, "height": 704, "frames": 121, "machine": MACS[8], "text_encoder": encoder}
    smaller = {"Q4_K_M": (published_table("Wan2.2-TI2V-5B-Q4_K_M.gguf"), None)}
    found = plan_search.nearest(table, smaller, **settings)
    assert found and {one.plan.verdict for one in found} == {"swap risk"}
    assert "swap risk" in found[0].sentence() and "quantisation" in found[0].changes
    assert plan_views.refusal(plan(table, **settings), found).endswith("it would fit, with swap risk.")
    small = {**settings, "frames": 17, "width": 480, "height": 288}
    assert plan_search.nearest(smaller["Q4_K_M"][0], {}, **small) == []  # it has swap risk already


def test_search_takes_the_most_frames_that_fit():
    table = published_table("Wan2.2-T2V-A14B-HighNoise-Q3_K_M.gguf")
    settings = {"width": 1280, "height": 720, "machine": MACS[16]}
    found = [one for one in plan_search.nearest(table, {}, frames=121, **settings) if set(one.changes) == {"frames"}]
    (best,) = found
    assert plan(table, frames=best.plan.video.frames + 4, **settings).verdict != "fits"


def test_files_beside(tmp_path):
    for name in ("m-HighNoise-Q3_K_M.gguf", "m-HighNoise-Q8_0.gguf", "m-LowNoise-Q8_0.gguf", "n-Q4_0.gguf"):
        (tmp_path / name).touch()
    high, low = tmp_path / "m-HighNoise-Q8_0.gguf", tmp_path / "m-LowNoise-Q8_0.gguf"
    assert list(plan_search.quantisations(high)) == ["Q3_K_M", "Q8_0"]
    assert plan_search.quantisations(high, low) == {"Q8_0": (high, low)}
    assert plan_search.tables_beside(dataclasses.replace(published_table(A14B), path=high)) == {}


def test_views(tmp_path):
    made = plan(published_table(A14B), vae=published_table(VAE_21), machine=MACS[8], **SMALL)
    proposals = plan_search.nearest(published_table(A14B), {}, machine=MACS[8], **SMALL)
    text = plan_views.to_text(made, proposals)
    assert "does not fit" in text and "sampling" in text and "5.3 GiB recommended" in text
    for line in text.splitlines():
        if line.startswith("sampling"):
            assert line.count("|") == 1 and line.split("|")[0].count("#") == plan_views.BAR
    picture = plan_views.to_picture(made, proposals)
    assert picture.ndim == 4 and picture.shape[2:] == (plan_views.WIDTH, 3) and 0 <= picture.min() < picture.max() <= 1
    plan_views.save_picture(made, tmp_path / "chart.png")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    assert made.sentence().endswith(".") and plan_views.refusal(made, proposals).count(". ") == 0
    assert json.loads(json.dumps(made.as_dict()))["verdict"] == "does not fit"
