"""The Doctor: every probe of the table on the device at hand, the machine, its memory, and what to do about it.

Results are data (``Diagnosis``); text, Markdown, JSON and a picture are views of it. The probes are those that decide
over the patches, so what the Doctor shows is what the pack acts on.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import install
from .attention import PATCHED_PROBES
from .registry import DEFECTS, Defect, ProbeResult

PASS, CURED, DEFECT = "pass", "defect, cured", "defect, not cured"
# A probe that is too large for now, whose patch the first call of that size decides over; a probe that stopped.
WATCHED, FAILED, NOT_APPLICABLE = "checked on first use", "probe failed", "not applicable"
UNMEASURED = (WATCHED, FAILED, NOT_APPLICABLE)
PACKAGES = (
    "torchvision",
    "av",
    "eva-decord",
    "safetensors",
    "sentencepiece",
    "diffusers",
    "gguf",
    "mtlflashattn",
    "mps-flash-attn",
    "mlx",
)
ADVISED_TORCH = (2, 14)
WRONG_CONV3D_MACOS = "26.2"


@dataclass(frozen=True)
class Line:
    """One defect as it stands on this device."""

    id: str
    title: str
    verdict: str
    error: float
    tolerance: float
    detail: str
    upstream: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found: the machine (name -> value), one line per defect, memory in bytes, advice, seconds taken."""

    device: str
    quick: bool
    machine: dict[str, str]
    memory: dict[str, int]
    lines: tuple[Line, ...]
    advice: tuple[str, ...]
    seconds: float = 0.0
    packs: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The whole diagnosis for JSON; infinite errors become the text "inf"."""
        result = asdict(self)
        for line in result["lines"]:
            line["error"] = line["error"] if abs(line["error"]) < float("inf") else "inf"
        return result

    def count(self, verdict: str) -> int:
        return sum(line.verdict == verdict for line in self.lines)


def diagnose(
    device: torch.device | str | None = None,
    quick: bool = False,
    memory: dict[str, int] | None = None,
    comfyui: str | None = None,
    packs: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Run every probe and say what it means.

    Args:
        device: None is MPS where there is one, else no probe runs.
        quick: small tensors, in seconds; otherwise real Wan shapes, in under a minute.
        memory: figures to show (bytes by name).
        comfyui: ComfyUI's version where it is known.
        packs: names of other node packs that matter here.
        progress: called with (done, total) after each probe; may raise to stop.
    """
    start = time.perf_counter()
    found = _device(device)
    lines = []
    for done, defect in enumerate(DEFECTS.values(), 1):
        lines.append(_line(defect, found, quick))
        if progress is not None:
            progress(done, len(DEFECTS))
    machine = describe_machine(comfyui)
    return Diagnosis(
        device=str(found) if found else "none",
        quick=quick,
        machine=machine,
        memory=memory or {},
        lines=tuple(lines),
        advice=tuple(_advice(lines, machine, found)),
        seconds=time.perf_counter() - start,
        packs=tuple(packs),
    )


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is not None:
        return torch.device(device)
    return torch.device("mps") if torch.backends.mps.is_available() else None


def _line(defect: Defect, device: torch.device | None, quick: bool) -> Line:
    if device is None:
        verdict, error, tolerance, detail = NOT_APPLICABLE, 0.0, 0.0, "there is no MPS device here"
    else:
        verdict, bare, cured = install.examine(defect, device, quick)
        if verdict == DEFECT and defect.kind == "model":
            verdict, cured = _with_model_patch(defect, device, quick)
        error, tolerance, detail = bare.error, bare.tolerance, bare.detail
        if cured is not None:
            detail = f"{detail}; with the patch {cured.error:.2g}"
    return Line(defect.id, defect.title, verdict, error, tolerance, detail, defect.upstream, defect.advice)


def _with_model_patch(defect: Defect, device: torch.device, quick: bool) -> tuple[str, ProbeResult | None]:
    """Verdict and probe of a defect that the patches of a model cure; what has no probe of its own is avoided."""
    probe = PATCHED_PROBES.get(defect.id)
    if probe is None:
        return CURED, None
    result = probe(device, quick)
    return (CURED if result.ok and result.applicable else DEFECT), result


def describe_machine(comfyui: str | None = None) -> dict[str, str]:
    """Chip, systems and versions, as far as they can be told."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "chip": _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        "macOS": platform.mac_ver()[0] or f"none ({platform.system()} {platform.release()})",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ComfyUI": comfyui or "not running",
        **{name: version for name, version in versions.items() if version},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sysctl(name: str) -> str | None:
    if sys.platform != "darwin":
        return None
    try:
        result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _advice(lines: Sequence[Line], machine: dict[str, str], device: torch.device | None) -> list[str]:
    """Sentences in the order of their effect: what is broken now, then what an update would better."""
    if device is None:
        return ["There is no MPS device here: versions and files can be checked, the probes need a Mac."]
    advice = [f"{line.title}: {line.advice}" for line in lines if line.verdict == DEFECT]
    broken = [line for line in lines if line.verdict == FAILED]
    advice += [f"{line.title}: its probe failed ({line.detail}); please report that." for line in broken]
    if machine["macOS"] == WRONG_CONV3D_MACOS:
        advice.append("Update macOS to 26.3 or later: 26.2 computes conv3d wrongly, which spoils VAE decoding.")
    if _numbers(machine["torch"]) < ADVISED_TORCH:
        wanted = ".".join(map(str, ADVISED_TORCH))
        advice.append(f"Update torch to {wanted} or later: VAE decoding uses its own conv3d kernels from there on.")
    cured = sum(line.verdict == CURED for line in lines)
    if cured:
        advice.append(f"Leave the pack installed: {cured} of this device's defects are cured by its patches.")
    return advice or ["Nothing to do: every probe that applies here passes."]
