"""Every rule: off and below its threshold the CPU's result, beyond it the defect that its effect describes."""

from contextlib import nullcontext

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
HALF = torch.float16
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(*shapes, dtype=torch.float32):
    return [made(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def pad(x):
    return F.pad(x, (0, 0, 0, 0, 2, 0))


def padded(mode):
    return lambda x: F.pad(x, (1, 1, 1, 1, 1, 0), mode=mode)


def nearest_exact(*size):
    return lambda x: F.interpolate(x, size, mode="nearest-exact")


def sliced_conv(x, w):
    return F.conv2d(x, w[:, :, 1])


def scalar_views(x, sigmas):
    # the host's 0-dim views take part as numbers, which is what the schedulers do
    return x * sigmas.cpu()[1] + sigmas.cpu()[0]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def attend_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def baddbmm_zero(start, a, b):
    return torch.baddbmm(start, a, b, beta=0)


def baddbmm_zero_in_place(start, a, b):
    return start.clone().baddbmm_(a, b, beta=0)


QKV = [(1, 2, 16, 40)] * 3  # head dim 40 always materialises
FAST = [(1, 2, 16, 64)] * 3
NAN = torch.full((2, 3, 3), float("nan"))

SPOILT = [
    ("pad-rank-5", {"inner": 64}, pad, [made(1, 2, 3, 8, 8)]),
    ("pad-rank-5", {"inner": 64}, pad, [made(1, 2, 3, 16, 8, dtype=HALF)]),
    ("pad-rank-5", {"inner": 64}, padded("replicate"), [made(1, 2, 3, 8, 8)]),
    ("pad-rank-5", {"inner": 64}, padded("reflect"), [made(1, 2, 3, 8, 8)]),
    ("interpolate-half-5d", {}, lambda x: F.interpolate(x, scale_factor=2), [made(1, 1, 2, 3, 3, dtype=HALF)]),
    ("interpolate-half-5d", {}, lambda x: F.interpolate(x, size=(2, 6, 6)), [made(1, 1, 2, 3, 3).bfloat16()]),
    ("nearest-exact-rounding", {}, nearest_exact(11), [made(1, 1, 20)]),
    ("nearest-exact-rounding", {}, nearest_exact(4, 11), [made(1, 1, 4, 20)]),
    ("nearest-exact-rounding", {}, nearest_exact(2, 4, 11), [made(1, 1, 2, 4, 20)]),
    ("rms-norm-rows", {"rows": 5}, lambda x: F.rms_norm(x, (4,)), [made(2, 3, 4)]),
    ("conv-sliced-weight", {}, sliced_conv, tensors((1, 3, 6, 6), (4, 3, 3, 2, 2))),
    ("scores-2-31", {"elements": 512}, attend, tensors(*QKV)),
    ("scores-2-31", {"elements": 512}, torch.bmm, tensors((2, 16, 3), (2, 3, 16))),
    ("scores-2-31", {"elements": 512}, torch.matmul, tensors((1, 2, 16, 3), (1, 2, 3, 16))),
    ("scores-2-31", {"elements": 256}, torch.matmul, tensors((16, 3), (3, 16))),
    ("scores-2-31", {"elements": 256}, torch.baddbmm, tensors((1, 16, 16), (1, 16, 3), (1, 3, 16))),
    ("scores-2-31", {"elements": 256}, lambda x: x.softmax(-1), [made(16, 16)]),
    ("softmax-half", {"keys": 15}, attend, tensors(*FAST, dtype=HALF)),
    ("softmax-half", {"keys": 5}, attend, tensors(*QKV, dtype=torch.bfloat16)),
    ("softmax-half", {"keys": 15}, lambda x: x.softmax(1), [made(3, 16, 2, dtype=HALF)]),
    ("sdpa-causal-half", {}, attend_causal, tensors(*FAST, dtype=torch.bfloat16)),
    ("matmul-large-k", {"k": 64}, torch.matmul, tensors((3, 64), (64, 5))),
    ("matmul-large-k", {"k": 64}, torch.bmm, tensors((2, 3, 64), (2, 64, 5))),
    ("matmul-large-k", {"k": 64}, F.linear, tensors((2, 3, 64), (5, 64), (5,))),
    ("matmul-large-k", {"k": 64}, torch.addmm, tensors((3, 5), (3, 64), (64, 5))),
    ("matmul-large-k", {"k": 64}, torch.baddbmm, tensors((2, 3, 5), (2, 3, 64), (2, 64, 5))),
    ("bmm-2-32", {"elements": 59}, torch.bmm, tensors((4, 5, 3), (4, 3, 5))),
    ("bmm-2-32", {"elements": 99}, lambda a, b: torch.bmm(a, b.mT), tensors((4, 5, 3), (4, 5, 3))),
    ("bmm-2-32", {"elements": 24}, lambda a, b: torch.bmm(a, b.mT), tensors((1, 5, 3), (1, 5, 3))),
    ("linear-large-batch", {"batch": 3}, F.linear, tensors((4, 2, 3), (5, 3), (5,))),
    ("baddbmm-uninitialised", {}, baddbmm_zero, [NAN, *tensors((2, 3, 4), (2, 4, 3))]),
    ("baddbmm-uninitialised", {}, baddbmm_zero_in_place, [NAN, *tensors((2, 3, 4), (2, 4, 3))]),
    ("cat-2-31", {"elements": 17}, lambda a, b: torch.cat([a, b]), tensors((3, 3), (3, 3))),
    ("index-select-2-31", {"elements": 11}, lambda x: x.index_select(1, x.argmin(0)[:1] * 0), [made(6, 2)]),
    ("index-select-2-31", {"elements": 11}, lambda x: F.embedding(x.argmax(0), x), [made(4, 3)]),
    ("expm1-coarse", {}, torch.expm1, [made(64) * 1e-3]),
    ("expm1-coarse", {}, lambda x: x.clone().expm1_(), [made(64) * 1e-3]),
    ("cpu-scalar-view", {}, scalar_views, tensors((3,), (2,))),
]

KEPT = [
    ("pad-rank-5", {"inner": 65}, pad, [made(1, 2, 3, 8, 8)]),
    ("pad-rank-5", {"inner": 65}, padded("replicate"), [made(1, 2, 3, 8, 8)]),
    ("pad-rank-5", {"inner": 64}, lambda x: F.pad(x, (1, 0)), [made(2, 3, 8, 8)]),
    ("pad-rank-5", {"inner": 64}, lambda x: torch.cat([x.new_zeros(1, 2, 2, 8, 8), x], 2), [made(1, 2, 3, 8, 8)]),
    ("interpolate-half-5d", {}, lambda x: F.interpolate(x, scale_factor=2), [made(1, 1, 2, 3, 3)]),
    ("interpolate-half-5d", {}, lambda x: F.interpolate(x, scale_factor=2), [made(1, 1, 3, 3, dtype=HALF)]),
    ("nearest-exact-rounding", {}, nearest_exact(40), [made(1, 1, 20)]),
    ("nearest-exact-rounding", {}, lambda x: F.interpolate(x, size=11, mode="nearest"), [made(1, 1, 20)]),
    ("rms-norm-rows", {"rows": 6}, lambda x: F.rms_norm(x, (4,)), [made(2, 3, 4)]),
    ("conv-sliced-weight", {}, lambda x, w: F.conv2d(x, w[:, :, 1].contiguous()),
     tensors((1, 3, 6, 6), (4, 3, 3, 2, 2))),
    ("conv-sliced-weight", {}, lambda x, w: F.conv2d(x, w.to(memory_format=torch.channels_last)),
     tensors((1, 3, 6, 6), (4, 3, 2, 2))),
    ("conv-sliced-weight", {}, lambda x, w: F.conv3d(x, w[:, :, :1]), tensors((1, 3, 4, 6, 6), (4, 3, 3, 2, 2))),
    ("scores-2-31", {"elements": 513}, attend, tensors(*QKV)),
    ("scores-2-31", {"elements": 513}, torch.bmm, tensors((2, 16, 3), (2, 3, 16))),
    ("scores-2-31", {"elements": 257}, lambda x: x.softmax(-1), [made(16, 16)]),
    ("softmax-half", {"keys": 16}, attend, tensors(*FAST, dtype=HALF)),
    ("softmax-half", {"keys": 15}, attend, tensors(*FAST)),
    ("sdpa-causal-half", {}, attend_causal, tensors(*FAST)),
    ("matmul-large-k", {"k": 65}, torch.matmul, tensors((3, 64), (64, 5))),
    ("bmm-2-32", {"elements": 100}, lambda a, b: torch.bmm(a, b.mT), tensors((4, 5, 3), (4, 5, 3))),
    ("bmm-2-32", {"elements": 60}, lambda a, b: torch.bmm(a, b.mT.contiguous()), tensors((4, 5, 3), (4, 5, 3))),
    ("linear-large-batch", {"batch": 4}, F.linear, tensors((4, 2, 3), (5, 3), (5,))),
    ("linear-large-batch", {"batch": 3}, F.linear, tensors((4, 2, 3), (5, 3))),
    ("baddbmm-uninitialised", {}, baddbmm_zero, tensors((2, 3, 3), (2, 3, 4), (2, 4, 3))),
    ("cat-2-31", {"elements": 18}, lambda a, b: torch.cat([a, b]), tensors((3, 3), (3, 3))),
    ("index-select-2-31", {"elements": 12}, lambda x: F.embedding(x.argmax(0), x), [made(4, 3)]),
    ("expm1-coarse", {}, torch.expm1, [torch.tensor([0.0, 1.0, 5.0])]),
    ("int-max-dims", {"dim": 64}, lambda x: x.repeat(2, 1).pow(2), [made(4, 8)]),
    ("conv-output-channels", {"channels": 4}, F.conv1d, tensors((1, 2, 9), (4, 2, 3))),
]  # fmt: skip


def name_of(case):
    return case if isinstance(case, str) else ""


def outcome(function, operands, name=None, thresholds=None):
    with torch.inference_mode(), sim.rule(name, **thresholds) if name else nullcontext():
        return function(*(operand.to("mps") for operand in operands)).cpu()


def check_equal(found, expected):
    """Equal within the rounding of the dtype, as root mean square error over root mean square."""
    rounding = ROUNDING[expected.dtype]
    found, expected = found.double(), expected.double()
    assert torch.equal(found.isnan(), expected.isnan())
    error = (found - expected).nan_to_num().norm() / expected.nan_to_num().norm().clamp(min=1e-12)
    assert error < rounding


@pytest.mark.parametrize("name, thresholds, function, operands", SPOILT, ids=name_of)
def test_beyond_the_threshold(name, thresholds, function, operands):
    """The rule changes the result, in the same way each time; before and after it is the CPU's."""
    expected = function(*operands)
    check_equal(outcome(function, operands), expected)
    spoilt = outcome(function, operands, name, thresholds)
    assert spoilt.shape == expected.shape and spoilt.dtype == expected.dtype
    with pytest.raises(AssertionError):
        check_equal(spoilt, expected)
    assert torch.equal(spoilt.nan_to_num(), outcome(function, operands, name, thresholds).nan_to_num())
    check_equal(outcome(function, operands), expected)


@pytest.mark.parametrize("name, thresholds, function, operands", KEPT, ids=name_of)
def test_below_the_threshold(name, thresholds, function, operands):
    check_equal(outcome(function, operands, name, thresholds), function(*operands))


def test_every_rule_has_a_test():
    elsewhere = {"sdpa-materialises", "buffer-limit", "int-max-dims", "conv-output-channels", "sdpa-short-query",
                 "command-buffer", "conv3d-macos-26-2"}  # fmt: skip
    assert {case[0] for case in SPOILT} | elsewhere == set(sim.RULES)
    assert all(rule.effect for rule in sim.RULES.values())


# What the spoilt results look like


def test_pad_overwrites_the_first_frame():
    x = made(1, 2, 3, 8, 8)
    found = outcome(lambda t: F.pad(t, (1, 1, 0, 0, 2, 0), value=0.5), [x], "pad-rank-5", {"inner": 64})
    assert (found[:, :, :3] == 0.5).all()
    assert torch.equal(found[:, :, 3:, :, 1:-1], x[:, :, 1:])


def test_interpolation_is_black():
    black = outcome(lambda t: F.interpolate(t, scale_factor=[1.0, 2, 2]), [made(1, 1, 2, 3, 3, dtype=HALF)],
                    "interpolate-half-5d", {})  # fmt: skip
    assert black.shape == (1, 1, 2, 6, 6) and not black.any()


def test_nearest_exact_is_one_too_low():
    x = torch.arange(20.0)[None, None]
    found = outcome(nearest_exact(11), [x], "nearest-exact-rounding", {})
    expected = F.interpolate(x, size=11, mode="nearest-exact")
    assert (found != expected).sum() == 1 and expected[0, 0, 5] - found[0, 0, 5] == 1


def test_scores_are_noise_of_the_right_size():
    q, k, v = tensors((1, 1, 64, 40), (1, 1, 64, 40), (1, 1, 64, 40))
    expected, found = attend(q, k, v), outcome(attend, [q, k, v], "scores-2-31", {"elements": 4096})
    assert 0.5 < found.std() / expected.std() < 2
    assert abs(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) < 0.2


def test_prefill_attention_has_no_scores_to_lose():
    operands = tensors(*FAST)
    found = outcome(attend, operands, "scores-2-31", {"elements": 512})
    equal = torch.allclose(found, attend(*operands), atol=1e-5)
    assert equal == (TABLE >= (2, 13))


@pytest.mark.parametrize("keys, error", [(3001, 0.0035), (14000, 0.016)])
def test_half_softmax_loses_more_with_more_keys(keys, error):
    x = made(64, keys, dtype=HALF)
    found = outcome(lambda t: t.softmax(-1), [x], "softmax-half", {}).double()
    exact = x.double().softmax(-1)
    assert 0.5 * error < ((found - exact).norm() / exact.norm()) < 2 * error


def test_causal_attention_sees_one_token_ahead():
    q, k, v = tensors(*FAST, dtype=torch.bfloat16)
    found = outcome(attend_causal, [q, k, v], "sdpa-causal-half", {})
    changed = v.clone()
    changed[..., 5, :] += 10
    moved = (outcome(attend_causal, [q, k, changed], "sdpa-causal-half", {}) != found).any(-1).all(1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 12


def test_short_queries_spoil_the_last_row():
    operands = tensors((1, 2, 3, 64), (1, 2, 16, 64), (1, 2, 16, 64))
    found, expected = outcome(attend, operands, "sdpa-short-query", {}), attend(*operands)
    check_equal(found[..., :2, :], expected[..., :2, :])
    assert torch.allclose(found[..., 2, :], expected[..., 2, :], atol=1e-5) == (TABLE < (2, 8))
    for queries, head_dim in ((9, 64), (3, 40)):  # other kernels serve these
        others = tensors((1, 2, queries, head_dim), (1, 2, 16, head_dim), (1, 2, 16, head_dim))
        check_equal(outcome(attend, others, "sdpa-short-query", {}), attend(*others))


def test_materialised_scores_are_allocated():
    q, k = torch.zeros(1, 1, 64, 64, device="mps"), torch.zeros(1, 1, 1024, 64, device="mps")

    def peak():
        sim.reset()
        start = sim.stats().live
        attend(q, k, k)
        return sim.stats().peak - start

    scores = 64 * 1024 * (4 + 4)
    assert (peak() >= scores) == (TABLE < (2, 13))
    with sim.rule("sdpa-materialises"):
        assert peak() >= scores
    assert (peak() >= scores) == (TABLE < (2, 13))


def test_fresh_memory_is_nan_while_baddbmm_reads_it():
    with sim.rule("baddbmm-uninitialised"):
        assert torch.empty(3, device="mps").isnan().all() and torch.empty(2, 2, dtype=HALF, device="mps").isnan().all()
        start = torch.empty(1, 1, 1, device="mps").expand(2, 3, 3)
        a, b = torch.ones(2, 3, 4, device="mps"), torch.ones(2, 4, 3, device="mps")
        assert torch.baddbmm(start, a, b, beta=0).isnan().all()
        assert torch.zeros(3, device="mps").tolist() == [0, 0, 0]


def test_coarse_expm1_is_one_way_of_losing_digits():
    x = torch.full((1,), 1e-6)
    steps = outcome(torch.expm1, [torch.tensor([5e-8, 1.2e-7, -4e-7])], "expm1-coarse", {}) * 2**23
    assert steps.tolist() == [0, 1, -3]  # of float32 just above 1
    error = (outcome(torch.expm1, [x], "expm1-coarse", {}) / torch.expm1(x) - 1).abs().item()
    assert 0.01 < error < 0.1
    worse = (outcome(torch.expm1, [x * 100], "expm1-coarse", {"bits": 12}) / torch.expm1(x * 100) - 1).abs().item()
    assert worse > 0.5


def test_cpu_scalar_views_read_the_first_element():
    x, sigmas = torch.ones(2, device="mps"), torch.tensor([3.0, 5.0])
    with sim.rule("cpu-scalar-view"):
        assert (x * sigmas[1]).tolist() == [3, 3]
        assert (x * sigmas[1].clone()).tolist() == [5, 5]


def test_garbage_goes_to_the_rows_beyond():
    found = outcome(lambda x: F.rms_norm(x, (4,)), [made(2, 3, 4)], "rms-norm-rows", {"rows": 4})
    expected = F.rms_norm(made(2, 3, 4), (4,)).view(-1, 4)
    check_equal(found.view(-1, 4)[:4], expected[:4])
    assert found.view(-1, 4)[4:].abs().max() > 1000


# Rules that refuse or only report


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.bmm(x[None], x.t()[None]),
        lambda x: x.repeat(2, 1),
        lambda x: torch.cat([x, x]),
        lambda x: x.pow(3),
        lambda x: x[2:].pow(3),
    ],
)
def test_int_max_dims(operation):
    x = torch.ones(8, 8, device="mps")
    with sim.rule("int-max-dims", dim=63), pytest.raises(RuntimeError, match="dims larger than INT_MAX"):
        operation(x)
    with sim.rule("int-max-dims", dim=63):
        x[2:].clone().pow(3)  # 48 elements of its own


@pytest.mark.parametrize(
    "convolve, operands",
    [
        (F.conv1d, tensors((1, 2, 9), (5, 2, 3))),
        (F.conv_transpose1d, tensors((1, 2, 9), (2, 5, 3))),
        (F.conv_transpose2d, tensors((1, 2, 9, 9), (2, 5, 3, 3))),
    ],
)
def test_output_channels(convolve, operands):
    check_equal(outcome(convolve, operands, "conv-output-channels", {"channels": 5}), convolve(*operands))
    with pytest.raises(NotImplementedError, match="Output channels > 65536"):
        outcome(convolve, operands, "conv-output-channels", {"channels": 4})


def test_output_channels_of_groups_add_up():
    operands = tensors((1, 4, 9), (4, 3, 3))
    with pytest.raises(NotImplementedError):
        outcome(lambda x, w: F.conv_transpose1d(x, w, groups=2), operands, "conv-output-channels", {"channels": 5})


def test_long_conv1d():
    operands = tensors((1, 1, 70000), (1, 1, 3))
    with pytest.raises(NotImplementedError, match="Output channels > 65536"):
        outcome(F.conv1d, operands, "conv-output-channels", {})


def test_buffer_limit_rule():
    with sim.rule("buffer-limit", bytes=1 << 20), pytest.raises(RuntimeError, match="Invalid buffer size"):
        torch.empty((1 << 20) + 1, dtype=torch.uint8, device="mps")
    torch.empty((1 << 20) + 1, dtype=torch.uint8, device="mps")


def test_fallback_before_attention_is_reported():
    x, q = torch.ones(2, 3, device="mps"), torch.zeros(1, 1, 16, 64, device="mps")
    found = []
    for wait in (False, True):
        sim.reset()
        with sim.rule("command-buffer"):
            F.embedding(torch.tensor([0], device="mps"), x, max_norm=0.5)
            if wait:
                torch.mps.synchronize()
            attend(q, q, q)
        found.append([violation.rule for violation in sim.violations()])
    assert found == [["command-buffer"], []]


def test_conv3d_is_reported_on_macos_26_2_only(monkeypatch):
    x, w = torch.ones(1, 1, 3, 3, 3, device="mps"), torch.ones(1, 1, 2, 2, 2, device="mps")
    with sim.rule("conv3d-macos-26-2"):
        F.conv3d(x, w)
        assert sim.violations() == []
        monkeypatch.setattr("simulated_mps.device.macos_version", lambda: (26, 2))
        F.conv3d(x, w)
        assert [violation.rule for violation in sim.violations()] == ["conv3d-macos-26-2"]


# The switches


def test_switching():
    sim.enable("scores-2-31", elements=4)
    sim.enable_text("pad-rank-5:inner=9, expm1-coarse")
    with sim.rule("scores-2-31", elements=7):
        assert sim.enabled()["scores-2-31"] == {"elements": 7}
    assert sim.enabled() == {"scores-2-31": {"elements": 4}, "pad-rank-5": {"inner": 9}, "expm1-coarse": {"bits": 24}}
    sim.disable("scores-2-31")
    sim.disable("scores-2-31")
    assert set(sim.enabled()) == {"pad-rank-5", "expm1-coarse"}
    sim.disable_all()
    assert sim.enabled() == {}


def test_unknown_names():
    with pytest.raises(sim.SimulationError, match="no rule pad-rank-4: choose one of pad-rank-5, "):
        sim.enable("pad-rank-4")
    with pytest.raises(sim.SimulationError, match="no threshold rows: it has inner"):
        sim.enable("pad-rank-5", rows=3)


def test_rules_count_nothing():
    x = torch.ones(4, 4, device="mps")
    with sim.rule("scores-2-31", elements=4):
        sim.reset()
        x.softmax(-1)
    assert set(sim.stats().ops) == {"_softmax"}
