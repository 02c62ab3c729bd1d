"""The cures of mps_patches, run on the CPU by telling them that every tensor is one of theirs, against float64.

Size triggers are scaled down. The simulated device shows the defects themselves (tests/simulated_mps).
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import gate, probing
from apple_silicon_video.mps_patches import interpolate as interpolation
from apple_silicon_video.mps_patches.registry import DEFECTS

torch.set_num_threads(1)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def everywhere(monkeypatch):
    """The cures act on CPU tensors too."""
    monkeypatch.setattr(gate, "acts_on", lambda value: isinstance(value, torch.Tensor))


def cured(defect_id, attribute, original=None):
    """The wrapper that a cure makes; without an original, one that must not be called."""
    return DEFECTS[defect_id].cure.maker(attribute)(original or forbidden)


def forbidden(*args, **kwargs):
    raise AssertionError("the cure called the original")


def marker(*args, **kwargs):
    return "original"


def noise(*shape, seed=0, dtype=torch.float32):
    return probing.noise(shape, dtype, seed)


def error(actual, expected):
    return probing.relative_error(actual, expected)


def rounding(dtype):
    """What a result in this dtype may be off by, relative to the largest value."""
    return torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)


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
    factor = target / source
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
    ("mm", (9, 41), (41, 5)),
    ("bmm", (3, 9, 41), (3, 41, 5)),
    ("matmul", (9, 41), (41,)),
    ("matmul", (41,), (41, 5)),
    ("matmul", (41,), (41,)),
    ("__matmul__", (2, 3, 9, 41), (3, 41, 5)),
    ("__matmul__", (9, 41), (2, 41, 5)),
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
    assert actual.dtype == dtype and len(seen) == 3 and all(d == torch.float32 and k < 16 for d, k in seen)
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
        assert cured("bmm-2-32", name, marker)(left.contiguous(), right.contiguous()) == "original"
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
        return torch.baddbmm(added, *args, **kwargs)

    for beta in (0, 0.0):
        actual = cured("baddbmm-uninitialised", "baddbmm", original)(nan, left, right, beta=beta, alpha=0.5)
        assert error(actual, 0.5 * (left.double() @ right.double())) < 1e-6
    assert cured("baddbmm-uninitialised", "baddbmm", original)(noise(1, 1, 1), left, right).shape == (3, 4, 6)
    place = torch.full((3, 4, 6), math.nan)
    cured("baddbmm-uninitialised", "baddbmm_", torch.Tensor.baddbmm_)(place, left, right, beta=0)
    assert error(place, left.double() @ right.double()) < 1e-6


# ---- large tensors


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("shape", [(6, 5, 4), (1, 6, 4), (1, 1, 30)])
def test_cat_is_filled_in_pieces(everywhere, dim, shape):
    parts = [noise(*shape, seed=0), noise(*shape, seed=1).half(), torch.zeros(0), noise(*shape, seed=2)]
    with gate.scaled(cat_2_31=25):
        assert torch.equal(cured("cat-2-31", "cat")(parts, dim), torch.cat(parts, dim))
        assert torch.equal(cured("cat-2-31", "cat")(tensors=parts, dim=dim), torch.cat(parts, dim))


@pytest.mark.parametrize("dim", [0, 1, 3, -1, -4])
def test_stack_is_filled_in_pieces(everywhere, dim):
    parts = [noise(4, 3, 5, seed=seed) for seed in range(3)]
    with gate.scaled(cat_2_31=25):
        assert torch.equal(cured("cat-2-31", "stack")(parts, dim), torch.stack(parts, dim))


def test_cat_leaves_alone_what_is_small_or_wrong(everywhere):
    parts = [noise(4, 5), noise(4, 5)]
    assert cured("cat-2-31", "cat", marker)(parts) == "original"
    with gate.scaled(cat_2_31=25):
        assert cured("cat-2-31", "cat", marker)([noise(4, 5), noise(3, 5)], 1) == "original"
        assert cured("cat-2-31", "cat", marker)(parts, 2) == "original"
        assert cured("cat-2-31", "cat", marker)(parts, out=noise(1)) == "original"
        assert cured("cat-2-31", "stack", marker)([noise(4, 5), noise(4, 6)]) == "original"


@pytest.mark.parametrize(("shape", "dim"), [((30, 4), 0), ((30, 4), 1), ((1, 30, 4), 1), ((3, 30, 4), -2), ((100,), 0)])
def test_index_select_from_pieces(everywhere, shape, dim):
    source = noise(*shape)
    last = source.size(dim) - 1
    index = torch.tensor([last, 0, last // 2, 1, last])
    for kind in (torch.int64, torch.int32):
        with gate.scaled(index_select_2_31=25):
            original = within(25, torch.index_select)
            actual = cured("index-select-2-31", "index_select", original)(source, dim, index.to(kind))
        assert torch.equal(actual, source.index_select(dim, index))
    assert cured("index-select-2-31", "index_select", marker)(source, dim, index) == "original"


def within(limit, function):
    """The function, for sources up to a limit only."""

    def checked(source, *args):
        assert source.numel() <= limit
        return function(source, *args)

    return checked


def test_embedding_from_pieces(everywhere):
    table, index = noise(30, 4), torch.tensor([[29, 0, 3], [15, 14, 29]])
    with gate.scaled(index_select_2_31=25):
        cure = cured("index-select-2-31", "embedding")
        assert torch.equal(cure(index, table), F.embedding(index, table))
        assert torch.equal(cure(index, table, padding_idx=3), F.embedding(index, table))
        assert cured("index-select-2-31", "embedding", marker)(index, table, None, 1.0) == "original"
        assert cured("index-select-2-31", "embedding", marker)(index, table, max_norm=1.0) == "original"


def test_int_max(everywhere):
    from apple_silicon_video.mps_patches import int_max

    def small(*tensors):
        assert all(gate.extent(tensor) <= 64 for tensor in tensors)

    def bmm(a, b):
        small(a, b)
        return torch.bmm(a, b)

    def power(x, exponent):
        small(x)
        return torch.pow(x, exponent)

    left, right = noise(5, 9, 7), noise(5, 7, 11, seed=1)
    with gate.scaled(int_max_dims=64):
        for a, b in ((left, right), (left[1:3, :2], right[1:3]), (left.mT.contiguous().mT, right.mT.contiguous().mT)):
            assert error(cured("int-max-dims", "bmm", bmm)(a, b), a.double() @ b.double()) < 1e-6
        for x in (left, left[2], left[1:2, :3], left.flatten(), left.mT):
            assert torch.equal(cured("int-max-dims", "pow", power)(x, 2), x**2)
        assert torch.equal(cured("int-max-dims", "repeat")(left, 2, 1, 3), left.repeat(2, 1, 3))
        assert torch.equal(cured("int-max-dims", "repeat")(left[1], (2, 2, 3)), left[1].repeat(2, 2, 3))
        assert torch.equal(cured("int-max-dims", "cat")([left[1], left[2]], 1), torch.cat([left[1], left[2]], 1))
        assert cured("int-max-dims", "pow", marker)(left[1].clone(), 2) == "original"
        for beta in (0, 0.5):
            actual = cured("int-max-dims", "baddbmm")(noise(1, 1, 11), left, right, beta=beta, alpha=2)
            exact = torch.baddbmm(noise(1, 1, 11).double(), left.double(), right.double(), beta=beta, alpha=2)
            assert error(actual, exact) < 1e-6
    with gate.scaled(int_max_dims=30):
        assert error(int_max.reference_bmm(noise(1, 3, 40), noise(1, 40, 5)), noise(1, 3, 40) @ noise(1, 40, 5)) < 1e-6


# ---- convolutions


def test_conv2d_makes_its_weight_contiguous(everywhere):
    image, kernel = noise(1, 3, 8, 8), noise(4, 3, 3, 3, 3, seed=1)

    def original(image, weight, *args, **kwargs):
        assert weight.is_contiguous()
        return F.conv2d(image, weight, *args, **kwargs)

    actual = cured("conv-sliced-weight", "conv2d", original)(image, kernel[:, :, 1], None, padding=1)
    assert error(actual, F.conv2d(image.double(), kernel[:, :, 1].double(), padding=1)) < 1e-6


CONVOLUTIONS = [
    {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for stride, padding, dilation, groups in (
        (1, 0, 1, 1), (2, 3, 2, 1), ((3,), [1], (1,), 2), (1, "same", 3, 4), (1, "valid", 1, 1), (1, "same", 1, 2),
    )
]  # fmt: skip


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("shape", [(2, 4, 50), (4, 70)])
@pytest.mark.parametrize("limit", [5, 7, 16])
def test_conv1d_by_channels_and_length(everywhere, options, shape, limit):
    x, bias = noise(*shape), noise(12, seed=2)
    weight = noise(12, 4 // options["groups"], 4, seed=1)
    with gate.scaled(conv_output_channels=limit):
        cure = cured("conv-output-channels", "conv1d", limited(limit, F.conv1d))
        for given in (bias, None):
            assert error(cure(x, weight, given, **options), F.conv1d(x, weight, given, **options)) < 1e-6


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("limit", [2, 5])
def test_conv2d_by_channels(everywhere, groups, limit):
    x, weight, bias = noise(1, 4, 5, 5), noise(12, 4 // groups, 3, 3, seed=1), noise(12, seed=2)
    with gate.scaled(conv_output_channels=limit):
        actual = cured("conv-output-channels", "conv2d", F.conv2d)(x, weight, bias, padding=1, groups=groups)
    assert error(actual, F.conv2d(x, weight, bias, padding=1, groups=groups)) < 1e-6


TRANSPOSED = [
    {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups, "dilation": dilation}
    for stride, padding, extra, groups, dilation in (
        (1, 0, 0, 1, 1), (2, 1, 1, 1, 1), (5, 0, 4, 2, 1), ((3,), [2], 0, 4, (2,)), (8, 2, 3, 1, 1), (1, 3, 0, 2, 3),
    )
]  # fmt: skip


@pytest.mark.parametrize("options", TRANSPOSED)
@pytest.mark.parametrize("shape", [(2, 4, 40), (4, 60)])
@pytest.mark.parametrize("limit", [30, 47])
@pytest.mark.parametrize("taps", [1, 4])
def test_conv_transpose1d_by_channels_and_length(everywhere, options, shape, limit, taps):
    x, weight, bias = noise(*shape), noise(4, 36 // options["groups"], taps, seed=1), noise(36, seed=2)
    with gate.scaled(conv_output_channels=limit):
        cure = cured("conv-output-channels", "conv_transpose1d", limited(limit, F.conv_transpose1d))
        for given in (bias, None):
            expected = F.conv_transpose1d(x, weight, given, **options)
            assert error(cure(x, weight, given, **options), expected) < 1e-6


def limited(limit, function):
    """The function, as long as no dimension of its result passes the limit."""

    def checked(*args):
        result = function(*args)
        assert max(result.shape) <= limit
        return result

    return checked


def test_conv_transpose2d_by_channels(everywhere):
    x, weight = noise(1, 4, 5, 5), noise(4, 6, 3, 3, seed=1)
    with gate.scaled(conv_output_channels=5):
        actual = cured("conv-output-channels", "conv_transpose2d", F.conv_transpose2d)(x, weight, None, 2, 1, groups=2)
    assert error(actual, F.conv_transpose2d(x, weight, None, 2, 1, groups=2)) < 1e-6
