"""A generator on another device than the numbers it should make.

torch refuses a CPU generator for an mps tensor and the reverse, and older versions fail with "Placeholder storage has
not been allocated on MPS device!". ComfyUI and this pack draw on the CPU and move the result; other packs write
``torch.randn(..., generator=cpu_generator, device="mps")``. The cure is off unless switched on: it then draws such
numbers on the generator's device and moves them, as diffusers does, and leaves every call that works alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .registry import Cure, Defect, Function, ProbeResult

FUNCTIONS = ("rand", "randint", "randn", "randperm")
METHODS = ("normal_", "uniform_", "exponential_", "random_", "bernoulli_")


def reference(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal noise in float32, drawn where the generator is and moved to ``device``."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def _apart(generator: Any, device: str) -> bool:
    return (
        isinstance(generator, torch.Generator)
        and generator.device.type != device
        and "mps"
        in (
            generator.device.type,
            device,
        )
    )


def _make_function(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        generator = kwargs.get("generator")
        if generator is not None and kwargs.get("out") is None:
            wanted = torch.get_default_device() if device is None else torch.device(device)
            if _apart(generator, wanted.type):
                return original(*args, **{**kwargs, "device": generator.device}).to(wanted)
        return original(*args, **kwargs)

    return cured


def _make_method(original: Function) -> Function:
    def cured(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        generator = kwargs.get("generator")
        if generator is not None and _apart(generator, self.device.type):
            drawn = torch.empty(self.shape, dtype=self.dtype, device=generator.device)
            return self.copy_(original(drawn, *args, **kwargs))
        return original(self, *args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A refusal is what is expected; numbers that are not the generator's would be the defect."""
    expected = torch.randn(8, generator=torch.Generator().manual_seed(1))
    try:
        drawn = torch.randn(8, generator=torch.Generator().manual_seed(1), device=device)
    except RuntimeError:
        return ProbeResult(True, 0.0, 0.0, "a CPU generator is refused for an mps tensor, as on every Mac")
    error = (drawn.cpu() - expected).abs().max().item()
    return ProbeResult(error == 0, error, 0.0, f"noise of a CPU generator differs by {error:.2g}")


DEFECTS = (
    Defect(
        id="generator-placement",
        title="Generators must be on the tensor's device",
        symptom='"Placeholder storage has not been allocated on MPS device!", or "Expected a \'mps\' device type"',
        trigger="torch.randn and the like with a generator of another device",
        cause="a generator's state lives on one device",
        affected="always; the message varies",
        upstream=(),
        seam="torch.rand, randint, randn, randperm, in-place random methods of torch.Tensor",
        advice="If another pack stops with this error, set ASV_PATCH_GENERATOR_PLACEMENT=on.",
        probe=probe,
        cure=Cure(
            targets=(*(("torch", name) for name in FUNCTIONS), *(("torch.Tensor", name) for name in METHODS)),
            make={**dict.fromkeys(FUNCTIONS, _make_function), **dict.fromkeys(METHODS, _make_method)},
        ),
        reference="generator_placement.reference",
        switch=False,
    ),
)
