"""Each part of a plan by hand: machines, verdicts, stages, proposals, views.

The whole runs of test_plan.py leave room of a few per cent, in which a part can be wrong unseen.
"""

import re
from dataclasses import replace
from math import log2

import numpy as np
import pytest
import torch
from apple_silicon_video.memory import plan as planner
from apple_silicon_video.memory import plan_search, plan_stages, plan_views
from apple_silicon_video.memory.plan import GIB, MACS, Compute, Machine, Plan, PlanError, Stage, Video, plan
from apple_silicon_video.memory.plan_models import Entry, Quantities, WanModel, WeightTable, wan_model
from apple_silicon_video.memory.telemetry import MemorySnapshot
from published_tables import lora_table, published_table
from workflow_table import VAE_21

T2V, I2V = "Wan2.2-T2V-A14B-HighNoise-Q3_K_M.gguf", "Wan2.2-I2V-A14B-LowNoise-Q3_K_M.gguf"
SMALL = {"width": 832, "height": 480, "frames": 81}
HOST = planner.PROCESS + planner.SYSTEM
TINY = Video(64, 64, 5)  # 2 x 8 x 8 latent elements of a channel, 32 tokens


def tiny(**changes):
    """A model of Wan 1.3B's width."""
    sizes = {"dim": 1536, "ffn_dim": 8960, "layers": 30, "in_dim": 16, "out_dim": 16, "image": False, "vace_layers": 0}
    return WanModel(**sizes | changes)


def stage(name, device, host=0, rounding=0):
    return Stage(name, device - rounding, Quantities(), Quantities({"x": host}), rounding)


def test_machines():
    assert MACS[36].recommended == 24 * GIB and MACS[48].recommended == 36 * GIB
    titles = {gigabytes: Machine(gigabytes * GIB, GIB).title for gigabytes in (8, 11, 16, 18, 79, 80, 90)}
    assert [size for size, title in titles.items() if title.startswith("an ")] == [8, 11, 18, 80]
    assert titles[18] == "an 18 GB Mac"


@pytest.mark.parametrize(
    ("total", "recommended", "expected"),
    [(15.7, None, 16 * 2 / 3), (15.7, 7, 7), (1, None, 4 * 2 / 3), (None, None, None)],
)
def test_this_machine_s_own_figures(monkeypatch, total, recommended, expected):
    sizes = {"total": total, "recommended": recommended}
    found = MemorySnapshot(**{name: None if size is None else int(size * GIB) for name, size in sizes.items()})
    monkeypatch.setattr(planner, "take_snapshot", lambda: found)
    if expected is None:
        with pytest.raises(PlanError, match="say how many GB to plan for"):
            Machine.here()
        return
    machine = Machine.here()
    assert (machine.ram, machine.recommended) == (found.total, pytest.approx(expected * GIB, abs=1))


def test_rounding_counts_as_what_is_on_the_device():
    machine = Machine(16 * GIB, 10 * GIB)
    assert stage("", 10 * GIB + 1, rounding=2).verdict(machine) == "swap risk"
    assert stage("", int(11.5 * GIB) + 1, rounding=2).verdict(machine) == "does not fit"
    assert stage("", 9 * GIB, 4 * GIB + 1, rounding=2).verdict(machine) == "swap risk"


def test_the_peak_is_of_the_device_and_the_worst_stage_decides():
    crowded, long = stage("crowded", 11 * GIB), stage("long", 2 * GIB, 11 * GIB)
    made = Plan("", Machine(16 * GIB, 10 * GIB), TINY, "none", (stage("first", GIB), long, crowded))
    assert made.peak is crowded and made.worst is crowded and made.verdict == "swap risk"
    assert made.stages[2].total < long.total


def test_each_stage_holds_its_parts():
    """Of a VAE that decodes and encodes, the frames of ComfyUI, a writer that holds 48 frames at most."""
    table, vae = published_table(T2V), published_table(VAE_21)
    assert [one.name for one in plan(table, vae=vae, machine=MACS[64], clip=True, **SMALL).stages] == [
        "image encoding", "sampling", "decoding", "saving",
    ]  # fmt: skip
    for frames, held in ((81, 48), (5, 5)):
        made = plan(table, vae=vae, machine=MACS[64], clip=True, **SMALL | {"frames": frames})
        pixels = 832 * 480
        waiting = {"ComfyUI": planner.PROCESS, "frames": pixels * frames * 12}
        encoding, sampling, decoding, saving = made.stages
        assert encoding.host.parts == decoding.host.parts == waiting
        assert sampling.host.parts == {"ComfyUI": planner.PROCESS}
        assert saving.host.parts == waiting | {"video encoder": int(pixels * 1.5 * held)}
        video = Video(832, 480, frames)
        assert encoding.needed == plan_stages.encoding(16, video)[0] and encoding.note == decoding.note == ""
        assert decoding.needed == plan_stages.decoding(16, video)[0] and decoding.needed != encoding.needed


def test_a_lora_s_additions_are_counted_beside_its_weights():
    loras = [lora_table("lora", "wan2.2-t2v-a14b-high")]
    made = plan(published_table(T2V), loras=loras, machine=MACS[64], width=256, height=256, frames=1)
    model, video = wan_model(published_table(T2V)), Video(256, 256, 1)
    assert made.stage("sampling").needed == plan_stages.sampling(model, video, made.cfg, Compute(), lora=True)
    assert made.stage("sampling").needed != plan_stages.sampling(model, video, made.cfg, Compute())


def test_rounding_is_what_buffers_are_rounded_by():
    made = plan(published_table(T2V), machine=MACS[64], **SMALL)
    sampling = made.stage("sampling")
    assert sampling.rounding == sum(map(planner.rounded, published_table(T2V).device_sizes)) - sampling.weights > 0
    (row, _) = made.as_dict()["stages"]
    assert (row["rounding"], row["device"], row["weights"]) == (sampling.rounding, sampling.device, sampling.weights)


def test_experts_of_another_input_are_refused():
    with pytest.raises(PlanError, match="choose two files of one model"):
        plan(published_table(T2V), model_low=published_table(I2V), machine=MACS[64], **SMALL)


def test_guidance_is_batched_by_what_the_weights_leave(monkeypatch):
    """Core's estimate for 480x272x17 with 1.3B: 2 x 5 x 34 x 60 latent elements, times 1.5, must be free."""
    table = WeightTable("model.gguf", wan_entries())
    video = Video(480, 272, 17)
    needed = 2 * 5 * 34 * 60 * 0.15 * (1536 / 2222) * (1 << 20) * 1.5
    model = wan_model(table)
    assert plan_stages.batches_guidance(model, video, int(needed) + 1)
    assert not plan_stages.batches_guidance(model, video, int(needed))
    for free, cfg in ((int(needed) + 1, "batched"), (int(needed), "apart")):
        machine = Machine(HOST + table.nbytes + free, GIB)
        assert plan(table, width=480, height=272, frames=17, machine=machine).cfg == cfg


def wan_entries():
    """What the planner knows a Wan by, one block of 1.3B's width."""
    shapes = {
        "patch_embedding.weight": (1536, 16, 1, 2, 2),
        "patch_embedding.bias": (1536,),
        "head.head.bias": (64,),
        "blocks.0.ffn.0.bias": (8960,),
        "blocks.0.self_attn.q.weight": (1536, 1536),
    }
    return {name: Entry("F16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()}


@pytest.mark.parametrize("scarce", ["device", "memory"])
def test_the_vae_s_budget_is_a_share_of_what_is_free(monkeypatch, scarce):
    asked = []
    whole = plan_stages.decoding
    monkeypatch.setattr(plan_stages, "decoding", lambda *given: (asked.append(given), whole(*given))[1])
    vae = published_table(VAE_21)
    machine = Machine(16 * GIB, 9 * GIB) if scarce == "device" else Machine(16 * GIB, 15 * GIB)
    plan(WeightTable("model.gguf", wan_entries()), vae=vae, machine=machine, **SMALL)
    room = 9 * GIB if scarce == "device" else 16 * GIB - HOST - 832 * 480 * 81 * 12
    assert asked == [(16, Video(832, 480, 81), int((room - vae.nbytes) * 0.8))]


def test_the_smallest_tiles_are_planned_where_none_fit():
    video = Video(832, 480, 81)
    least, tiles = plan_stages.decoding(16, video, 1)
    assert tiles > 4 and least.total < plan_stages.decoding(16, video)[0].total / 4


def test_latents_texts_and_states_outside_the_blocks():
    """9 latents, 4.5 for each batch entry, 1 more apart; 3.2 and 1 for channels beyond the latent's own."""
    latent = 2 * 8 * 8 * 16 * 4
    hidden = 32 * 1536 * 2

    def outside(cfg, **changes):
        return plan_stages._Forward(tiny(**changes), TINY, cfg, Compute(), False).outside()

    for cfg, batch, latents, image in (("none", 1, 13.5, 3.2), ("apart", 1, 14.5, 4.2), ("batched", 2, 18, 6.4)):
        assert outside(cfg) == {
            "sampler's latents": latents * latent,
            "VACE's latents": 0,
            "positions and texts": 32 * 64 * 16 + batch * 512 * 1536 * 2,
            "hidden state": batch * hidden,
        }
        pictures = outside(cfg, in_dim=36, image=True)
        assert pictures["sampler's latents"] == pytest.approx((latents + 1.25 * image) * latent)
        assert pictures["positions and texts"] == 32 * 64 * 16 + batch * (512 + 257) * 1536 * 2
        vace = outside(cfg, vace_layers=15)
        assert vace["VACE's latents"] == pytest.approx(4 * 96 * 2 * 8 * 8 * (2.17 + 1.33 * batch))
        assert vace["hidden state"] == 4 * batch * hidden


def test_the_feed_forward_holds_its_hidden_layer_twice():
    moment = plan_stages._Forward(tiny(), TINY, "none", Compute(), False).moments()[-1]
    assert moment["chunk"] == 32 * 2 * 8960 * 2
    assert moment["decoded weights"] == 2 * 1536 * 8960 * 2 and moment["result of the block"] == 32 * 1536 * 2


def test_the_text_encoder_s_layer():
    assert plan_stages.text_encoding().total == 5 * 64 * 512 * 512 * 4 + 9 * 512 * 4096 * 4


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (Video(64, 64, -3), "-3 frames are not 4n + 1: take 1 or 5."),
        (Video(64, 64, 0), "0 frames are not 4n + 1: take 1 or 5."),
        (Video(64, 72, 5), "64x72 is not a multiple of 16"),
        (Video(0, 64, 5), "0x64 is not a multiple of 16"),
        (Video(64, 0, 5), "64x0 is not a multiple of 16"),
    ],
)
def test_sizes_that_no_model_takes(video, words):
    with pytest.raises(PlanError) as refused:
        video.check(8)
    assert str(refused.value).startswith(words)


# ---- proposals


def test_proposals_are_the_cheapest_of_their_levers_and_sorted():
    """A halving of the picture's area costs 3, of the frames 2, of the weights 1.5."""
    files = {recipe: published_table(T2V.replace("Q3_K_M", recipe)) for recipe in ("Q3_K_M", "Q5_K_M", "Q8_0")}
    beside = {recipe: (files[recipe], None) for recipe in ("Q3_K_M", "Q5_K_M")}
    found = plan_search.nearest(files["Q8_0"], beside, machine=MACS[24], **SMALL)
    assert [set(one.changes) for one in found] == [{"quantisation"}, {"frames"}, {"size"}]
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    quantised, shorter, smaller = found
    assert quantised.changes == {"quantisation": "Q5_K_M"}
    assert quantised.cost == pytest.approx(1.5 * log2(files["Q8_0"].nbytes / files["Q5_K_M"].nbytes))
    assert shorter.cost == pytest.approx(2 * log2(81 / shorter.plan.video.frames))
    assert smaller.cost == pytest.approx(3 * log2(832 * 480 / smaller.plan.video.pixels))


@pytest.mark.parametrize("frames", [101, 121, 125, 129, 133])
def test_proposals_have_the_most_frames_that_fit(frames):
    settings = {"width": 1280, "height": 720, "machine": MACS[16]}
    (best, *_) = plan_search.nearest(published_table(T2V), {}, frames=frames, **settings)
    assert set(best.changes) == {"frames"}
    assert plan(published_table(T2V), frames=best.plan.video.frames + 4, **settings).verdict != "fits"


def test_proposals_are_never_longer_than_asked_nor_smaller_than_of_use():
    table = published_table(T2V)
    short = plan_search.nearest(table, {}, machine=MACS[16], width=3840, height=2160, frames=9)
    assert short and all(one.plan.video.frames <= 9 for one in short)
    assert plan_search.nearest(table, {}, machine=Machine.with_ram(10.9), width=1280, height=320, frames=17) == []


def test_proposals_hold_for_both_experts():
    high, low = (published_table(T2V.replace("Q3_K_M", recipe)) for recipe in ("Q3_K_M", "Q8_0"))
    settings = {"machine": MACS[16], **SMALL}
    assert plan_search.nearest(high, {}, **settings) == []  # what was wanted fits
    found = plan_search.nearest(high, {"Q2_K": (published_table(T2V.replace("Q3_K_M", "Q2_K")), high)}, model_low=low,
                                **settings)  # fmt: skip
    assert found[0].changes == {"quantisation": "Q2_K"}
    assert [stage.name for stage in found[0].plan.stages] == ["sampling high", "sampling low", "saving"]


# ---- views


def test_the_text_draws_each_stage_to_scale():
    """Forty characters are the recommended working set; # is weights, = the rest of the device."""
    machine = Machine(16 * GIB, 10 * GIB)
    stages = (
        Stage("one", 4 * GIB, Quantities({"x": 4 * GIB}), Quantities({"y": 2 * GIB}), note="6 tiles"),
        Stage("three", 0, Quantities({"x": 15 * GIB}), Quantities()),
    )
    made = Plan("Wan", machine, TINY, "batched", stages)
    first, second = plan_views.to_text(made).splitlines()[2:4]
    assert first == f"one    {'#' * 16}{'=' * 16}{' ' * 8}|    8.0 GiB, 10.0 in all, 6 tiles"
    assert second == f"three  {'=' * 40}|{'=' * 20}   15.0 GiB, 15.0 in all"
    lines = plan_views.to_text(made).splitlines()
    assert "Both prompts are evaluated at once." in lines and lines[-1].startswith("No smaller size")
    apart, none = (plan_views.to_text(replace(made, cfg=cfg, stages=stages[:1])) for cfg in ("apart", "none"))
    assert apart.endswith("Both prompts are evaluated one after the other.") and "prompts" not in none


def test_refusals_name_the_nearest_settings_and_their_risk():
    made, fits, risk = (Plan("Wan", MACS[16], TINY, "none", (stage("one", gib * GIB),)) for gib in (20, 1, 11))
    for other, words in ((fits, "with 5 frames it would fit."), (risk, "with 5 frames it would fit, with swap risk.")):
        assert plan_views.refusal(made, [plan_search.Proposal({"frames": "5 frames"}, 1.0, other)]).endswith(words)
    assert plan_views.refusal(made, []).endswith("; no smaller setting of this model would fit.")


def test_the_table_of_macs_plans_for_each():
    rows = plan_views.macs_table(published_table(T2V), {"machine": MACS[8], **SMALL}).splitlines()[1:]
    verdicts = [re.split(r"  +", row)[2] for row in rows]
    made = [plan(published_table(T2V), machine=machine, **SMALL) for machine in MACS.values()]
    assert verdicts == [planner.VERDICTS[one.verdict] for one in made] and len(set(verdicts)) > 1


def test_the_picture_shows_each_stage_in_its_verdict_s_colour():
    """Bars to scale: weights, working memory, process; the dashed line at the recommended working set."""
    machine = Machine(16 * GIB, 10 * GIB)
    stages = (
        Stage("one", 4 * GIB, Quantities({"x": 2 * GIB}), Quantities({"y": GIB}), rounding=GIB),
        Stage("two", 0, Quantities({"x": 11 * GIB}), Quantities({"y": 2 * GIB})),
    )
    picture = (plan_views.to_picture(Plan("Wan", machine, TINY, "none", stages))[0] * 255).round().astype(int)
    scale = (plan_views.WIDTH - plan_views.LEFT - plan_views.RIGHT) / (13 * GIB)
    wide = {colour: columns(picture, colour) for colour in (plan_views.WEIGHTS, plan_views.NEEDED, plan_views.PROCESS)}
    assert wide[plan_views.WEIGHTS] == pytest.approx(5 * GIB * scale, abs=2)
    assert wide[plan_views.NEEDED] == pytest.approx(11 * GIB * scale, abs=2)
    assert wide[plan_views.PROCESS] == pytest.approx(2 * GIB * scale, abs=2)
    (dashes,) = np.nonzero(((picture == plan_views.TEXT).all(-1)).sum(0) > 20)
    assert dashes.mean() == pytest.approx(plan_views.LEFT + 10 * GIB * scale, abs=2)
    colours = plan_views.COLOURS
    figures = picture[:, -plan_views.RIGHT :]
    assert [(figures == colours[verdict]).all(-1).any() for verdict in colours] == [True, True, False]
    badge = picture[plan_views.MARGIN + 2, plan_views.MARGIN + 12]
    assert tuple(badge) == colours["swap risk"]


def columns(picture, colour):
    """How wide the widest run of a colour is."""
    return int((picture == colour).all(-1).sum(1).max())


def test_a_picture_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    made = Plan("Wan", MACS[16], TINY, "none", (stage("one", GIB),))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan_views.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        plan_views.save_picture(made, tmp_path / "chart.png")
    assert list(tmp_path.iterdir()) == []
