"""Counters are exact for known sequences; memory and its cache behave as torch.mps tells."""

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
PAGE, MIB = 16384, 1 << 20


def test_operations_and_bytes():
    a, b = torch.ones(8, 16, device="mps"), torch.ones(16, 4, device="mps")
    sim.reset()
    c = a @ b
    c.add_(c)  # reads two operands and writes one
    ops = sim.stats().ops
    assert ops == {
        "mm": sim.OpCount(1, 4 * (8 * 16 + 16 * 4 + 8 * 4), 8 * 16),
        "add": sim.OpCount(1, 4 * 3 * 8 * 4, 8 * 4),
    }


def test_linear_is_one_operation():
    x, w = torch.ones(2, 3, 4, device="mps"), torch.ones(5, 4, device="mps")
    sim.reset()
    F.linear(x, w)
    assert sim.stats().ops == {"linear": sim.OpCount(1, 4 * (24 + 20 + 30), 30)}


def test_copies():
    host = torch.ones(10)
    device = host.to("mps")
    device.clone()
    device.cpu()
    host.copy_(device)
    s = sim.stats()
    assert (s.host_to_device, s.host_to_device_copies) == (40, 1)
    assert (s.device_to_host, s.device_to_host_copies) == (80, 2)
    assert s.device_to_device == 40
    assert s.syncs == 2


def test_syncs():
    x = torch.ones(3, device="mps")
    sim.reset()
    x.sum()
    assert sim.stats().syncs == 0
    torch.mps.synchronize()
    assert sim.stats().syncs == 1
    x[0].item()
    assert sim.stats().syncs == 2 and sim.stats().device_to_host == 4
    x.nonzero()
    assert sim.stats().syncs == 3


def test_cpu_fallback_is_counted_with_its_copies():
    x = torch.ones(2, 3, device="mps")
    sim.reset()
    out = F.embedding(torch.tensor([0], device="mps"), x, max_norm=0.5)  # embedding_renorm_ always runs on the CPU
    s = sim.stats()
    assert s.fell_back == {"embedding_renorm": 1}
    assert s.syncs == 1 and s.device_to_host == 24 + 8
    assert torch.allclose(out.cpu().norm(), torch.tensor(0.5))


def test_live_and_peak():
    start = sim.stats().live
    a = torch.empty(MIB, dtype=torch.uint8, device="mps")
    b = torch.empty(2 * MIB, dtype=torch.uint8, device="mps")
    view = a.view(4, -1)[1:]
    assert sim.stats().live - start == 3 * MIB == torch.mps.current_allocated_memory() - start
    del b
    assert sim.stats().live - start == MIB and sim.stats().peak - start == 3 * MIB
    del a
    assert sim.stats().live - start == MIB
    del view
    assert sim.stats().live == start
    sim.reset()
    assert sim.stats().peak == start


def test_freed_memory_stays_with_the_driver_until_the_cache_is_emptied():
    before = torch.mps.driver_allocated_memory()
    x = torch.empty(3 * MIB + 1, dtype=torch.uint8, device="mps")
    assert torch.mps.driver_allocated_memory() - before == 3 * MIB + PAGE
    del x
    assert torch.mps.driver_allocated_memory() - before == 3 * MIB + PAGE
    x = torch.empty(2 * MIB, dtype=torch.uint8, device="mps")  # taken from the cache
    assert torch.mps.driver_allocated_memory() - before == 3 * MIB + PAGE
    del x
    torch.mps.empty_cache()
    assert torch.mps.driver_allocated_memory() == before


def test_memory_fraction():
    sim.limits(recommended_bytes=8 * MIB)
    torch.mps.set_per_process_memory_fraction(0.5)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(5 * MIB, dtype=torch.uint8, device="mps")
    torch.mps.set_per_process_memory_fraction(0.0)
    torch.empty(5 * MIB, dtype=torch.uint8, device="mps")


@pytest.mark.parametrize("head_dim, queries", [(64, 64), (40, 64), (64, 4), (40, 4)])
def test_attention_path(head_dim, queries):
    q, k = torch.zeros(1, 1, queries, head_dim, device="mps"), torch.zeros(1, 1, 256, head_dim, device="mps")
    sim.reset()
    F.scaled_dot_product_attention(q, k, k)
    if head_dim == 64 and queries <= 8 and TABLE >= (2, 8):
        path = "vector"
    elif head_dim == 64 and queries > 8 and TABLE >= (2, 13):
        path = "prefill"
    else:
        path = "materialised"
    s = sim.stats()
    assert s.ops["sdpa." + path].calls == 1
    scores = queries * 256 * (4 + 4)
    assert (s.peak - s.live >= scores - queries * head_dim * 4) == (path == "materialised")


def test_stats_are_json():
    torch.ones(2, device="mps")
    assert '"float64_attempts": 0' in sim.stats().json()
