"""Runs the benchmarks and shows them as tables, JSON and a chart.

    python benchmarks/run.py [--only decode,matmul,open,load,quantise] [--json FILE] [--chart FILE.svg]
    python benchmarks/run.py --save

Each figure is of this machine, which the results name; what it is compared with runs here as well. ``--save`` writes
both files to benchmarks/results under the machine's name; ``--from FILE`` takes what is not run from earlier results
of the same machine. ``load`` needs ComfyUI: the one that the pack lies in, $COMFYUI_DIR, or the pinned one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chart import Bar, Group, Panel, svg
from measure import PASSING_FACTS, ROOT, Row, machine, machine_slug

RESULTS = ROOT / "benchmarks" / "results"
TITLE = "Apple Silicon Video: benchmarks"
MATMUL_TYPE = "Q4_K"


def _millions(value: float) -> str:
    return f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.1f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}" if abs(value) < 1e7 else f"{value / 1e6:.0f}"


def _milliseconds(value: float) -> str:
    return f"{1000 * value:.2f}" if value < 0.01 else f"{1000 * value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _times(value: float) -> str:
    return f"{value:.2f} x" if value < 100 else f"{value:.0f} x"


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A column of the table: key of the row, heading, how numbers are written (None for text)."""

    key: str
    heading: str
    write: Callable[[Any], str] | None = None

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return str(value) if self.write is None else self.write(value)


@dataclass(frozen=True)
class Section:
    """One benchmark.

    Args:
        title, note: what it measures, and what the chart's bars show.
        module: that has ``run(**arguments)``, which returns rows.
        columns: of the table.
        panel: rows to the chart's groups.
        legend: names of the chart's colours.
        small: arguments for a run that only shows that everything works.
        optional: columns that a row may lack.
    """

    title: str
    note: str
    module: str
    columns: tuple[Column, ...]
    panel: Callable[[Sequence[Row]], list[Group]]
    legend: tuple[str, ...]
    small: dict[str, Any] = field(default_factory=lambda: {"small": True})
    optional: tuple[str, ...] = ()


def _by_maker(
    label: str, maker: str, ours: str, value: str, text: Callable[[Row], str]
) -> Callable[[Sequence[Row]], list[Group]]:
    """Groups of the rows that share ``label``; those whose ``maker`` is ``ours`` are what is measured."""

    def groups(rows: Sequence[Row]) -> list[Group]:
        made: dict[str, list[Bar]] = {}
        for row in rows:
            made.setdefault(str(row[label]), []).append(Bar(row[value], text(row), int(row[maker] != ours)))
        return [Group(name, tuple(sorted(bars, key=lambda bar: bar.kind))) for name, bars in made.items()]

    return groups


def _decode_groups(rows: Sequence[Row]) -> list[Group]:
    """The pack's and plain decoding's weights per second, by type and path."""
    return [
        Group(
            f"{row['type']}, {row['path']}",
            (
                Bar(row["weights_per_second"], f"{_millions(row['weights_per_second'])} M/s ({_times(row['ratio'])})"),
                Bar(row["baseline_weights_per_second"], f"{_millions(row['baseline_weights_per_second'])} M/s", 1),
            ),
        )
        for row in rows
    ]


def _matmul_groups(rows: Sequence[Row]) -> list[Group]:
    """Bytes moved on both paths, by matrix and rows, for one type (they differ little)."""
    shown = [row for row in rows if row["type"] == MATMUL_TYPE] or list(rows)
    named = [{**row, "label": f"{row['matrix']}, {row['rows']}"} for row in shown]
    return _by_maker("label", "path", "fused", "bytes", lambda row: f"{_megabytes(row['bytes'])} MB")(named)


SECTIONS = {
    "decode": Section(
        "Decoding quantised weights to float16",
        "Million weights per second, 13 million weights: longer is better.",
        "decode",
        (
            Column("type", "type"),
            Column("path", "path"),
            Column("weights_per_second", "million weights/s", _millions),
            Column("baseline_weights_per_second", "plain", _millions),
            Column("ratio", "ratio", _times),
            Column("launches", "launches", str),
            Column("bytes_over_ideal", "bytes over ideal", _fixed(2)),
            Column("share_of_copy_bandwidth", "of copy bandwidth", _percent),
        ),
        _decode_groups,
        ("the pack", "plain element-wise decoding"),
    ),
    "matmul": Section(
        "Products with quantised weights",
        f"Megabytes moved for a {MATMUL_TYPE} matrix and so many rows, computed from the shapes: shorter is better.",
        "matmul",
        (
            Column("matrix", "matrix"),
            Column("type", "type"),
            Column("rows", "rows", str),
            Column("path", "path"),
            Column("bytes", "MB moved", _megabytes),
            Column("ratio", "ratio", _times),
            Column("seconds", "ms", _milliseconds),
        ),
        _matmul_groups,
        ("fused", "decoded first"),
        optional=("seconds",),
    ),
    "open": Section(
        "Opening GGUF files",
        "Milliseconds until the tensor table is there: shorter is better.",
        "gguf_open",
        (
            Column("file", "file"),
            Column("reader", "reader"),
            Column("open_seconds", "open ms", _milliseconds),
            Column("open_bytes", "memory MB", _megabytes),
            Column("tokens_seconds", "tokens ms", _milliseconds),
            Column("tokens_bytes", "memory MB", _megabytes),
            Column("ratio", "ratio", _times),
        ),
        _by_maker(
            "file",
            "reader",
            "the pack",
            "open_seconds",
            lambda row: f"{_milliseconds(row['open_seconds'])} ms, {_megabytes(row['open_bytes'])} MB",
        ),
        ("the pack", "gguf-py"),
    ),
    "load": Section(
        "Loading models into ComfyUI",
        "Most resident memory during the load, in MB above what was resident before: shorter is better.",
        "model_load",
        (
            Column("model", "model"),
            Column("loader", "loader"),
            Column("file_bytes", "file MB", _megabytes),
            Column("model_bytes", "model MB", _megabytes),
            Column("largest_tensor_bytes", "largest tensor MB", _megabytes),
            Column("seconds", "seconds", _fixed(2)),
            Column("peak_bytes", "peak MB", _megabytes),
            Column("resident_bytes", "after MB", _megabytes),
        ),
        _by_maker(
            "model",
            "loader",
            "the pack",
            "peak_bytes",
            lambda row: f"{_megabytes(row['peak_bytes'])} MB, {row['seconds']:.1f} s",
        ),
        ("the pack", "ComfyUI's own loader"),
    ),
    "quantise": Section(
        "Quantising bfloat16 safetensors to GGUF",
        "Million weights per second: longer is better.",
        "quantise",
        (
            Column("type", "type"),
            Column("threads", "threads", str),
            Column("weights_per_second", "million weights/s", _millions),
            Column("minutes_14b", "minutes for 14B", _fixed(1)),
            Column("bits_per_weight", "bits/weight", _fixed(2)),
            Column("resident_bytes", "process MB", _megabytes),
        ),
        lambda rows: [
            Group(
                row["type"],
                (
                    Bar(
                        row["weights_per_second"],
                        f"{_millions(row['weights_per_second'])} M/s, 14B in {row['minutes_14b']:.0f} min",
                    ),
                ),
            )
            for row in rows
        ],
        (),
    ),
}


def measure(names: Sequence[str], small: bool) -> dict[str, list[Row]]:
    """Rows of the named sections."""
    found = {}
    for name in names:
        section = SECTIONS[name]
        print(f"{section.title} ...", file=sys.stderr, flush=True)
        found[name] = importlib.import_module(section.module).run(**(section.small if small else {}))
    return found


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Rows as aligned text: words to the left, numbers to the right."""
    cells = [[column.heading for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = (
            cell.ljust(width) if column.write is None else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def about(facts: Row) -> str:
    """The machine in one line, and how busy it was with other work."""
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['os']}, "
        f"Python {facts['python']}, torch {facts['torch']}, device {facts['device']}, {facts['date']}, "
        f"load average {facts['load_average']} before"
    )


def report(results: Row) -> str:
    """All sections as text."""
    parts = [about(results["machine"])]
    for name, rows in results["sections"].items():
        parts.append(f"{SECTIONS[name].title}\n{table(SECTIONS[name].columns, rows)}")
    return "\n\n".join(parts)


def chart(results: Row) -> str:
    """All sections as an SVG document."""
    panels = [
        Panel(section.title, section.note, section.legend, tuple(section.panel(results["sections"][name])))
        for name, section in SECTIONS.items()
        if name in results["sections"]
    ]
    return svg(f"{TITLE} ({results['machine']['device']})", about(results["machine"]), panels)


def _earlier(path: Path, facts: Row) -> Row:
    """Earlier results; exits unless they are of this machine."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        same = all(results["machine"][key] == facts[key] for key in facts if key not in PASSING_FACTS)
        sections = {name: rows for name, rows in results["sections"].items() if name in SECTIONS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"{path} holds no results of this benchmark ({type(error).__name__}): choose another file.")
    if not same:
        sys.exit(f"{path} holds results of another machine or of other versions: run all sections here.")
    return {"machine": results["machine"], "sections": sections}


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_names, default=list(SECTIONS), metavar="A,B", help="these sections only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="write the chart")
    parser.add_argument("--save", action="store_true", help=f"write both to {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--from", type=Path, dest="earlier", metavar="FILE", help="earlier results to fill in from")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to see that everything works")
    options = parser.parse_args(arguments)
    facts = machine()
    earlier = {"sections": {}} if options.earlier is None else _earlier(options.earlier, facts)
    if not options.only:
        facts = earlier.get("machine", facts)
    try:
        found = earlier["sections"] | measure(options.only, options.small)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    results = {"machine": facts, "sections": {name: found[name] for name in SECTIONS if name in found}}
    slug = RESULTS / machine_slug(facts)
    for path in (options.json, slug.with_suffix(".json") if options.save else None):
        _write(path, json.dumps(results, indent=1) + "\n")
    for path in (options.chart, slug.with_suffix(".svg") if options.save else None):
        _write(path, chart(results))
    print(report(results))
    return 0


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
