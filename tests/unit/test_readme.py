"""The README's generated tables are current, and it names every node, script and workflow there is."""

import json
from pathlib import Path

import build_readme
import build_workflows

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_sections_are_current():
    assert build_readme.built(TEXT) == TEXT, "run scripts/build_readme.py"


def test_every_node_and_workflow_is_named():
    nodes = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for node in nodes.values():
        assert f"**{node['display_name']}**" in TEXT
    for name in build_workflows.TABLE:
        assert f"workflows/{name}.json" in TEXT


def test_no_figure_is_claimed_for_a_mac():
    assert "a real Mac | **not yet**" in TEXT
