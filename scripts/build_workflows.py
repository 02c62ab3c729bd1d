"""Writes workflows/*.json (to open) and workflows/api/*.json (for scripts) from workflow_table.py.

``python scripts/build_workflows.py`` writes them; ``--check`` only compares and fails when a file differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from workflow_files import FILES
from workflow_graph import Graph
from workflow_plans import planned
from workflow_table import TABLE, Row

__all__ = ["FILES", "TABLE", "WORKFLOWS", "workflow_files"]

GIB = 1 << 30
WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"


def expected_memory(row: Row) -> str:
    """What the note says of the plan: a line for each stage, in GiB."""
    made = planned(row)
    lines = "\n".join(
        f"| {stage.name} | {stage.device / GIB:.1f} GiB | {stage.total / GIB:.1f} GiB |" for stage in made.stages
    )
    return (
        "### Expected memory\n\n| stage | on the GPU | in all |\n|---|---|---|\n"
        f"{lines}\n\nPlanned, not measured on a Mac; {made.machine.recommended / GIB:.1f} GiB on the GPU are "
        f"recommended on {made.machine.title}. *Plan Memory (MPS)* says the same for other settings."
    )


def drawn(row: Row) -> Graph:
    """A row's graph, with its plan in the note."""
    graph = row.draw(row)
    note = next(node for node in graph.nodes() if node.kind == "MarkdownNote")
    note.widgets["~text"] = f"{note.widgets['~text']}\n\n{expected_memory(row)}"
    return graph


def workflow_files() -> dict[Path, str]:
    """Path -> text of every workflow file, as it should be on disk."""
    files = {}
    for name, row in TABLE.items():
        graph = drawn(row)
        files[WORKFLOWS / f"{name}.json"] = json.dumps(graph.to_ui(), indent=2, ensure_ascii=False) + "\n"
        files[WORKFLOWS / "api" / f"{name}.json"] = json.dumps(graph.to_api(), indent=2, ensure_ascii=False) + "\n"
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; fail when a file differs")
    check = parser.parse_args().check
    stale = [path for path, text in workflow_files().items() if not path.is_file() or path.read_text() != text]
    if check:
        for path in stale:
            print(
                f"{path.name} is not what scripts/build_workflows.py makes: run it and commit the result.",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path, text in workflow_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_text(text)
        os.replace(aside, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
