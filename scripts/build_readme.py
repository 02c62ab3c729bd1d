"""Writes the README's generated tables between their markers; ``--check`` only compares and fails on a difference.

``<!-- defects -->`` ... ``<!-- /defects -->`` holds the table of known MPS defects, from mps_patches/registry.py.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from _pack import ROOT, load_pack

README = ROOT / "README.md"


def defects() -> str:
    """Symptom, trigger, upstream reference and cure of every known defect."""
    load_pack()
    from apple_silicon_video.mps_patches.registry import DEFECTS, treatment

    rows = ["| id | what you see | when | upstream | what the pack does |", "|---|---|---|---|---|"]
    for defect in DEFECTS.values():
        cells = (defect.id, defect.symptom, defect.trigger, " ".join(defect.upstream), treatment(defect))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


SECTIONS: dict[str, Callable[[], str]] = {"defects": defects}


def built(text: str) -> str:
    """The README with every generated section as it should be."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n)(?:.*?\n)?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no section {name}: put its two markers back.")
        content = make()
        text = pattern.sub(lambda match, content=content: match[1] + content + "\n" + match[2], text)  # type: ignore[misc]
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted = built(text)
    if wanted == text:
        return 0
    if options.check:
        print("README.md is not current: run scripts/build_readme.py and commit the result.", file=sys.stderr)
        return 1
    aside: Path = README.with_suffix(".partial")
    aside.write_text(wanted, encoding="utf-8")
    os.replace(aside, README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
