"""What a defect of the MPS backend is to this pack, and the table of those known.

Each entry carries its own evidence (a probe), its cure and the text that the Doctor and the README show. Entries live
in one file per defect, listed in ``MODULES``; a file is imported when the table is first read, so that it may import
this module for the types. Facts come from the trackers named in ``upstream``; the probe on the device decides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Function = Callable[..., Any]
Maker = Callable[[Function], Function]
Kind = Literal["process", "model", "loader", "advice"]

# Files of this folder that have a ``DEFECTS`` tuple, in the order the Doctor shows them: most users affected first.
MODULES = (
    "unipc",
    "attention",
    "pad_rank_5",
    "int_max",
    "interpolate",
    "rms_norm_rows",
    "conv_sliced_weight",
    "matmul_large_k",
    "bmm_2_32",
    "linear_large_batch",
    "cat_2_31",
    "index_select_2_31",
    "baddbmm_uninitialised",
    "cpu_scalar_view",
    "conv_output_channels",
    "float64",
    "generator_placement",
    "randomness",
    "quantised_dtype",
    "system",
)


@dataclass
class ProbeResult:
    """What a probe found.

    ok: the device is right (or the probe does not apply).
    error, tolerance: the largest error against the CPU reference, in the unit named in ``detail``; inf where the
        device raised.
    applicable: False where nothing could be measured here; ``detail`` says why.
    """

    ok: bool
    error: float
    tolerance: float
    detail: str
    applicable: bool = True


Probe = Callable[[torch.device, bool], ProbeResult]


@dataclass(frozen=True)
class Cure:
    """Replacements made process-wide while the defect's patch is on.

    targets: pairs of a module path (or the path of a class, "torch.Tensor") and an attribute of it. A path that cannot
        be imported, or an attribute that is not there, is passed over.
    make: takes the function found there and returns the wrapper, which acts on mps tensors that meet the trigger and
        calls the original for everything else; or, where targets need different wrappers, a table of such makers by
        attribute.
    preventive: install without evidence when the quick probe cannot apply (the trigger is too large, or too dangerous,
        to be set off at start). Such a wrapper acts at the trigger size only, where its result is right on any device.
    """

    targets: tuple[tuple[str, str], ...]
    make: Maker | Mapping[str, Maker]
    preventive: bool = False

    def maker(self, attribute: str) -> Maker:
        """What makes the wrapper for one attribute."""
        return self.make if callable(self.make) else self.make[attribute]


@dataclass(frozen=True)
class Defect:
    """One known defect; the fields up to ``advice`` are text for people.

    upstream: references such as "pytorch#194922" or "ComfyUI#16433".
    reference: dotted name, inside this folder, of the plain torch implementation that the cure is held against.
    switch: False if the patch is off unless the user turns it on.
    kind: "process" (functions are replaced process-wide), "model" (applied to one model or VAE through its patcher),
        "loader" (the pack's loaders and nodes avoid it), "advice" (reported only).
    """

    id: str
    title: str
    symptom: str
    trigger: str
    cause: str
    affected: str
    upstream: tuple[str, ...]
    seam: str
    advice: str
    probe: Probe | None
    cure: Cure | None
    reference: str
    switch: bool = True
    kind: Kind = "process"


class _Table(Mapping[str, Defect]):
    """id -> Defect, filled from MODULES on first use."""

    def __init__(self) -> None:
        self._entries: dict[str, Defect] = {}

    def _load(self) -> dict[str, Defect]:
        if not self._entries:
            found = [importlib.import_module(f".{name}", __package__).DEFECTS for name in MODULES]
            self._entries = {defect.id: defect for defects in found for defect in defects}
        return self._entries

    def __getitem__(self, key: str) -> Defect:
        return self._load()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


DEFECTS: Mapping[str, Defect] = _Table()
