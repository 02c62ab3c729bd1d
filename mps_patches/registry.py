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
    "attention_defects",
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
    failed: the probe itself stopped with an error, which ``detail`` gives; never applicable then.
    """

    ok: bool
    error: float
    tolerance: float
    detail: str
    applicable: bool = True
    failed: bool = False


Probe = Callable[[torch.device, bool], ProbeResult]


@dataclass(frozen=True)
class FirstUse:
    """How a cure is decided on where its trigger is too large, or too dangerous, to be set off at start.

    A gate watches the function. The first call of trigger size is checked, and from then on the process keeps the
    original (the gate is taken out) or the cure. Until then no result is changed.

    meets: given a call's arguments, whether it is of trigger size; must not raise.
    check: given the original function and a call's arguments, what the device does there.
    """

    meets: Callable[..., bool]
    check: Callable[[Function, tuple[Any, ...], dict[str, Any]], ProbeResult]


@dataclass(frozen=True)
class Cure:
    """Replacements made process-wide while the defect's patch is on.

    targets: pairs of a module path (or the path of a class, "torch.Tensor") and an attribute of it. A path that cannot
        be imported, or an attribute that is not there, is passed over.
    make: takes the function found there and returns the wrapper, which acts on mps tensors that meet the trigger and
        calls the original for everything else; or, where targets need different wrappers, a table of such makers by
        attribute.
    first_use: by attribute, how the cure is decided on when the quick probe does not apply; None: it stays off then.
    verify: the probe that must pass with the cure in place; None: the defect's own.
    """

    targets: tuple[tuple[str, str], ...]
    make: Maker | Mapping[str, Maker]
    first_use: Mapping[str, FirstUse] | None = None
    verify: Probe | None = None

    def maker(self, attribute: str) -> Maker:
        """What makes the wrapper for one attribute."""
        return self.make if callable(self.make) else self.make[attribute]


# Bytes on the device that a probe may take without declaring a footprint.
SMALL_PROBE = 256 << 20


def _small(quick: bool) -> int:
    return SMALL_PROBE


@dataclass(frozen=True)
class Defect:
    """One known defect; the fields up to ``advice`` are text for people.

    upstream: references such as "pytorch#194922" or "ComfyUI#16433".
    reference: dotted name, inside this folder, of the plain torch implementation that the cure is held against.
    switch: False if the patch is off unless the user turns it on.
    footprint: given ``quick``, the most bytes that the probe holds on the device at once, child processes included.
    kind: "process" (functions are replaced process-wide), "model" (applied to one model or VAE through its patcher),
        "loader" (the pack's loaders and nodes avoid it), "advice" (reported only). A "model" defect may have a cure
        too, for the calls that no model's patcher reaches.
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
    footprint: Callable[[bool], int] = _small


TREATMENTS: dict[Kind, str] = {
    "process": "patched where the probe fails",
    "model": "patched in the models and VAEs that the pack loads, or with Patch Model / Patch VAE for MPS",
    "loader": "avoided by the pack's loaders",
    "advice": "reported by the Doctor",
}
AT_FIRST_USE = "checked at the first call of that size, and patched from then on if it is wrong"
UNREACHED = "calls that no model patch reaches: "


def treatment(defect: Defect) -> str:
    """What the pack does about a defect, in words for users."""
    text = TREATMENTS[defect.kind]
    if defect.cure is None:
        return text
    if defect.kind == "process":
        text = AT_FIRST_USE if defect.cure.first_use else text
        return text if defect.switch else f"off; {environment_name(defect.id)}=on switches its patch on"
    return f"{text}; {UNREACHED}{AT_FIRST_USE if defect.cure.first_use else TREATMENTS['process']}"


def environment_name(defect_id: str) -> str:
    """The environment variable that switches one patch: ``ASV_PATCH_PAD_RANK_5`` for "pad-rank-5"."""
    return "ASV_PATCH_" + defect_id.upper().replace("-", "_")


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
