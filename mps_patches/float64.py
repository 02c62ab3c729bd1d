"""float64 does not exist on MPS: every request for it raises, and code written for CUDA makes some.

ComfyUI itself asks ``supports_fp64`` or uses the CPU (rotary embeddings, schedules), and this pack keeps to float32 on
the device. Other packs may not. A cast nobody asked for would hide lost precision in code that wanted float64, so the
cure is off unless switched on: it then turns exactly those calls that would raise into float32 (complex128 into
complex64), and leaves every call that works alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import Cure, Defect, Function, ProbeResult

NARROWER = {torch.float64: torch.float32, torch.complex128: torch.complex64}
FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")


def reference(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``, in float32 or complex64 if it has a wider type."""
    return value.to(NARROWER.get(value.dtype, value.dtype)).to(device)


def _is_mps(device: Any) -> bool:
    return device is not None and torch.device(device).type == "mps"


def _narrowed(value: Any) -> Any:
    return NARROWER.get(value, value) if isinstance(value, torch.dtype) else value


def _make_to(original: Function) -> Function:
    def cured(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype, device = _destination(self, args, kwargs)
        if dtype not in NARROWER or device != "mps":
            return original(self, *args, **kwargs)
        if self.dtype in NARROWER:
            self = original(self, NARROWER[self.dtype])
        if args and isinstance(args[0], Tensor):
            return original(self, NARROWER[dtype]).to(args[0].device)
        values = {name: _narrowed(value) for name, value in kwargs.items()}
        return original(self, *(_narrowed(value) for value in args), **values)

    return cured


def _destination(self: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.dtype, str]:
    """The dtype and the device type that ``Tensor.to`` was asked for."""
    dtype, device = self.dtype, self.device.type
    for value in (*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device.type
        elif isinstance(value, (str, torch.device)):
            device = torch.device(value).type
    return dtype, device


def _make_cast(original: Function) -> Function:
    """Tensor.double and Tensor.type on the device."""

    def cured(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted = args[0] if args else torch.float64
        if self.is_mps and (wanted in NARROWER if isinstance(wanted, torch.dtype) else wanted == "torch.DoubleTensor"):
            return self.to(NARROWER[wanted] if isinstance(wanted, torch.dtype) else torch.float32)
        return original(self, *args, **kwargs)

    return cured


def _make_factory(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        if _is_mps(kwargs.get("device")):
            if kwargs.get("dtype") in NARROWER:
                kwargs["dtype"] = NARROWER[kwargs["dtype"]]
            elif kwargs.get("dtype") is None and args and getattr(args[0], "dtype", None) is not None:
                kwargs["dtype"] = _wide_dtype(args[0])
        return original(*args, **kwargs)

    return cured


def _wide_dtype(value: Any) -> torch.dtype | None:
    """The type to make of data that is wide (a tensor or a numpy array), or None to leave it to torch."""
    name = str(value.dtype).removeprefix("torch.")
    return {"float64": torch.float32, "complex128": torch.complex64}.get(name)


def _make_like(original: Function) -> Function:
    def cured(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = kwargs.get("dtype") or input.dtype
        device = kwargs.get("device")
        if dtype in NARROWER and (input.is_mps if device is None else _is_mps(device)):
            kwargs["dtype"] = NARROWER[dtype]
        return original(input, *args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A refusal by TypeError is what is expected; a wrong value in place of it would be the defect."""
    value = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    try:
        back = value.to(device).cpu()
    except TypeError:
        return ProbeResult(True, 0.0, 0.0, "float64 is refused with a TypeError, as on every Mac")
    error = (back.double() - value).abs().item()
    cast = back.dtype == torch.float32
    return ProbeResult(cast or error == 0, error, 0.0, "float64 arrives as float32" if cast else f"off by {error:.2g}")


DEFECTS = (
    Defect(
        id="float64",
        title="float64 is refused",
        symptom='"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn\'t support float64"',
        trigger="a tensor in float64 or complex128 on mps (rotary embeddings and schedules of other packs)",
        cause="Metal has no 64-bit floating point",
        affected="always",
        upstream=(),
        seam="Tensor.to, double, type and the factory functions of torch",
        advice="If another pack stops with this error, set ASV_PATCH_FLOAT64=on: it then computes in float32.",
        probe=probe,
        cure=Cure(
            targets=(
                ("torch.Tensor", "to"),
                ("torch.Tensor", "double"),
                ("torch.Tensor", "type"),
                *(("torch", name) for name in (*FACTORIES, *LIKE)),
            ),
            make={
                "to": _make_to,
                "double": _make_cast,
                "type": _make_cast,
                **dict.fromkeys(FACTORIES, _make_factory),
                **dict.fromkeys(LIKE, _make_like),
            },
        ),
        reference="float64.reference",
        switch=False,
    ),
)
