"""ComfyUI operations whose weights stay quantised in memory.

Given to a model as ``custom_operations``, the seam that core's loaders offer. Linear and Embedding keep a
``QuantizedWeight`` and decode it for each call, to the dtype of the input; all other layers are core's own
``manual_cast`` ones. The classes hold no state: what a layer needs is in its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.ops
import torch

from . import metal_matmul
from .tensor import PLAIN_FORMATS, QuantizedWeight


class _QuantizedLayer(torch.nn.Module):
    """Loading, moving and decoding shared by the layers below.

    Parameters begin on the meta device: nothing is allocated for weights that the file will provide, and what is
    still there after loading is known to be missing.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    weight_function: list[Callable[[torch.Tensor], torch.Tensor]]
    bias_function: list[Callable[[torch.Tensor], torch.Tensor]]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, parameter in list(self._parameters.items()):
            if parameter is None:
                continue
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                continue
            if value.shape != parameter.shape:
                error_msgs.append(
                    f"{prefix}{name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}"
                )
                continue
            if name == "weight":
                loaded: torch.Tensor = _as_quantized(value, parameter.dtype)
            else:
                loaded = value.to(parameter.dtype)
            setattr(self, name, torch.nn.Parameter(loaded, requires_grad=False))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        kept = {
            name: parameter
            for name, parameter in self._parameters.items()
            if parameter is not None and (parameter.is_meta or isinstance(parameter, QuantizedWeight))
        }
        for name in kept:
            self._parameters[name] = None
        super()._apply(fn, recurse)
        for name, parameter in kept.items():
            if isinstance(parameter, QuantizedWeight):
                example = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
                moved = parameter.on_device(example.device).with_dtype(example.dtype)
                parameter = torch.nn.Parameter(moved, requires_grad=False)
            self._parameters[name] = parameter
        return self

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_: Any) -> torch.Tensor:
        """Core asks for this before it computes with a weight (LoRA, model merging): the dense form."""
        return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight

    def decoded_weight(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The dense weight with all weight functions (LoRA) applied.

        Patches are added in float32 and rounded once: added in bfloat16, a small LoRA would vanish below half a
        unit in the last place of most weights.
        """
        weight = self.weight
        assert isinstance(weight, QuantizedWeight)
        if not self.weight_function:
            return weight.dequantize(dtype, device)
        dense = weight.dequantize(torch.float32, device)
        if weight.block_format is PLAIN_FORMATS[torch.float32]:
            dense = dense.clone()
        for function in self.weight_function:
            dense = function(dense)
        return dense.to(dtype)

    def decoded_bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """The bias with all bias functions applied, or None."""
        if self.bias is None:
            return None
        bias = self.bias.to(device=device, dtype=dtype, copy=bool(self.bias_function))
        for function in self.bias_function:
            bias = function(bias)
        return bias


def _as_quantized(value: torch.Tensor, dtype: torch.dtype) -> QuantizedWeight:
    if isinstance(value, QuantizedWeight):
        return value.with_dtype(dtype)
    if value.dtype not in PLAIN_FORMATS:
        value = value.to(dtype)
    return QuantizedWeight.from_dense(value, dtype)


class QuantizedOps(comfy.ops.manual_cast):
    """Drop-in for ``comfy.ops.manual_cast``."""

    class Linear(_QuantizedLayer, comfy.ops.manual_cast.Linear):
        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: Any = None,
            dtype: torch.dtype | None = None,
        ) -> None:
            super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)

        def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bias = self.decoded_bias(input.dtype, input.device)
            weight = self.weight
            if input.device.type == "mps" and isinstance(weight, QuantizedWeight) and not self.weight_function:
                product = metal_matmul.linear(input, weight, bias)
                if product is not None:
                    return product
            return torch.nn.functional.linear(input, self.decoded_weight(input.dtype, input.device), bias)

    class Embedding(_QuantizedLayer, comfy.ops.manual_cast.Embedding):
        def __init__(
            self,
            num_embeddings: int,
            embedding_dim: int,
            *args: Any,
            device: Any = None,
            dtype: torch.dtype | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(num_embeddings, embedding_dim, *args, device="meta", dtype=dtype, **kwargs)

        def forward(self, input: torch.Tensor, out_dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
            weight = self.weight
            assert isinstance(weight, QuantizedWeight)
            dtype = out_dtype or weight.dtype
            if self.weight_function:
                return torch.nn.functional.embedding(input, self.decoded_weight(dtype, input.device))
            return weight.on_device(input.device).dequantize_rows(input, dtype)
