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
from workflow_table import TABLE

__all__ = ["FILES", "TABLE", "WORKFLOWS", "workflow_files"]

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"


def workflow_files() -> dict[Path, str]:
    """Path -> text of every workflow file, as it should be on disk."""
    files = {}
    for name, row in TABLE.items():
        graph = row.draw(row)
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
