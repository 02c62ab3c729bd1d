"""A ModelPatcher that applies LoRA and other weight patches to quantised weights on the fly.

Core would decode a patched weight and keep the dense result. Here the patches become weight functions of the
layer, which decodes, patches and drops the result in each call: the blocks stay as they are in the file, and
removing a LoRA means removing a function. On MPS a patch's factors lie beside the weights, in half precision where the
weight has no use for more.
"""

from __future__ import annotations

import logging
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase

from .half_factors import MOST_EXPONENT, to_half
from .low_rank import add_product
from .tensor import PlainFormat, QuantizedWeight

ALPHA = 2
PRODUCTS: dict[type[WeightAdapterBase], set[tuple[int, ...]]] = {
    LoRAAdapter: {(0, 1), (0, 1, 3)},
    LoHaAdapter: {(0, 1, 3, 4), (0, 1, 3, 4, 5, 6)},
    LoKrAdapter: {(0, 1), (0, 5, 6), (0, 5, 6, 7), (1, 3, 4), (3, 4, 5, 6), (3, 4, 5, 6, 7)},
}
"""Adapters that add strength * alpha * a product, linear in each factor: which members of ``weights`` are its factors.

Whatever else an adapter holds beside its alpha (a DoRA's magnitudes, a new shape) takes it off this table. GLoRA's sum
of two products and the rotations of OFT and BOFT do not scale with their factors.
"""


def with_half_factors(patch: tuple) -> tuple:
    """A patch of core's with its float32 factors in float16, their powers of two in its strength.

    Args:
        patch: (strength, value, ...); left as it is.

    Returns:
        The patch itself where nothing can be saved; else a new one whose factors are each within ``to_half``'s bound
        of the given ones, and which core, computing in float32, applies exactly as it would these.
    """
    strength, value = patch[:2]
    members, factors = _product(value)
    halves = {i: half for i in factors if type(members[i]) is torch.Tensor and (half := to_half(members[i]))}
    exponent = sum(power for _, power in halves.values())
    if not halves or abs(exponent) > MOST_EXPONENT or not isinstance(strength, (int, float)):
        return patch
    changed = tuple(halves[i][0] if i in halves else member for i, member in enumerate(members))
    scaled = type(value)(value.loaded_keys, changed) if type(value) in PRODUCTS else ("diff", changed)
    return (strength * 2.0**exponent, scaled, *patch[2:])


def _product(value: Any) -> tuple[tuple, tuple[int, ...]]:
    """What a patch's value holds, and which of it are the factors of a product; nothing where it is none."""
    if type(value) in PRODUCTS:
        factors = tuple(i for i, member in enumerate(value.weights) if member is not None and i != ALPHA)
        return (value.weights, factors) if factors in PRODUCTS[type(value)] else ((), ())
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "diff" and len(value[1]) == 1:
        return value[1], (0,)
    return (), ()


def add_plain_lora(weight: torch.Tensor, patch: tuple) -> bool:
    """Add a patch of core's to a weight [rows, columns] in place if it is a plain LoRA; whether it was one.

    Plain: up, down and perhaps alpha, whose product has the weight's shape; no offset, function or model strength.
    """
    strength, value, model_strength, offset, function = patch
    if type(value) is not LoRAAdapter or (model_strength, offset, function) != (1.0, None, None):
        return False
    up, down, alpha, *others = value.weights
    if any(member is not None for member in others) or (weight.ndim, up.ndim, down.ndim) != (2, 2, 2):
        return False
    if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
        return False
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    add_product(weight, up.to(weight.device), down.to(weight.device), float(strength) * scale)
    return True


def _on_device(value: Any, device: torch.device) -> Any:
    """A copy of a patch's tensors on ``device``; merge operands (lists) and quantised weights stay where they are."""
    if isinstance(value, (QuantizedWeight, list)):
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_on_device(item, device) for item in value)
    if isinstance(value, WeightAdapterBase):
        return type(value)(value.loaded_keys, _on_device(value.weights, device))
    return value


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(_tensor_bytes(item) for item in value)
    return _tensor_bytes(value.weights) if isinstance(value, WeightAdapterBase) else 0


class WeightPatch:
    """Patches of one weight as a weight function: ``patch(dense) -> dense``, both float32.

    Args:
        key: the weight's name in the model, for core's messages.
        weight: what is patched; factors go to MPS in half precision if it is quantised.
        patches: core's patch tuples (strength, value, model strength, offset, function).
        original_weights: what core's "model as LoRA" patches subtract.
    """

    def __init__(
        self, key: str, weight: QuantizedWeight, patches: list[tuple], original_weights: dict | None = None
    ) -> None:
        self.key = key
        self.halves = not isinstance(weight.block_format, PlainFormat)
        self.source = patches
        self.patches = patches
        self.original_weights = original_weights

    def move_to(self, device: torch.device | None = None) -> int:
        """Keep the patch's tensors on ``device`` so that a step copies nothing; return their bytes."""
        if device is None or torch.device(device).type == "cpu":
            self.patches = self.source
            return 0
        halves = self.halves and torch.device(device).type == "mps"
        kept = (with_half_factors(p) if halves else p for p in self.source)
        self.patches = [(p[0], _on_device(p[1], device), *p[2:]) for p in kept]
        return sum(_tensor_bytes(p[1]) for p in self.patches)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with all patches, changed in place where that can be; on MPS LoRAs take little more memory."""
        for patch in self.patches:
            if not (weight.is_mps and add_plain_lora(weight, patch)):
                weight = comfy.lora.calculate_weight(
                    [patch],
                    weight,
                    self.key,
                    intermediate_dtype=weight.dtype,
                    original_weights=self.original_weights,
                )
        return weight


class HookPatch(WeightPatch):
    """Patches that a hook (scheduled LoRA) adds on top of the model's own for a while."""


class QuantizedModelPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher for models made with ``QuantizedOps``; dense parameters are handled by core as ever."""

    @classmethod
    def adopt(cls, patcher: comfy.model_patcher.ModelPatcher) -> QuantizedModelPatcher:
        """Take over a freshly loaded model from ``patcher``, which must not be used afterwards.

        Core may have put the model on its device already (text encoders on the CPU). Its entry would then watch a
        patcher that is gone, which core reports as a memory leak at every load, so the model is taken off first.
        """
        loaded_models = comfy.model_management.current_loaded_models
        for entry in [entry for entry in loaded_models if entry.model is patcher]:
            entry.model_unload()
            loaded_models.remove(entry)
        adopted = cls.__new__(cls)
        adopted.__dict__.update(patcher.__dict__)
        return adopted

    def _layer(self, key: str) -> Any:
        """The layer that holds the quantised weight ``key``, or None if the parameter is dense."""
        path, _, name = key.rpartition(".")
        if name != "weight" or not path:
            return None
        try:
            layer = comfy.utils.get_attr(self.model, path)
        except AttributeError:
            return None
        return layer if isinstance(getattr(layer, "weight", None), QuantizedWeight) else None

    def _set_weight_patches(self, device: torch.device | None) -> int:
        """Give every patched layer exactly one WeightPatch, before hooks and wrappers; return bytes moved."""
        moved = 0
        for key, patches in self.patches.items():
            layer = self._layer(key)
            if layer is None:
                continue
            own = WeightPatch(key, layer.weight, patches)
            moved += own.move_to(device)
            others = [f for f in layer.weight_function if not _is_model_patch(f)]
            layer.weight_function = [own, *others]
        return moved

    def _clear_weight_functions(self) -> None:
        for layer in self.model.modules():
            if isinstance(getattr(layer, "weight", None), QuantizedWeight):
                layer.weight_function = []

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = super().load(device_to, *args, **kwargs)
        self.model.model_loaded_weight_memory += self._set_weight_patches(device_to)
        return result

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            self.unpatch_hooks()
            self._clear_weight_functions()
        return super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        freed = super().partially_unload(*args, **kwargs)
        self._set_weight_patches(self.load_device)
        return freed

    def patch_weight_to_device(self, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer(key)
        if layer is None:
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        if not kwargs.get("return_weight", False):
            return None
        dense = layer.weight.dequantize(torch.float32, device_to).clone()
        if key in self.patches:
            dense = comfy.lora.calculate_weight(self.patches[key], dense, key)
        return dense.to(layer.weight.dtype)

    def patch_hook_weight_to_device(
        self, hooks: Any, combined_patches: dict, key: str, original_weights: dict, memory_counter: Any
    ) -> None:
        layer = self._layer(key)
        if layer is None:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        if key not in combined_patches:
            return None
        patch = HookPatch(key, layer.weight, combined_patches[key], {key: original_weights.pop(key)})
        patch.move_to(self.load_device)
        self._set_hook_patch(layer, patch)
        self.cached_hook_patches.setdefault(hooks, {})[key] = (patch, layer.weight.device)
        return None

    def patch_cached_hook_weights(self, cached_weights: dict, key: str, memory_counter: Any) -> None:
        patch = cached_weights[key][0]
        if not isinstance(patch, HookPatch):
            return super().patch_cached_hook_weights(cached_weights, key, memory_counter)
        self._set_hook_patch(self._layer(key), patch)
        return None

    def _set_hook_patch(self, layer: Any, patch: HookPatch) -> None:
        layer.weight_function = [*(f for f in layer.weight_function if not isinstance(f, HookPatch)), patch]
        self.hook_backup[patch.key] = (layer.weight, layer.weight.device)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        for key in [k for k in self.hook_backup if not whitelist_keys_set or k in whitelist_keys_set]:
            layer = self._layer(key)
            if layer is not None:
                layer.weight_function = [f for f in layer.weight_function if not isinstance(f, HookPatch)]
                del self.hook_backup[key]
        super().unpatch_hooks(whitelist_keys_set)

    def decoded_for_saving(self, saved: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
        """A state dict for a file of core's, with quantised weights decoded, patched and on the CPU.

        Args:
            saved: names as in the model, without ``prefix``; changed in place.
            prefix: of those names in the model.
        """
        quantised = [name for name, value in saved.items() if isinstance(value, QuantizedWeight)]
        if quantised:
            logging.info("Saving a quantised model: its weights are decoded to %s.", saved[quantised[0]].dtype)
        for name in quantised:
            saved[name] = self.patch_weight_to_device(prefix + name, return_weight=True).to("cpu")
        return saved

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict[str, torch.Tensor]:
        """What newer versions of core save: the model or, with ``prefix``, a part of it."""
        return self.decoded_for_saving(super().model_state_dict_for_saving(model, prefix), prefix)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Core's checkpoint; older versions of core fill it with the quantised weights themselves."""
        saved = super().state_dict_for_saving(*args, **kwargs)
        names = {
            f"diffusion_model.{key.removeprefix('model.').removeprefix('diffusion_model.')}": key
            for key, value in saved.items()
            if isinstance(value, QuantizedWeight)
        }
        decoded = self.decoded_for_saving({name: saved[key] for name, key in names.items()})
        return saved | {names[name]: value for name, value in decoded.items()}


class QuantizedCLIP(comfy.sd.CLIP):
    """Core's CLIP with a QuantizedModelPatcher; what its save nodes write is decoded."""

    @classmethod
    def adopt(cls, clip: comfy.sd.CLIP) -> QuantizedCLIP:
        """Take over ``clip``, which must not be used afterwards."""
        adopted = cls.__new__(cls)
        adopted.__dict__.update(clip.__dict__)
        return adopted

    def clone(self, *args: Any, **kwargs: Any) -> QuantizedCLIP:
        return self.adopt(super().clone(*args, **kwargs))

    def get_sd(self) -> dict[str, torch.Tensor]:
        """What older versions of core save."""
        return self.patcher.decoded_for_saving(super().get_sd())


def _is_model_patch(function: Any) -> bool:
    if isinstance(function, HookPatch):
        return False
    return isinstance(function, (WeightPatch, comfy.model_patcher.LowVramPatch))
