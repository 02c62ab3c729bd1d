"""The cures that cut large tensors and convolutions into pieces, run on the CPU with their limits scaled down."""

import pytest
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import gate, int_max
from apple_silicon_video.tests.unit.mps_cures import cured, error, marker, noise

torch.set_num_threads(1)


@pytest.fixture
def everywhere(monkeypatch):
    """The cures act on CPU tensors too."""
    monkeypatch.setattr(gate, "acts_on", lambda value: isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("shape", [(6, 5, 4), (1, 6, 4), (1, 1, 30)])
def test_cat_is_filled_in_pieces(everywhere, dim, shape):
    parts = [noise(*shape, seed=0), noise(*shape, seed=1).half(), torch.zeros(0), noise(*shape, seed=2).half()]
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
