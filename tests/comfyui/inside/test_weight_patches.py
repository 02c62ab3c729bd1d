"""LoRA, hooks, merging and saving on quantised weights, against core on the same weights decoded."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from apple_silicon_video.memory.plan_models import Entry, WeightTable, lora_sizes
from apple_silicon_video.quantization.comfy_patcher import with_half_factors
from apple_silicon_video.quantization.tensor import QuantizedWeight
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from comfy_extras import nodes_model_merging
from small_models import ADAPTERS, published_lora, wan_lora

from .wan import apply_lora, forward, pair

VARIANT = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("models"), VARIANT, "Q5_K_M")


def close(result, reference, unpatched):
    """Equal within float32 rounding, and the patch has changed something."""
    assert not torch.allclose(reference, unpatched, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_type(models, adapter):
    ours, core = models
    modules = ["blocks.0.self_attn.norm_q", "blocks.1.norm3"] if adapter == "w-norm" else None
    lora = wan_lora(VARIANT, adapter, modules)
    before = forward(ours)
    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    blocks = weight.blocks.clone()

    result = forward(apply_lora(ours, lora, 0.8))
    close(result, forward(apply_lora(core, lora, 0.8)), before)

    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    assert isinstance(weight, QuantizedWeight) and torch.equal(weight.blocks, blocks)
    assert torch.equal(forward(ours), before)


def test_published_lora_changes_dense_parameters_too(models):
    ours, core = models
    lora = published_lora(VARIANT)
    close(forward(apply_lora(ours, lora)), forward(apply_lora(core, lora)), forward(ours))
    assert torch.equal(forward(ours), forward(core))


def test_several_loras_strengths_and_removal(models):
    ours, core = models
    one, two = wan_lora(VARIANT, "lora"), wan_lora(VARIANT, "loha", seed=3)
    before = forward(ours)
    stacked = apply_lora(apply_lora(ours, one, 0.5), two, -1.25)
    reference = apply_lora(apply_lora(core, one, 0.5), two, -1.25)
    close(forward(stacked), forward(reference), before)
    close(forward(apply_lora(ours, one, 0.5)), forward(apply_lora(core, one, 0.5)), before)
    assert torch.equal(forward(ours), before)
    assert torch.equal(forward(apply_lora(ours, one, 0.0)), before)


def test_patched_model_survives_unloading(models):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"))
    first = forward(patched)
    comfy.model_management.unload_all_models()
    assert not ours.model.diffusion_model.blocks[0].ffn[0].weight_function
    assert torch.equal(forward(patched), first)


def test_partial_loading_keeps_one_patch_per_weight(models):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"))
    expected = forward(patched)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    patched.partially_unload(patched.offload_device, 1e12)
    assert len(layer.weight_function) == 1
    patched.partially_load(patched.load_device, 1e12)
    assert len(layer.weight_function) == 1
    assert torch.equal(forward(patched), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patch_is_rounded_once_in_half_precision(models, dtype):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"), 0.01)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    key = "diffusion_model.blocks.0.ffn.0.weight"
    exact = comfy.lora.calculate_weight(patched.patches[key], layer.weight.dequantize(torch.float32).clone(), key)
    assert torch.equal(layer.decoded_weight(dtype, torch.device("cpu")), exact.to(dtype))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_model_merge(tmp_path, ratio):
    ours_a, core_a = pair(tmp_path, VARIANT, "Q5_K_M")
    ours_b, core_b = pair(tmp_path, VARIANT, "Q3_K", seed=99)
    merge = nodes_model_merging.ModelMergeSimple().merge
    reference = forward(merge(core_a, core_b, ratio)[0])
    torch.testing.assert_close(forward(merge(ours_a, ours_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(merge(ours_a, core_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(merge(core_a, ours_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)


def test_model_subtract_and_add(tmp_path):
    ours_a, core_a = pair(tmp_path, VARIANT, "Q5_K_M")
    ours_b, core_b = pair(tmp_path, VARIANT, "Q3_K", seed=99)
    subtract, add = nodes_model_merging.ModelSubtract(), nodes_model_merging.ModelAdd()
    for merge, arguments in ((subtract.merge, (0.5,)), (add.merge, ())):
        reference = forward(merge(core_a, core_b, *arguments)[0])
        torch.testing.assert_close(forward(merge(ours_a, ours_b, *arguments)[0]), reference, rtol=1e-4, atol=1e-5)


def hooked(patcher, lora, strength):
    """A clone with a LoRA as a hook, active."""
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=0.0)
    clone = patcher.clone()
    comfy.hooks.load_hook_lora_for_models(clone, None, lora, strength, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    clone.register_all_hook_patches(hooks, target)
    return clone, hooks


def test_hook_lora_is_added_and_removed(models):
    ours, core = models
    lora = wan_lora(VARIANT, "lora")
    before, reference_before = forward(ours), forward(core)
    results = []
    for patcher in (ours, core):
        clone, hooks = hooked(patcher, lora, 0.7)
        steps = []
        comfy.model_management.load_models_gpu([clone], force_full_load=True)
        for active in (hooks, None, hooks):
            clone.patch_hooks(active)
            steps.append(forward_loaded(clone))
        clone.unpatch_hooks()
        results.append(steps)
    for ours_step, core_step in zip(*results):
        torch.testing.assert_close(ours_step, core_step, rtol=1e-3, atol=1e-4)
    close(results[0][0], results[1][0], before)
    assert torch.equal(results[0][1], before)
    assert torch.equal(forward(ours), before) and torch.equal(forward(core), reference_before)


def forward_loaded(patcher):
    """A forward pass without loading, so that active hooks stay."""
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    with torch.inference_mode():
        context = torch.randn(1, 20, 4096, generator=generator)
        return patcher.model.diffusion_model(latent, torch.tensor([500.0]), context)


def test_saving_a_patched_model_writes_dense_weights(tmp_path):
    ours, _ = pair(tmp_path, VARIANT, "Q5_K_M")
    lora = wan_lora(VARIANT, "lora")
    patched = apply_lora(ours, lora, 0.5)
    expected = forward(patched)
    state_dict = patched.state_dict_for_saving()
    assert not any(isinstance(value, QuantizedWeight) for value in state_dict.values())
    path = tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file({k: v.contiguous().clone() for k, v in state_dict.items()}, str(path))
    reloaded = comfy.sd.load_diffusion_model(str(path))
    torch.testing.assert_close(forward(reloaded), expected, rtol=1e-4, atol=1e-5)


HALVED = {
    "lora": 2,
    "lora-peft": 2,
    "lora-no-alpha": 2,
    "loha": 4,
    "lokr": 2,
    "lokr-low-rank": 3,
    "lokr-two-low-ranks": 4,
    "diff": 1,
}
"""Adapters whose factors go to MPS in half precision, and how many each has."""


def members(value):
    return value[1] if isinstance(value, tuple) else value.weights


def factors(value):
    return [member for member in members(value) if isinstance(member, torch.Tensor)]


def changed(value, change):
    """The same patch of other tensors."""
    new = tuple(change(m) if isinstance(m, torch.Tensor) else m for m in members(value))
    return ("diff", new) if isinstance(value, tuple) else type(value)(value.loaded_keys, new)


def applied(strength, value, shape):
    """What core adds to a weight: the patch on zeros."""
    return comfy.lora.calculate_weight([(strength, value, 1.0, None, None)], torch.zeros(shape), "a weight")


def check_half(strength, value, shape, count):
    """Bytes are halved, the sum of all roundings is within its bound, and undoing the powers of two costs no bit.

    A patch is a sum of products of one element of each factor. An element is off by 2**-11 of itself, so a product of
    n by (1 + 2**-11)**n - 1 of itself, and the sum by as much of the sum of magnitudes, which is the same patch made
    of the factors' magnitudes. 2**-16 of it is for float32's own sums.
    """
    before = changed(value, torch.clone)
    halved_strength, halved, *rest = with_half_factors((strength, value, 1.0, None, None))
    assert rest == [1.0, None, None]
    assert [tensor.dtype for tensor in factors(halved)] == [torch.float16] * count
    assert all(torch.equal(a, b) for a, b in zip(factors(value), factors(before), strict=True))

    reference = applied(strength, value, shape)
    result = applied(halved_strength, halved, shape)
    magnitude = applied(abs(strength), changed(value, torch.abs), shape).abs()
    assert ((result - reference).abs() <= ((1 + 2**-11) ** count - 1 + 2**-16) * magnitude).all()
    if reference.any():
        assert not torch.equal(result, reference)
    rounded = applied(strength, changed(value, rounded_like_float16), shape)
    assert torch.equal(result, rounded)


def rounded_like_float16(factor):
    """To 11 significant bits, at any size."""
    mantissa, exponent = torch.frexp(factor)
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name not in ("w-norm", "diff-bias")])
def test_half_factors_of_every_adapter_type(models, adapter):
    """Those that change a quantised weight. The planner counts the same bytes from the file's names."""
    ours, _ = models
    tensors = wan_lora(VARIANT, adapter, ["blocks.0.ffn.0"])
    ((key, (patch,)),) = apply_lora(ours, tensors, 0.8).patches.items()
    shape = comfy.utils.get_attr(ours.model, key).shape
    if adapter in HALVED:
        check_half(*patch[:2], shape, HALVED[adapter])
    else:
        assert with_half_factors(patch) is patch
    names = {torch.float32: "F32", torch.int64: "I64"}
    file = {name: Entry(names[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    model = WeightTable("model", {"blocks.0.ffn.0.weight": Entry("Q5_K", tuple(shape), 1)})
    held = factors(with_half_factors(patch)[1])
    assert sum(lora_sizes(WeightTable("lora", file), model)) == sum(tensor.nbytes for tensor in held)


def low_rank(*sizes, alpha):
    up, down = noise(32, 4) * sizes[0], noise(4, 48) * sizes[1]
    return LoRAAdapter(set(), (up, down, alpha, None, None, None))


def one_rank_convolution(*sizes, alpha):
    """With a middle factor."""
    up, down, mid = noise(32, 1, 1, 1) * sizes[0], noise(1, 16, 1, 1) * sizes[1], noise(1, 1, 3, 3)
    return LoRAAdapter(set(), (up, down, alpha, mid, None, None))


def tucker(*sizes, alpha):
    parts = [noise(4, 32) * sizes[0], noise(4, 16) * sizes[1], noise(4, 32), noise(4, 16)]
    return LoHaAdapter(set(), (*parts[:2], alpha, *parts[2:], noise(4, 4, 3, 3), noise(4, 4, 3, 3), None))


def kronecker(*sizes, alpha):
    return LoKrAdapter(set(), (noise(4, 4) * sizes[0], noise(8, 12) * sizes[1], alpha, *[None] * 6))


def kronecker_tucker(*sizes, alpha):
    small, parts = noise(4, 4) * sizes[0], (noise(4, 8) * sizes[1], noise(4, 4), noise(4, 4, 3, 3))
    return LoKrAdapter(set(), (small, None, alpha, None, None, *parts, None))


def noise(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


BUILT = {
    low_rank: ((32, 48), 2),
    one_rank_convolution: ((32, 16, 3, 3), 3),
    tucker: ((32, 16, 3, 3), 6),
    kronecker: ((16, 48), 2),
    kronecker_tucker: ((32, 16, 3, 3), 4),
}


@pytest.mark.parametrize("alpha", [None, 0.3, 16])
@pytest.mark.parametrize("sizes", [(1e-6, 1e-6), (1e-6, 1e4), (1e4, 1e4), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("build", BUILT)
def test_half_factors_of_any_size(build, sizes, alpha):
    shape, count = BUILT[build]
    check_half(-1.25, build(*sizes, alpha=alpha), shape, count)


def test_factors_that_stay_as_they_are():
    """Half precision, infinities and NaN; the other factor is halved; merge operands, unknown kinds, odd strengths."""
    for odd in (float("inf"), float("nan")):
        value = low_rank(1.0, 1.0, alpha=None)
        value.weights[0][3, 1] = odd
        _, halved, *_ = with_half_factors((1.0, value))
        assert halved.weights[0] is value.weights[0] and halved.weights[1].dtype == torch.float16
    extreme = low_rank(2.0**-60, 2.0**-60, alpha=None)
    for value in (
        changed(low_rank(1.0, 1.0, alpha=1.0), torch.Tensor.half),
        changed(low_rank(1.0, 1.0, alpha=1.0), torch.Tensor.bfloat16),
        extreme,
        [(torch.ones(4, 4), None), (1.0, None)],
        ("diff", (torch.ones(4, 4), {"pad_weight": True})),
        ("set", (torch.ones(4, 4),)),
        (torch.ones(4, 4),),
        type("Other", (LoRAAdapter,), {})(set(), low_rank(1.0, 1.0, alpha=1.0).weights),
    ):
        patch = (1.0, value, 1.0, None, None)
        assert with_half_factors(patch) is patch
    patch = (torch.tensor(1.0), low_rank(1.0, 1.0, alpha=1.0))
    assert with_half_factors(patch) is patch


def test_the_cpu_has_the_patches_themselves(models):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"))
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    (function,) = ours.model.diffusion_model.blocks[0].ffn[0].weight_function
    assert function.patches is patched.patches["diffusion_model.blocks.0.ffn.0.weight"]
