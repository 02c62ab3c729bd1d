"""Views of a diagnosis: a table for the terminal, Markdown for a bug report, a picture for the graph."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .doctor import CURED, DEFECT, FAILED, NOT_APPLICABLE, PASS, UNMEASURED, WATCHED, Diagnosis, Line

GIB = 1 << 30
COLOURS = {
    PASS: (74, 160, 90),
    CURED: (214, 158, 46),
    DEFECT: (208, 62, 62),
    WATCHED: (86, 134, 196),
    FAILED: (176, 84, 176),
    NOT_APPLICABLE: (120, 124, 132),
}
BACKGROUND, TEXT, FAINT = (24, 26, 30), (232, 234, 238), (150, 154, 162)
WIDTH, MARGIN, ROW, FONT = 1280, 28, 30, 18
SHORT = 60  # characters of an error that fit beside its line


def _error(line: Line) -> str:
    if line.verdict == FAILED:
        return textwrap.shorten(line.detail, SHORT, placeholder=" ...")
    if line.verdict in UNMEASURED:
        return "-"
    return f"{line.error:.2g} (limit {line.tolerance:.2g})"


def _first_reference(line: Line) -> str:
    """The first upstream report, and how many more there are."""
    more = f" +{len(line.upstream) - 1}" if len(line.upstream) > 1 else ""
    return line.upstream[0] + more if line.upstream else ""


def _machine(diagnosis: Diagnosis) -> str:
    parts = [f"{name} {value}" for name, value in diagnosis.machine.items()]
    parts += [f"{name} {value / GIB:.1f} GiB" for name, value in diagnosis.memory.items()]
    parts += [f"pack {name}" for name in diagnosis.packs]
    return ", ".join(parts)


def _summary(diagnosis: Diagnosis) -> str:
    counts = ", ".join(f"{diagnosis.count(verdict)} {verdict}" for verdict in COLOURS)
    how = "quick" if diagnosis.quick else "full"
    return f"{how} examination of {diagnosis.device} in {diagnosis.seconds:.1f} s: {counts}"


def to_table(diagnosis: Diagnosis) -> str:
    """Plain text for the terminal."""
    rows = [("verdict", "defect", "error", "upstream")]
    rows += [(line.verdict, line.id, _error(line), " ".join(line.upstream)) for line in diagnosis.lines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    text = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip() for row in rows]
    advice = [f"- {sentence}" for sentence in diagnosis.advice]
    return "\n".join([_machine(diagnosis), "", *text, "", _summary(diagnosis), "", "Advice:", *advice])


def to_markdown(diagnosis: Diagnosis) -> str:
    """A table to paste into a bug report."""
    rows = [
        f"| {line.verdict} | {line.id} | {line.title} | {_error(line)} | {' '.join(line.upstream)} |"
        for line in diagnosis.lines
    ]
    head = ["| verdict | id | defect | error | upstream |", "|---|---|---|---|---|"]
    advice = [f"- {sentence}" for sentence in diagnosis.advice]
    return "\n".join([_machine(diagnosis), "", *head, *rows, "", _summary(diagnosis), "", *advice]) + "\n"


def to_picture(diagnosis: Diagnosis) -> np.ndarray:
    """The diagnosis as float32 [1, height, 1280, 3] from 0 to 1."""
    font = ImageFont.load_default(FONT)
    machine = textwrap.wrap(_machine(diagnosis), 130)
    advice = [part for text in diagnosis.advice for part in textwrap.wrap(text, 120, subsequent_indent="   ")]
    rows = 3 + len(machine) + len(diagnosis.lines) + 2 + len(advice)
    image = Image.new("RGB", (WIDTH, 2 * MARGIN + ROW * rows), BACKGROUND)
    draw = ImageDraw.Draw(image)
    y = MARGIN
    y = _text_rows(draw, font, y, ["MPS Doctor"], TEXT)
    y = _text_rows(draw, font, y, [_summary(diagnosis), *machine], FAINT) + ROW // 2
    for line in diagnosis.lines:
        draw.rounded_rectangle((MARGIN, y + 3, MARGIN + 188, y + ROW - 5), 6, COLOURS[line.verdict])
        draw.text((MARGIN + 10, y + 3), line.verdict, font=font, fill=BACKGROUND)
        draw.text((MARGIN + 206, y + 3), line.title, font=font, fill=TEXT)
        draw.text((MARGIN + 690, y + 3), _error(line), font=font, fill=FAINT)
        if line.verdict != FAILED:
            draw.text((MARGIN + 930, y + 3), _first_reference(line), font=font, fill=FAINT)
        y += ROW
    _text_rows(draw, font, y + ROW // 2, ["Advice", *advice], TEXT)
    return np.asarray(image, dtype=np.float32)[None] / 255.0


def _text_rows(draw: ImageDraw.ImageDraw, font: Any, y: int, rows: Sequence[str], colour: tuple) -> int:
    for row in rows:
        draw.text((MARGIN, y + 3), row, font=font, fill=colour)
        y += ROW
    return y
