"""The nearest settings that fit where the wanted ones do not: another quantisation, fewer frames, a smaller picture.

Quantisations are the files that lie beside the model under the same name with another ending ("-Q4_K_M.gguf").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import VERDICTS, Plan, PlanError, Verdict, plan
from .plan_models import WeightTable, read_table, wan_model

RECIPE = re.compile(r"(?i)[-_.](I?Q\d[\w]*|TQ\d_\d|MXFP4|F16|BF16|F32|fp8[\w]*|fp16|bf16)(?=\.(?:gguf|safetensors)$)")
LEAST_SIDE = 256
LEAST_FRAMES = 17
SCALES = tuple(0.95**step for step in range(40))

# How much a halving hurts: a smaller picture most, then a shorter clip, then coarser weights.
COST = {"size": 3.0, "frames": 2.0, "quantisation": 1.5}

ACCEPTED: tuple[tuple[Verdict, ...], ...] = (("fits",), ("fits", "swap risk"))

Pair = tuple[WeightTable, WeightTable | None]


@dataclass(frozen=True)
class Proposal:
    """Settings that fit. changes: levers by name, with what is to be entered; cost: distance from what was wanted."""

    changes: Mapping[str, str]
    cost: float
    plan: Plan

    def sentence(self) -> str:
        words = ", ".join(f"{value} ({lever})" for lever, value in self.changes.items())
        worst = self.plan.worst
        risk = "" if self.plan.verdict == "fits" else f", {VERDICTS[self.plan.verdict]}"
        return f"{words}: {worst.name} takes {worst.device / (1 << 30):.1f} GiB{risk}"


def quantisations(model: Path, low: Path | None = None) -> dict[str, tuple[Path, Path | None]]:
    """Files of the same model beside it, by recipe; with ``low`` only those that both experts have."""
    found = {}
    for recipe, path in _beside(model).items():
        other = None if low is None else _beside(low).get(recipe)
        if low is None or other is not None:
            found[recipe] = (path, other)
    return found


def _beside(path: Path) -> dict[str, Path]:
    own = RECIPE.search(path.name)
    if own is None or not path.parent.is_dir():
        return {}
    stem = path.name[: own.start()].lower()
    files = ((RECIPE.search(file.name), file) for file in sorted(path.parent.iterdir()))
    return {match[1]: file for match, file in files if match and file.name[: match.start()].lower() == stem}


def tables_beside(model: WeightTable, low: WeightTable | None = None) -> dict[str, Pair]:
    """The tables of ``quantisations``; files that cannot be read are left out."""
    if model.path is None:
        return {}
    tables: dict[str, Pair] = {}
    for recipe, (path, other) in quantisations(model.path, None if low is None else low.path).items():
        try:
            tables[recipe] = read_table(path), None if other is None else read_table(other)
        except (PlanError, OSError):
            continue
    return tables


def nearest(
    model: WeightTable, beside: Mapping[str, Pair], *, width: int, height: int, frames: int, **options: Any
) -> list[Proposal]:
    """What fits, nearest first: for each set of levers the best, unless a part of that set suffices.

    beside: other quantisations by recipe, see ``tables_beside``. options: as for ``plan``. Where nothing fits without
    swap risk, what fits with it; empty if nothing does.
    """
    for accepted in ACCEPTED:
        found = _nearest(model, beside, width, height, frames, options, accepted)
        if found:
            return found
    return []


def _nearest(
    model: WeightTable, beside: Mapping[str, Pair], width: int, height: int, frames: int, options: Mapping[str, Any],
    accepted: tuple[Verdict, ...],
) -> list[Proposal]:  # fmt: skip
    options = dict(options)
    low = options.pop("model_low", None)
    step = 2 * wan_model(model).latent_stride
    pairs: list[tuple[str, Pair]] = [("", (model, low))]
    smaller = [(recipe, pair) for recipe, pair in beside.items() if pair[0].nbytes < model.nbytes]
    pairs += sorted(smaller, key=lambda item: -item[1][0].nbytes)
    best: dict[frozenset[str], Proposal] = {}
    for recipe, (high, other) in pairs:
        for size in _sizes(width, height, step):
            made = _longest(high, other, *size, frames, options, accepted)
            if made is None:
                continue
            changes, cost = _changes(recipe, high, model, size, (width, height), made.video.frames, frames)
            if not changes:
                return []  # what was wanted is accepted as it is
            key = frozenset(changes)
            if key not in best or cost < best[key].cost:
                best[key] = Proposal(changes, cost, made)
    found = [proposal for key, proposal in best.items() if not any(other < key for other in best)]
    return sorted(found, key=lambda proposal: proposal.cost)


def _changes(
    recipe: str,
    table: WeightTable,
    wanted_table: WeightTable,
    size: tuple[int, int],
    wanted_size: tuple[int, int],
    frames: int,
    wanted_frames: int,
) -> tuple[dict[str, str], float]:
    ratios: dict[str, tuple[str, float]] = {}
    if recipe:
        ratios["quantisation"] = (recipe, wanted_table.nbytes / table.nbytes)
    if frames != wanted_frames:
        ratios["frames"] = (f"{frames} frames", wanted_frames / frames)
    if size != wanted_size:
        ratios["size"] = (f"{size[0]}x{size[1]}", math.prod(wanted_size) / math.prod(size))
    cost = sum(COST[lever] * math.log2(ratio) for lever, (_, ratio) in ratios.items())
    return {lever: words for lever, (words, _) in ratios.items()}, cost


def _sizes(width: int, height: int, step: int) -> Iterator[tuple[int, int]]:
    """Sizes of nearly the same shape that the model takes, the wanted one first."""
    seen = set()
    for scale in SCALES:
        size = tuple(max(step, round(side * scale / step) * step) for side in (width, height))
        if size not in seen and (scale == 1 or min(size) >= LEAST_SIDE):
            seen.add(size)
            yield size[0], size[1]


def _longest(
    model: WeightTable, low: WeightTable | None, width: int, height: int, frames: int, options: Mapping[str, Any],
    accepted: tuple[Verdict, ...],
) -> Plan | None:  # fmt: skip
    """The plan with the most frames, up to ``frames``, of an accepted verdict; None if LEAST_FRAMES have none."""

    def at(count: int) -> Plan:
        return plan(model, model_low=low, width=width, height=height, frames=4 * count + 1, **options)

    fewest, most = (min(LEAST_FRAMES, frames) - 1) // 4, (frames - 1) // 4
    whole = at(most)
    if whole.verdict in accepted:
        return whole
    found = at(fewest)
    if found.verdict not in accepted:
        return None
    while most - fewest > 1:
        middle = (fewest + most) // 2
        made = at(middle)
        if made.verdict in accepted:
            fewest, found = middle, made
        else:
            most = middle
    return found
