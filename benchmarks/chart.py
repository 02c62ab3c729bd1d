"""A bar chart of benchmark results as SVG, without any library.

It has its own background and colours for light and dark pages (``prefers-color-scheme``), plain shapes and text only,
and fonts that every system has, so that it looks alike on GitHub, in a browser and in a picture made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 860
MARGIN = 24
LABEL_WIDTH = 190
VALUE_WIDTH = 170
LINE = 17
BAR = 12
GAP = 9
PANEL_GAP = 34
CHARACTER = 6.6  # mean width at the size of the labels

STYLE = """
  text { font: 12px -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Helvetica, Arial, sans-serif; fill: #24292f }
  .title { font-size: 17px; font-weight: 600 }
  .panel { font-size: 14px; font-weight: 600 }
  .quiet { fill: #57606a }
  .page { fill: #ffffff; stroke: #d0d7de }
  .first { fill: #0969da }
  .second { fill: #afb8c1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .quiet { fill: #9198a1 }
    .page { fill: #0d1117; stroke: #3d444d }
    .first { fill: #4493f8 }
    .second { fill: #59636e }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One bar: ``kind`` 0 is what is measured, 1 what it is compared with; ``text`` stands behind it."""

    value: float
    text: str
    kind: int = 0


@dataclass(frozen=True)
class Group:
    """Bars that share a label."""

    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Panel:
    """Groups on one scale; ``note`` says what the bars show, ``legend`` what the two colours are."""

    title: str
    note: str
    legend: tuple[str, ...]
    groups: tuple[Group, ...]


def svg(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """The chart as an SVG document."""
    y = MARGIN + 16.0
    body = [_text(MARGIN, y, title, "title"), _text(MARGIN, y + 22, subtitle, "quiet")]
    y += 22 + PANEL_GAP - 4
    for panel in panels:
        lines, y = _panel(panel, y)
        body += lines
        y += PANEL_GAP
    height = round(y - PANEL_GAP + MARGIN)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-label="{_attribute(f"{title}: {subtitle}")}">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *body,
            "</svg>\n",
        ]
    )


def _panel(panel: Panel, y: float) -> tuple[list[str], float]:
    """The panel's lines, and where it ends."""
    lines = [_text(MARGIN, y, panel.title, "panel"), *_legend(panel.legend, y)]
    lines.append(_text(MARGIN, y + LINE, panel.note, "quiet"))
    y += LINE + GAP
    largest = max((bar.value for group in panel.groups for bar in group.bars), default=0.0)
    room = WIDTH - 2 * MARGIN - LABEL_WIDTH - VALUE_WIDTH
    for group in panel.groups:
        middle = y + len(group.bars) * (BAR + 2) / 2 + 4
        lines.append(_text(MARGIN + LABEL_WIDTH - 10, middle, _short(group.label), "", "end"))
        for bar in group.bars:
            length = max(1.0, room * bar.value / largest) if largest > 0 else 1.0
            x = MARGIN + LABEL_WIDTH
            style = "second" if bar.kind else "first"
            lines.append(f'<rect class="{style}" x="{x}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" rx="2"/>')
            lines.append(_text(x + length + 6, y + BAR - 2, bar.text, "quiet" if bar.kind else ""))
            y += BAR + 2
        y += GAP - 2
    return lines, y - GAP


def _legend(names: Sequence[str], y: float) -> list[str]:
    """Squares with names, flush right on the line of the panel's title."""
    lines: list[str] = []
    x = WIDTH - MARGIN
    for kind, name in reversed(list(enumerate(names))):
        x -= round(CHARACTER * len(name))
        lines.append(_text(x, y, name, "quiet"))
        x -= BAR + 5
        lines.append(
            f'<rect class="{"second" if kind else "first"}" x="{x}" y="{y - 10}" width="{BAR}" height="{BAR}"/>'
        )
        x -= 16
    return lines


def _short(label: str) -> str:
    most = int((LABEL_WIDTH - 10) / CHARACTER)
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _attribute(text: str) -> str:
    return escape(text, {'"': "&quot;"})
