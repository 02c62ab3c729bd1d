"""The cures of mps_patches, run on the CPU by telling them that every tensor is one of theirs, against float64.

Size triggers are scaled down. The simulated device shows the defects themselves (tests/simulated_mps).
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import gate, quantised_dtype
from apple_silicon_video.mps_patches import interpolate as interpolation
from apple_silicon_video.quantization import scaled_formats
from apple_silicon_video.tests.unit.mps_cures import cured, error, marker, noise, rounding

torch.set_num_threads(1)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def everywhere(monkeypatch):
    """The cures act on CPU tensors too."""
    monkeypatch.setattr(gate, "acts_on", lambda value: isinstance(value, torch.Tensor))


# ---- pad-rank-5

PADS = [
    (0, 0, 0, 0, 2, 0),
    (1, 1, 1, 1, 2, 0),
    (0, 3),
    (2, 1, 0, 4),
    (0, 0, 0, 0, 0, 0, 1, 2),
    (1, 0, 0, 2, 0, 0, 3, 0, 0, 1),
    (-1, 2, 0, 0, 1, -1),
    (-1, -2, 0, -1),
]


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("value", [None, 0.0, -1.5])
def test_constant_pad_is_concatenation(everywhere, pad, value):
    frames = noise(2, 3, 4, 6, 5)
    with gate.scaled(pad_rank_5=4):
        actual = cured("pad-rank-5", "pad")(frames, pad, value=value)
        by_keyword = cured("pad-rank-5", "pad")(input=frames, pad=list(pad), mode="constant", value=value)
    assert torch.equal(actual, F.pad(frames, pad, value=value)) and torch.equal(by_keyword, actual)


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
@pytest.mark.parametrize("pad", [(1, 2, 2, 1, 2, 0), (0, 0, 0, 0, 1, 1), (3, 3, 0, 0, 0, 0)])
def test_other_pads_gather_rows(everywhere, mode, pad):
    frames = noise(2, 3, 4, 6, 5)
    with gate.scaled(pad_rank_5=4):
        assert torch.equal(cured("pad-rank-5", "pad")(frames, pad, mode), F.pad(frames, pad, mode))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_pad_keeps_the_dtype(everywhere, dtype):
    frames = (noise(1, 1, 2, 4, 4) * 3).to(dtype)
    with gate.scaled(pad_rank_5=4):
        actual = cured("pad-rank-5", "pad")(frames, (1, 0, 0, 0, 1, 0))
    assert actual.dtype == dtype and torch.equal(actual, F.pad(frames, (1, 0, 0, 0, 1, 0)))


def test_pad_leaves_alone_what_is_right(everywhere):
    pad = cured("pad-rank-5", "pad", marker)
    assert pad(noise(1, 1, 2, 255, 256), (0, 0, 0, 0, 2, 0)) == "original"
    assert pad(noise(1, 2, 300, 300), (0, 0, 0, 0, 2, 0)) == "original"
    with gate.scaled(pad_rank_5=4):
        assert pad(noise(1, 1, 2, 4, 4), (0, 0, 0, 0)) == "original"
        assert pad(noise(1, 1, 2, 4, 4), (1, 1, 1, 1, 1, 1), "circular") == "original"
        assert pad(noise(1, 1, 2, 4, 4), (0, 0, 0, -5)) == "original"


def test_pad_at_the_true_threshold(everywhere):
    frames = noise(1, 1, 2, 256, 256)
    assert torch.equal(cured("pad-rank-5", "pad")(frames, (0, 0, 0, 0, 2, 0)), F.pad(frames, (0, 0, 0, 0, 2, 0)))


# ---- interpolation


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("rank", "mode", "arguments"),
    [
        (3, "nearest", {"size": 11}),
        (3, "linear", {"scale_factor": 1.7, "align_corners": True}),
        (3, "nearest-exact", {"size": [7]}),
        (4, "bilinear", {"size": (5, 9), "antialias": True}),
        (4, "bicubic", {"scale_factor": (2, 1.5)}),
        (4, "area", {"size": 3}),
        (4, "nearest", {"scale_factor": 1.5, "recompute_scale_factor": True}),
        (5, "nearest", {"scale_factor": [1.0, 2.0, 2.0]}),
        (5, "nearest-exact", {"size": (3, 5, 7)}),
        (5, "trilinear", {"size": [4, 9, 6], "align_corners": False}),
        (5, "area", {"size": 2}),
    ],
)
def test_half_interpolation_runs_in_float32(everywhere, dtype, rank, mode, arguments):
    x = noise(2, 3, 4, 6, 8, dtype=dtype)[(slice(None),) * 2 + (0,) * (5 - rank)]
    seen = []

    def original(x, *args, **kwargs):
        seen.append(x.dtype)
        return F.interpolate(x, *args, **kwargs)

    actual = cured("interpolate-half-5d", "interpolate", original)(x, mode=mode, **arguments)
    assert seen == [torch.float32] and actual.dtype == dtype
    exact = F.interpolate(x.double(), mode=mode, **arguments)
    assert error(actual, exact) <= (0 if "nearest" in mode else torch.finfo(dtype).eps)


def test_half_interpolation_takes_positions(everywhere):
    x = noise(1, 2, 3, 4, 5, dtype=torch.float16)
    actual = cured("interpolate-half-5d", "interpolate", F.interpolate)(x, None, [1.0, 2.0, 2.0], "nearest")
    assert torch.equal(actual, x.repeat_interleave(2, 3).repeat_interleave(2, 4))
    assert cured("interpolate-half-5d", "interpolate", marker)(x.float(), 3) == "original"


def test_nearest_exact_rows_are_right():
    """Within one rounding of the exact rational position: ties may go to either side in float32, nothing else."""
    for source, target in itertools.product(range(1, 70), repeat=2):
        rows = interpolation.nearest_exact_rows(source, target).tolist()
        for row, found in enumerate(rows):
            exact, remainder = divmod((2 * row + 1) * source, 2 * target)
            assert found == exact or (remainder == 0 and found == exact - 1), (source, target, row)


@pytest.mark.parametrize(("source", "target"), [(20, 11), (60, 45), (104, 78), (90, 64), (37, 12), (7, 5), (480, 300)])
def test_nearest_exact_equals_the_cpu(everywhere, source, target):
    cure = cured("nearest-exact-rounding", "interpolate", F.interpolate)
    x = noise(2, 3, 5, source)
    assert torch.equal(cure(x, (3, target), mode="nearest-exact"), F.interpolate(x, (3, target), mode="nearest-exact"))
    factor = target / source + 0.01
    for extra in ({}, {"recompute_scale_factor": True}, {"recompute_scale_factor": False}):
        arguments = {"scale_factor": [1.0, factor], "mode": "nearest-exact", **extra}
        assert torch.equal(cure(x, **arguments), F.interpolate(x, **arguments)), arguments


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_nearest_exact_in_all_ranks(everywhere, rank):
    x = noise(1, 2, *(20, 9, 14)[: rank - 2])
    arguments = {"size": [11, 6, 9][: rank - 2], "mode": "nearest-exact"}
    assert torch.equal(cured("nearest-exact-rounding", "interpolate")(x, **arguments), F.interpolate(x, **arguments))


def test_nearest_exact_leaves_alone_what_is_right(everywhere):
    cure = cured("nearest-exact-rounding", "interpolate", marker)
    x = noise(1, 2, 4, 6)
    assert cure(x, scale_factor=2.0, mode="nearest-exact") == "original"
    assert cure(x, (8, 18), mode="nearest-exact") == "original"
    assert cure(x, (3, 5), mode="nearest") == "original"
    assert cure(x, (3, 5), 2.0, "nearest-exact") == "original"
    assert cure(x, (3, 5, 7), mode="nearest-exact") == "original"


# ---- rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("shape", "normalized"), [((5, 7, 8), (8,)), ((40, 16), (16,)), ((3, 4, 2, 6), (2, 6))])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_rms_norm(everywhere, dtype, shape, normalized, weighted, eps):
    x = noise(*shape, dtype=dtype)
    weight = noise(*normalized, seed=1, dtype=dtype) if weighted else None
    with gate.scaled(rms_norm_rows=7):
        actual = cured("rms-norm-rows", "rms_norm")(x, normalized, weight, eps=eps)
    wide = x.double()
    mean = wide.square().mean(tuple(range(-len(normalized), 0)), keepdim=True)
    exact = wide / (mean + (torch.finfo(torch.float32).eps if eps is None else eps)).sqrt()
    exact = exact if weight is None else exact * weight.double()
    assert actual.dtype == dtype and error(actual, exact) <= rounding(dtype)
    assert error(actual, F.rms_norm(x, normalized, weight, eps)) <= 2 * rounding(dtype)


def test_rms_norm_up_to_the_limit_is_the_original(everywhere):
    with gate.scaled(rms_norm_rows=12):
        assert cured("rms-norm-rows", "rms_norm", marker)(noise(3, 4, 8), (8,)) == "original"


# ---- matrix products

PRODUCTS = [
    ("mm", (9, 48), (48, 5)),
    ("bmm", (3, 9, 48), (3, 48, 5)),
    ("matmul", (9, 48), (48,)),
    ("matmul", (48,), (48, 5)),
    ("matmul", (48,), (48,)),
    ("__matmul__", (2, 3, 9, 48), (3, 48, 5)),
    ("__matmul__", (9, 48), (2, 48, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("name", "left", "right"), PRODUCTS)
def test_products_are_split(everywhere, dtype, name, left, right):
    left, right = noise(*left, dtype=dtype), noise(*right, seed=1, dtype=dtype)
    seen = []

    def original(a, b):
        seen.append((a.dtype, a.shape[-1]))
        return torch.matmul(a, b)

    with gate.scaled(matmul_large_k=16):
        actual = cured("matmul-large-k", name, original)(left, right)
    assert actual.dtype == dtype and len(seen) == 4 and all(d == torch.float32 and k < 16 for d, k in seen)
    assert error(actual, left.double() @ right.double()) <= rounding(dtype)


def test_products_by_keyword_and_the_rest(everywhere):
    left, right = noise(4, 20), noise(20, 3, seed=1)
    with gate.scaled(matmul_large_k=16):
        assert error(cured("matmul-large-k", "mm", torch.mm)(left, mat2=right), left @ right) < 1e-6
        assert error(cured("matmul-large-k", "matmul", torch.mm)(input=left, other=right), left @ right) < 1e-6
        assert cured("matmul-large-k", "mm", marker)(left, right, out=noise(4, 3)) == "original"
        assert cured("matmul-large-k", "mm", marker)(left.long(), right.long()) == "original"
        assert cured("matmul-large-k", "mm", marker)(left[:, :15], right[:15]) == "original"
        assert cured("matmul-large-k", "mm", marker)(left, right[:4]) == "original"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 0.5), (0.25, 2)])
@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addbmm"])
def test_added_products_are_split(everywhere, dtype, beta, alpha, name):
    batch = () if name == "addmm" else (3,)
    left, right = noise(*batch, 9, 41, dtype=dtype), noise(*batch, 41, 5, seed=1, dtype=dtype)
    shape = (3, 9, 5) if name == "baddbmm" else (9, 5)
    added = noise(*shape, seed=2, dtype=dtype)
    if beta == 0:
        added = torch.full_like(added, math.nan)
    with gate.scaled(matmul_large_k=16):
        actual = cured("matmul-large-k", name)(added, left, right, beta=beta, alpha=alpha)
    exact = left.double() @ right.double()
    exact = alpha * (exact.sum(0) if name == "addbmm" else exact)
    exact = exact if beta == 0 else exact + beta * added.double()
    assert actual.dtype == dtype and error(actual, exact) <= rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_split(everywhere, dtype, biased):
    x, weight = noise(2, 3, 41, dtype=dtype), noise(5, 41, seed=1, dtype=dtype)
    bias = noise(5, seed=2, dtype=dtype) if biased else None
    with gate.scaled(matmul_large_k=16):
        actual = cured("matmul-large-k", "linear", F.linear)(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.dtype == dtype and error(actual, exact) <= rounding(dtype)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bid,bjd->bij", ((2, 3, 41), (2, 4, 41))),
        ("b h i j, b h j d -> b h i d", ((2, 2, 3, 41), (2, 2, 41, 5))),
        ("...i,...i", ((3, 41), (3, 41))),
        ("i...,...ij->...j", ((41, 2), (2, 41, 3))),
        ("abc,abd->cd", ((9, 7, 3), (9, 7, 4))),
        ("ij,jk,kl->il", ((3, 41), (41, 40), (40, 2))),
        ("abcd,abce->de", ((20, 20, 3, 2), (20, 20, 3, 2))),
    ],
)
def test_einsum_is_split(everywhere, equation, shapes):
    operands = [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    limit = gate.LIMITS["matmul-large-k"]
    seen = []

    def original(equation, *operands):
        seen.append(max(operand.numel() for operand in operands))
        return torch.einsum(equation, *operands)

    with gate.scaled(matmul_large_k=16):
        for form in (operands, [operands]):
            seen.clear()
            actual = cured("matmul-large-k", "einsum", original)(equation, *form)
            exact = torch.einsum(equation, *(operand.double() for operand in operands))
            assert len(seen) > 1 and error(actual, exact) < 1e-6
    assert gate.LIMITS["matmul-large-k"] == limit


def test_einsum_leaves_alone_what_is_short_or_strange(everywhere):
    cure = cured("matmul-large-k", "einsum", marker)
    with gate.scaled(matmul_large_k=16):
        assert cure("ij,jk->ik", noise(20, 4), noise(4, 20)) == "original"
        assert cure("ii,ij->j", noise(20, 20), noise(20, 3)) == "original"
        assert cure("ij,kl->ijkl", noise(20, 2), noise(20, 2)) == "original"
        assert cure("ij->i", noise(20, 20)) == "original"
        assert cure(noise(20, 2), [0, 1], noise(20, 2), [0, 1]) == "original"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((6, 5, 7), (6, 7, 4)),
        ((2, 3, 5, 7), (2, 3, 7, 4)),
        ((3, 5, 7), (2, 1, 7, 4)),
        ((1, 50, 7), (1, 7, 40)),
        ((1, 3, 90), (1, 90, 200)),
    ],
)
def test_bmm_in_contiguous_pieces(everywhere, left, right):
    left, right = noise(*left), noise(*right, seed=1).mT.contiguous().mT
    limit = 100
    name = "bmm" if left.dim() == right.dim() == 3 else "matmul"

    def original(a, b):
        assert a.is_contiguous() and b.is_contiguous()
        assert max(a.numel(), b.numel(), a[..., 0].numel() * b.shape[-1]) <= limit
        return torch.matmul(a, b)

    with gate.scaled(bmm_2_32=limit):
        assert error(cured("bmm-2-32", name, original)(left, right), left.double() @ right.double()) < 1e-6
        large = max(left.numel(), right.numel()) > limit
        left, right = left.contiguous(), right.contiguous()
        if large:
            assert error(cured("bmm-2-32", name, original)(left, right), left.double() @ right.double()) < 1e-6
        else:
            assert cured("bmm-2-32", name, marker)(left, right) == "original"
    assert cured("bmm-2-32", name, marker)(left, right) == "original"


@pytest.mark.parametrize("shape", [(9, 2, 4), (3, 3, 2, 4), (9, 4)])
def test_linear_is_flattened(everywhere, shape):
    x, weight, bias = noise(*shape), noise(6, 4, seed=1), noise(6, seed=2)
    seen = []

    def original(x, weight, bias=None):
        seen.append(x.dim())
        return F.linear(x, weight, bias)

    limit = 2 if len(shape) == 4 else 8
    with gate.scaled(linear_large_batch=limit):
        cure = cured("linear-large-batch", "linear", original)
        assert error(cure(x, weight, bias), F.linear(x, weight, bias)) < 1e-6
        assert error(cure(x.mT.contiguous().mT, weight, bias=bias), F.linear(x, weight, bias)) < 1e-6
        assert seen == [2, 2]
        if len(shape) > 2:
            cure(x, weight)
            assert seen[-1] == len(shape)
            assert cured("linear-large-batch", "linear", marker)(x[..., :limit, :, :], weight, bias) == "original"


def test_linear_with_a_bias_for_each_row(everywhere):
    x, weight, bias = noise(9, 2, 4), noise(6, 4, seed=1), noise(2, 6, seed=2)
    with gate.scaled(linear_large_batch=8):
        actual = cured("linear-large-batch", "linear", F.linear)(x, weight, bias)
    assert error(actual, F.linear(x, weight) + bias) < 1e-6


def test_baddbmm_is_given_zeros(everywhere):
    left, right, nan = noise(3, 4, 5), noise(3, 5, 6, seed=1), torch.full((1, 1, 1), math.nan)

    def original(added, *args, **kwargs):
        assert not added.isnan().any()
        result = torch.baddbmm(added, *args, **kwargs)
        return added.copy_(result) if added.shape == result.shape else result

    for beta in (0, 0.0):
        actual = cured("baddbmm-uninitialised", "baddbmm", original)(nan, left, right, beta=beta, alpha=0.5)
        assert error(actual, 0.5 * (left.double() @ right.double())) < 1e-6
    assert cured("baddbmm-uninitialised", "baddbmm", original)(noise(1, 1, 1), left, right).shape == (3, 4, 6)
    place = torch.full((3, 4, 6), math.nan)
    cured("baddbmm-uninitialised", "baddbmm_", original)(place, left, right, beta=0)
    assert error(place, left.double() @ right.double()) < 1e-6


# ---- quantised weights


@pytest.mark.parametrize("quick", [True, False])
def test_quantised_weights_of_every_kind_are_looked_at(quick, monkeypatch):
    """The probe passes on the CPU, and notices factors that are left out, wrong bytes and a wrong dtype."""
    device = torch.device("cpu")
    assert quantised_dtype.probe(device, quick).ok
    with monkeypatch.context() as patch:
        patch.setattr(scaled_formats.Scales, "multiply", lambda self, dense: None)
        found = quantised_dtype.probe(device, quick)
        assert not found.ok and ("MXFP8" in found.detail or "scale" in found.detail)
    with monkeypatch.context() as patch:
        table = scaled_formats.ScaledFormat.table
        patch.setattr(scaled_formats.ScaledFormat, "table", lambda self, device: table(self, device).roll(1))
        assert not quantised_dtype.probe(device, quick).ok
    with monkeypatch.context() as patch:
        patch.setattr(quantised_dtype, "_product", lambda input, weight: torch.zeros(4, 8, dtype=torch.float16))
        assert not quantised_dtype.probe(device, quick).ok


def test_the_scaled_cases_have_every_format():
    names = {case.name for case in quantised_dtype.SCALED_CASES.values()}
    assert names == set(scaled_formats.SCALED_FORMATS)
    assert any(case.powers_of_two for case in quantised_dtype.SCALED_CASES.values())
