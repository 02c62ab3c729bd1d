"""Writes the generated tables of README.md and README.zh-CN.md between their markers; ``--check`` only compares.

``<!-- defects -->`` ... ``<!-- /defects -->`` holds the table of known MPS defects, and so on: readme_tables.SECTIONS.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from _pack import ROOT
from readme_tables import SECTIONS, Language

READMES: dict[Path, Language] = {ROOT / "README.md": "en", ROOT / "README.zh-CN.md": "zh"}


def built(text: str, language: Language) -> str:
    """A README with every generated section as it should be."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n)(?:.*?\n)?(<!-- /{name} -->)", re.DOTALL)
        match = pattern.search(text)
        if match is None:
            raise SystemExit(f"The README ({language}) has no section {name}: put its two markers back.")
        content = make(language)
        text = text[: match.end(1)] + (content + "\n" if content else "") + text[match.start(2) :]
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; fail on a difference")
    options = parser.parse_args(arguments)
    stale = {path: new for path, language in READMES.items() if (new := _built_file(path, language)) is not None}
    if options.check:
        for path in stale:
            print(f"{path.name} is not current: run scripts/build_readme.py and commit the result.", file=sys.stderr)
        return 1 if stale else 0
    for path, text in stale.items():
        aside = path.with_suffix(".partial")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return 0


def _built_file(path: Path, language: Language) -> str | None:
    """What a file should be; None where it is that already."""
    text = path.read_text(encoding="utf-8")
    wanted = built(text, language)
    return None if wanted == text else wanted


if __name__ == "__main__":
    sys.exit(main())
