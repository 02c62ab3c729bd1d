"""What MPS refuses, with its own words: dtypes, missing operations, mixed devices, generators, memory."""

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
MIB = 1 << 20


@pytest.mark.parametrize(
    "attempt, operation",
    [
        (lambda x: x.double(), "to"),
        (lambda x: x.to(torch.float64), "to"),
        (lambda x: torch.ones(2, dtype=torch.float64).to("mps"), "to"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device="mps"), "zeros"),
        (lambda x: torch.arange(3, dtype=torch.float64, device="mps"), "arange"),
        (lambda x: x.sum(dtype=torch.float64), "sum"),
        (lambda x: x.to(torch.complex128), "to"),
    ],
)
def test_float64_raises_and_is_counted(attempt, operation):
    x = torch.ones(2, device="mps")
    sim.reset()
    with pytest.raises(TypeError, match="float64"):
        attempt(x)
    assert sim.stats().float64_attempts == 1 and sim.stats().float64_ops == {operation: 1}


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_can_be_held_but_not_converted(name):
    dtype = getattr(torch, name)
    host = torch.ones(4).to(dtype)
    held = host.to("mps")
    assert torch.equal(held.view(torch.uint8).cpu(), host.view(torch.uint8))
    if TABLE >= (2, 15) and name == "float8_e4m3fn":
        assert torch.equal(held.float().cpu(), torch.ones(4))
        return
    with pytest.raises(TypeError, match="does not have support for that dtype"):
        held.float()
    with pytest.raises(TypeError, match="does not have support for that dtype"):
        torch.ones(4, device="mps").to(dtype)


@pytest.mark.parametrize(
    "since, function",
    [
        ((2, 9), lambda x: F.max_pool3d(x, 2)),
        ((2, 9), lambda x: F.avg_pool3d(x, 2)),
        ((2, 8), lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
        ((2, 8), lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact")),
        ((99, 0), lambda x: F.adaptive_max_pool3d(x, 1)),
        ((99, 0), lambda x: F.adaptive_avg_pool3d(x, (2, 2, 1))),
    ],
    ids=["max_pool3d", "avg_pool3d", "trilinear", "nearest-exact", "adaptive_max_pool3d", "adaptive_avg_pool3d"],
)
def test_operations_come_with_their_torch_version(since, function):
    x = torch.randn(1, 1, 4, 4, 4)
    if since <= TABLE:
        torch.testing.assert_close(function(x.to("mps")).cpu(), function(x))
    else:
        with pytest.raises(NotImplementedError, match="not currently implemented for the MPS device"):
            function(x.to("mps"))
    assert sim.stats().fell_back == {}


def test_half_precision_conv_transpose3d():
    x, w = torch.ones(1, 1, 2, 2, 2, device="mps"), torch.ones(1, 1, 2, 2, 2, device="mps")
    F.conv_transpose3d(x, w)
    with pytest.raises(RuntimeError, match="ConvTranspose 3D"):
        F.conv_transpose3d(x.half(), w.half())


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda d, h: d + h, "same device"),
        (lambda d, h: F.silu(d).mul_(h), "same device"),
        (lambda d, h: torch.cat([d, h]), "same device"),
        (lambda d, h: F.linear(d, h), "Placeholder storage"),
        (lambda d, h: d @ h, "Placeholder storage"),
        (lambda d, h: F.embedding(torch.tensor([1]), d), "Placeholder storage"),
        (lambda d, h: F.scaled_dot_product_attention(d[None], h[None], d[None]), "same device type"),
        (lambda d, h: F.conv1d(d[None], h[None]), "should be the same"),
    ],
)
def test_mixed_devices(function, words):
    host = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=words):
        function(host.to("mps"), host)


def test_numbers_and_0_dim_host_tensors_mix():
    x = torch.ones(3, device="mps")
    assert (x * torch.tensor(2.0) + 1).cpu().tolist() == [3, 3, 3]
    assert x[torch.tensor([0, 2])].shape == (2,)


def test_generator_on_the_wrong_device():
    with pytest.raises(RuntimeError, match="Expected a 'mps' device type for generator but found 'cpu'"):
        torch.randn(3, device="mps", generator=torch.Generator())


def test_out_of_memory():
    sim.limits(high_watermark_bytes=4 * MIB, recommended_bytes=3 * MIB)
    held = torch.empty(3 * MIB, dtype=torch.uint8, device="mps")
    with pytest.raises(torch.OutOfMemoryError, match=r"MPS backend out of memory .* PYTORCH_MPS_HIGH_WATERMARK_RATIO"):
        torch.empty(2 * MIB, dtype=torch.uint8, device="mps")
    del held
    torch.empty(2 * MIB, dtype=torch.uint8, device="mps")


def test_buffer_limit():
    sim.limits(max_buffer_bytes=MIB)
    torch.empty(MIB, dtype=torch.uint8, device="mps")
    with pytest.raises(RuntimeError, match="Invalid buffer size"):
        torch.empty(MIB + 1, dtype=torch.uint8, device="mps")


def test_dims_beyond_int_max():
    torch.empty(0, device="mps")
    with pytest.raises(RuntimeError, match="dimensions <= 2147483647"):
        torch.empty(1 << 31, dtype=torch.uint8, device="mps")


def test_attention_refuses_what_mpsgraph_cannot_hold():
    q = torch.empty(1, 40, 1 << 14, 40, dtype=torch.bfloat16, device="mps")  # head dim 40 always materialises
    with pytest.raises(RuntimeError, match=r"2\*\*32"):
        F.scaled_dot_product_attention(q, q, q)
