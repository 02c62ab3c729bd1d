"""Tensors live on mps:0 and every operation gives what the CPU gives, for all ways an operation can be called."""

import platform

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_place(x):
    x.add_(1).mul_(x).clamp_(max=3)
    x[0] = 7
    x[:, 1::2] *= 2
    x.masked_fill_(x > 2, -1)
    return x


def through_views(x):
    v = x.view(4, 3, 2).transpose(0, 2)[..., 1:]
    v += 10
    return torch.cat([x.reshape(-1), v.flatten(), x.t().contiguous().view(-1), x.unfold(0, 2, 1).sum(-1).flatten()])


def out_arguments(x):
    out = x.new_empty(0)
    torch.matmul(x, x.t(), out=out)
    torch.add(out, 1, out=out)
    torch.cumsum(out, 0, out=out)
    return out


def indexing(x):
    rows = torch.tensor([2, 0, 2], device=x.device)
    y = x.clone()
    y[rows[:2]] = x[rows[1:]]
    y.index_add_(0, rows, x[:3])
    y.scatter_(1, rows[:, None], 5.0)
    taken = torch.take_along_dim(x[:3], rows[:, None], 1).expand(3, 6)
    gathered = x.gather(1, rows[:, None]).expand(3, 6)
    return torch.cat([y, x[rows], gathered, taken, x[x[:, 0] > 0], torch.where(x > 0, x, -x)])


def complex_views(x):
    z = torch.view_as_complex(x.reshape(4, 3, 2))
    rotated = z * torch.polar(torch.ones_like(z.real), z.imag) + z.conj()
    return torch.view_as_real(rotated)


def reductions(x):
    parts = [x.sum(), x.mean(0), x.std(1), x.var(), x.amax(1), x.min(), x.prod(1), x.norm(), x.logsumexp(0), x.median()]
    parts += [x.argmax(1), x.any(), (x > 0).all(1), x.cumsum(1), torch.linalg.vector_norm(x, dim=1), x.count_nonzero(1)]
    return torch.cat([part.float().flatten() for part in parts])


def sorting(x):
    values, order = x.sort(dim=1, descending=True)
    top = x.topk(2, dim=0)
    parts = [values, order, top.values, top.indices, x.argsort(), x.flatten().unique(), x.nonzero()]
    return torch.cat([part.float().flatten() for part in parts])


def norms(x):
    y = x.view(1, 4, 6)
    return torch.cat([F.layer_norm(x, (6,)).view(-1), F.group_norm(y, 2).view(-1), F.rms_norm(x, (6,)).view(-1),
                      F.batch_norm(y, None, None, training=True).view(-1), F.normalize(x).view(-1)])  # fmt: skip


def activations(x):
    functions = (F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.relu, torch.exp, torch.sin, torch.erf)
    return torch.cat([f(x) for f in functions] + [F.gelu(x, approximate="tanh"), x.softmax(-1), x.log_softmax(0)])


def convolutions(x):
    x1, x2, x3 = x.view(1, 2, 12), x.view(1, 2, 3, 4), x.view(1, 2, 3, 2, 2)
    w1, w2, w3 = (made(3, 2, *(2,) * n, seed=n).to(x.device) for n in (1, 2, 3))
    bias = made(3).to(x.device)
    outputs = [F.conv1d(x1, w1, bias, padding=1), F.conv2d(x2, w2, stride=2), F.conv3d(x3, w3, bias, padding=(1, 0, 0))]
    outputs += [F.conv_transpose2d(x2, w2.transpose(0, 1)), F.conv1d(x1, w1[:2, :1], groups=2)]
    return torch.cat([output.flatten() for output in outputs])


def products(x):
    y = x.view(2, 2, 6)
    b = torch.ones(2, device=x.device)
    return torch.cat([(x @ x.t()).flatten(), torch.bmm(y, y.mT).flatten(), F.linear(y, x[:2], b).flatten(),
                      torch.einsum("bij,bkj->bik", y, y).flatten(), torch.addmm(x[:, :4], x, x.t()).flatten(),
                      torch.baddbmm(y[..., :2], y, y.mT, beta=0.5).flatten(), torch.outer(b, b).flatten(),
                      torch.mv(x, x[0])])  # fmt: skip


def attention(x):
    q, k, v = (made(1, 2, 12, 32, seed=i).to(x.device) for i in range(3))
    mask = torch.ones(12, 12, dtype=torch.bool, device=x.device).tril()
    parts = [F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)]
    parts += [F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    parts += [F.scaled_dot_product_attention(q[:, :, :4], k, v)]
    return torch.cat(parts, 2)


def resizing(x):
    x4, x5 = x.view(1, 2, 3, 4), x.view(1, 2, 3, 2, 2)
    parts = [F.interpolate(x4, scale_factor=2), F.interpolate(x4, size=(5, 3), mode="nearest-exact")]
    parts += [F.interpolate(x4, size=(5, 7), mode=mode) for mode in ("bilinear", "bicubic", "area")]
    parts += [F.interpolate(x5, scale_factor=[1.0, 2.0, 2.0]), F.pad(x5, (1, 1, 0, 2, 1, 0)), F.max_pool2d(x4, 2)]
    parts += [F.pad(x4, (1, 1, 1, 1), mode="reflect"), F.pad(x5, (0, 0, 0, 0, 2, 0), mode="replicate")]
    parts += [F.pixel_shuffle(x.view(1, 4, 2, 3), 2), F.avg_pool2d(x4, 2), F.pad(x4, (-1, 1), value=3.0)]
    return torch.cat([part.flatten() for part in parts])


def lookups(x):
    tokens = torch.tensor([[0, 3], [1, 1]], device=x.device)
    one_hot = F.one_hot(tokens, 4).float().flatten()
    return torch.cat([F.embedding(tokens, x).flatten(), x.index_select(1, tokens[0]).flatten(), one_hot])


def integers(x):
    n = (x * 100).to(torch.uint8)
    shifted = [n & 15, n >> 4, (n.int() << 3) ^ 5, n.view(torch.int8), x.view(torch.int32), n // 3, n.long() % 7]
    return torch.cat([part.float().flatten() for part in shifted])


def created(x):
    steps = torch.linspace(0, 1, 5, device=x.device), torch.arange(3, 9, 2, device=x.device, dtype=torch.float32)
    like = torch.full_like(x, 2).flatten(), torch.eye(3, device=x.device).flatten(), x.new_zeros(3)
    return torch.cat([*steps, *like, torch.tensor([1.5, 2], device=x.device), torch.tril(x).flatten()])


def rearranged(x):
    parts = [x.flip(0), x.roll(1, 1), x.repeat(2, 1), torch.stack([x, x]).movedim(0, 2), x.tile(1, 2), *x.chunk(2, 1)]
    parts += [*x.split([2, 4], 1), x.repeat_interleave(2, 0), x.permute(1, 0), x.diff(), x[None].expand(2, 4, 6)]
    parts += [torch.meshgrid(x[0], x[1], indexing="ij")[0], x.squeeze(), x.diagonal(), x.unbind(1)[2]]
    return torch.cat([part.flatten() for part in parts])


def half_precision(x):
    h, b = x.half(), x.to(torch.bfloat16)
    return torch.cat([(h @ h.t()).float(), (b @ b.t()).float(), (h * b)[:, :4].float(), F.silu(b)[:, :4].float()])


FUNCTIONS = (
    in_place, through_views, out_arguments, indexing, complex_views, reductions, sorting, norms, activations,
    convolutions, products, attention, resizing, lookups, integers, created, rearranged, half_precision,
)  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_equals_the_cpu(function):
    with torch.inference_mode():
        expected = function(made(4, 6))
        found = function(made(4, 6).to("mps"))
    assert found.device == torch.device("mps:0")
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert sim.stats().float64_attempts == 0


def test_nearest3d_ran_on_the_cpu_before_2_8():
    F.interpolate(made(1, 1, 2, 2, 2).to("mps"), scale_factor=2)
    assert sim.stats().fell_back == ({"upsample_nearest3d": 1} if TABLE < (2, 8) else {})


def test_torch_believes_in_the_device():
    assert torch.backends.mps.is_available() and torch.backends.mps.is_built() and torch.mps.device_count() == 1
    assert torch.empty(2, device="mps").is_mps and str(torch.empty(1, device="mps").device) == "mps:0"
    assert platform.mac_ver()[0] == "26.3" and platform.machine() == "arm64"
    assert torch.backends.mps.is_macos_or_newer(15, 0) and not torch.backends.mps.is_macos_or_newer(26, 4)
    assert torch.mps.recommended_max_memory() == 48 << 30
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device("mps")


def test_random_numbers_are_the_cpus():
    torch.manual_seed(7)
    expected = torch.randn(5)
    torch.manual_seed(7)
    assert torch.equal(torch.randn(5, device="mps").cpu(), expected)
    generator = torch.Generator("mps").manual_seed(3)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.rand(4, generator=generator, device="mps").cpu(), expected)
    state = torch.mps.get_rng_state()
    first = torch.randn(3, device="mps")
    torch.mps.set_rng_state(state)
    assert torch.equal(torch.randn(3, device="mps"), first)


def test_modules_move_and_run():
    block = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = made(4, 6)
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(block.to("mps")(x.to("mps")).cpu(), expected)
        assert torch.equal(block.to("cpu")(x), expected)


def test_shaders_need_a_hook(monkeypatch):
    compile_shader = getattr(torch.mps, "compile_shader" if TABLE >= (2, 7) else "_compile_shader")
    assert hasattr(torch.mps, "compile_shader") == (TABLE >= (2, 7))
    with pytest.raises(RuntimeError, match="runs no Metal"):
        compile_shader("kernel void nothing() {}")
    monkeypatch.setattr("simulated_mps.device.shader_compiler", lambda source: source.strip())
    assert "kernel" in compile_shader("kernel void nothing() {}")


def test_installing_twice():
    sim.install(sim.installed()["torch"])
    with pytest.raises(sim.SimulationError, match="another process"):
        sim.install("2.7.1")
    with pytest.raises(sim.SimulationError, match=r"no op table for torch 1\.13"):
        sim.install("1.13")
