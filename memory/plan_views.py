"""Views of a plan: text with a bar chart for the terminal and the node, a table of Macs, a picture for the graph."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .plan import GIB, MACS, VERDICTS, Plan, Verdict, plan
from .plan_models import WeightTable
from .plan_search import Proposal

BAR = 40  # characters of the recommended working set
COLOURS: dict[Verdict, tuple[int, int, int]] = {
    "fits": (74, 160, 90),
    "swap risk": (214, 158, 46),
    "does not fit": (208, 62, 62),
}
WEIGHTS, NEEDED, PROCESS = (86, 134, 196), (132, 190, 214), (110, 114, 124)
BACKGROUND, TEXT, FAINT = (24, 26, 30), (232, 234, 238), (150, 154, 162)
WIDTH, MARGIN, ROW, FONT = 1120, 28, 46, 18
LEFT, RIGHT = 190, 230  # of the bars: names before them, figures after them


def to_text(made: Plan, proposals: Sequence[Proposal] = ()) -> str:
    """The verdict, a bar per stage (# weights, = the rest of the device, | the recommended working set), proposals."""
    limit = made.machine.recommended
    lines = [made.sentence(), ""]
    width = max(len(stage.name) for stage in made.stages)
    for stage in made.stages:
        weights = round(BAR * stage.weights / limit)
        device = round(BAR * stage.device / limit)
        bar = ("#" * weights + "=" * (device - weights)).ljust(BAR)
        bar = f"{bar[:BAR]}|{bar[BAR : 2 * BAR]}"
        note = f", {stage.note}" if stage.note else ""
        lines.append(
            f"{stage.name.ljust(width)}  {bar}  {stage.device / GIB:5.1f} GiB, {stage.total / GIB:.1f} in all{note}"
        )
    lines += ["", f"# weights  = working memory  | {limit / GIB:.1f} GiB recommended; in all: with frames and ComfyUI"]
    if made.cfg != "none":
        how = "at once" if made.cfg == "batched" else "one after the other"
        lines.append(f"Both prompts are evaluated {how}.")
    if made.verdict != "fits":
        lines += ["", *_proposals(proposals)]
    return "\n".join(lines)


def _proposals(proposals: Sequence[Proposal]) -> list[str]:
    if not proposals:
        return ["No smaller size, shorter clip or other quantisation beside the file would fit."]
    return ["What would fit, nearest first:", *(f"- {one.sentence()}" for one in proposals)]


def refusal(made: Plan, proposals: Sequence[Proposal]) -> str:
    """Why a run is not begun, in one sentence, with the nearest settings that fit."""
    advice = "no smaller setting of this model would fit"
    if proposals:
        risk = "" if proposals[0].plan.verdict == "fits" else ", with swap risk"
        advice = f"with {' and '.join(proposals[0].changes.values())} it would fit{risk}"
    return f"{made.sentence().rstrip('.')}; {advice}."


def macs_table(model: WeightTable, settings: Mapping[str, Any]) -> str:
    """The verdict for every Mac of the table; settings: as for ``plan``."""
    rows = [("Mac", "recommended", "verdict", "fullest stage", "device", "in all")]
    for gigabytes, machine in MACS.items():
        made = plan(model, **{**settings, "machine": machine})
        worst = made.worst
        rows.append(
            (
                f"{gigabytes} GB",
                f"{machine.recommended / GIB:.1f} GiB",
                VERDICTS[made.verdict],
                worst.name,
                f"{worst.device / GIB:.1f} GiB",
                f"{worst.total / GIB:.1f} GiB",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def to_picture(made: Plan, proposals: Sequence[Proposal] = ()) -> np.ndarray:
    """The chart as float32 [1, height, 1120, 3] from 0 to 1."""
    return np.asarray(_draw(made, proposals), dtype=np.float32)[None] / 255.0


def save_picture(made: Plan, path: Path) -> None:
    """The chart as a PNG file, written beside its name and moved into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            _draw(made, ()).save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(made: Plan, proposals: Sequence[Proposal]) -> Image.Image:
    font = ImageFont.load_default(FONT)
    head = textwrap.wrap(made.sentence(), 108)
    tail = _proposals(proposals) if made.verdict != "fits" and proposals else []
    line = FONT + 10
    height = 2 * MARGIN + line * (len(head) + len(tail) + 3) + ROW * len(made.stages) + 3 * MARGIN
    image = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    badge = VERDICTS[made.verdict]
    draw.rounded_rectangle(
        (MARGIN, y, MARGIN + draw.textlength(badge, font=font) + 24, y + line + 2), 8, COLOURS[made.verdict]
    )
    draw.text((MARGIN + 12, y + 4), badge, font=font, fill=BACKGROUND)
    y = _rows(draw, font, y + line + 14, head, TEXT)
    y = _bars(draw, font, y + MARGIN, made)
    y = _legend(draw, font, y + 8)
    _rows(draw, font, y + 8, tail, TEXT)
    return image


def _bars(draw: ImageDraw.ImageDraw, font: Any, y: int, made: Plan) -> int:
    """A bar per stage from zero to the Mac's memory, or to the largest stage; returns where they end."""
    limit = made.machine.recommended
    longest = max([1.08 * limit, *(stage.total for stage in made.stages)])
    scale = (WIDTH - LEFT - RIGHT) / longest
    bottom = y + ROW * len(made.stages)
    for stage in made.stages:
        draw.text((MARGIN, y + 10), stage.name, font=font, fill=TEXT)
        x = float(LEFT)
        for size, colour in (
            (stage.weights + stage.rounding, WEIGHTS),
            (stage.needed.total, NEEDED),
            (stage.host.total, PROCESS),
        ):
            if size * scale >= 1:
                draw.rectangle((x, y + 8, x + size * scale - 1, y + ROW - 10), fill=colour)
            x += size * scale
        figures = f"{stage.device / GIB:.1f} + {stage.host.total / GIB:.1f} GiB"
        colour = COLOURS[stage.verdict(made.machine)]
        draw.text((WIDTH - RIGHT + 18, y + 4), figures, font=font, fill=colour)
        if stage.note:
            draw.text((WIDTH - RIGHT + 18, y + 24), stage.note, font=ImageFont.load_default(14), fill=FAINT)
        y += ROW
    edge = LEFT + limit * scale
    for top in range(y - ROW * len(made.stages) - 4, bottom, 12):
        draw.line((edge, top, edge, min(top + 7, bottom)), fill=TEXT, width=2)
    words = f"{limit / GIB:.1f} GiB recommended"
    x = min(edge - draw.textlength(words, font=font) / 2, WIDTH - MARGIN - draw.textlength(words, font=font))
    draw.text((x, bottom + 2), words, font=font, fill=FAINT)
    return bottom + FONT + 12


def _legend(draw: ImageDraw.ImageDraw, font: Any, y: int) -> int:
    x = float(MARGIN)
    for words, colour in (("weights", WEIGHTS), ("working memory", NEEDED), ("ComfyUI and frames", PROCESS)):
        draw.rectangle((x, y + 4, x + 16, y + 20), fill=colour)
        draw.text((x + 24, y), words, font=font, fill=FAINT)
        x += 24 + draw.textlength(words, font=font) + 32
    draw.text((WIDTH - RIGHT + 18, y), "device + process", font=font, fill=FAINT)
    return y + FONT + 12


def _rows(draw: ImageDraw.ImageDraw, font: Any, y: int, rows: Sequence[str], colour: tuple[int, int, int]) -> int:
    for row in rows:
        draw.text((MARGIN, y), row, font=font, fill=colour)
        y += FONT + 10
    return y
