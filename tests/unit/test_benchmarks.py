"""``benchmarks/run.py``: tiny runs of every benchmark, the table, the JSON and the chart; no figure is asserted."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
SVG = "{http://www.w3.org/2000/svg}"
TEXT_FACTS = ("processor", "os", "architecture", "python", "torch", "device", "date")


@pytest.fixture(scope="module")
def run():
    """The module, imported as ``python benchmarks/run.py`` would, under names that no test shares."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import run
    finally:
        sys.path.remove(str(BENCHMARKS))
    yield run
    for name in ("run", "chart", "measure"):
        del sys.modules[name]


def command(*arguments):
    line = [sys.executable, BENCHMARKS / "run.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", check=False)


def check_results(run, results):
    facts = results["machine"]
    assert all(isinstance(facts[key], str) and facts[key] for key in TEXT_FACTS)
    assert facts["device"] in ("CPU", "MPS") and facts["cores"] > 0 and facts["memory_gib"] > 0
    assert list(results["sections"]) == [name for name in run.SECTIONS if name in results["sections"]]
    for name, rows in results["sections"].items():
        assert rows, name
        for row in rows:
            for column in run.SECTIONS[name].columns:
                value = row.get(column.key)
                assert value is None or column.write is None or isinstance(value, int | float), (name, column.key)
                assert value is not None or column.key in run.SECTIONS[name].optional, (name, column.key)
        assert any(group.bars for group in run.SECTIONS[name].panel(rows)), name


def check_chart(text, results):
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.tag == f"{SVG}svg" and root.get("viewBox") == f"0 0 {width:.0f} {height:.0f}"
    words = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    assert results["machine"]["processor"] in words and results["machine"]["device"] in words
    for rectangle in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rectangle.get(key)) for key in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w <= width and y + h <= height and min(w, h) > 0


def test_every_benchmark_runs(run, tmp_path, capsys):
    """All but ``load``, which needs ComfyUI: tests/comfyui/test_benchmarks.py."""
    names = [name for name in run.SECTIONS if name != "load"]
    result = command(
        "--small", "--only", ",".join(names), "--json", tmp_path / "r.json", "--chart", tmp_path / "sub" / "r.svg"
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    assert list(results["sections"]) == names
    check_results(run, results)
    check_chart((tmp_path / "sub" / "r.svg").read_text(encoding="utf-8"), results)
    for name in names:
        assert run.SECTIONS[name].title in result.stdout
    arguments = ["--from", str(tmp_path / "r.json"), "--only", "", "--json", str(tmp_path / "again.json")]
    assert run.main(arguments) == 0
    assert json.loads((tmp_path / "again.json").read_text())["sections"] == results["sections"]
    assert capsys.readouterr().out.splitlines()[2:] == result.stdout.splitlines()[2:]
    other = {**results, "machine": {**results["machine"], "processor": "Apple M9"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for file, problem in (("other.json", "another machine"), ("missing.json", "holds no results")):
        with pytest.raises(SystemExit, match=problem):
            run.main(["--from", str(tmp_path / file), "--only", ""])


def test_unknown_sections_are_refused(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--only", "open,opne"])
    assert "opne: there are" in capsys.readouterr().err


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_are_whole_and_their_chart_is_of_them(path, run):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert list(results["sections"]) == list(run.SECTIONS)
    assert path.stem == run.machine_slug(results["machine"])
    check_results(run, results)
    text = path.with_suffix(".svg").read_text(encoding="utf-8")
    check_chart(text, results)
    assert text == run.chart(results)


def test_there_are_kept_results():
    assert RESULTS


def test_table_is_aligned(run):
    columns = (run.Column("a", "name"), run.Column("b", "figure", lambda value: f"{value:.1f}"))
    text = run.table(columns, [{"a": "long name", "b": 1.25}, {"a": "x", "b": 1000}, {"a": "y"}])
    assert text.splitlines() == [
        "name       figure",
        "long name     1.2",
        "x          1000.0",
        "y               -",
    ]


def test_chart_of_odd_values(run):
    """Zeros, nothing at all, long and marked-up names: still a document, nothing outside of it."""
    bars = (run.Bar(0.0, "<0> & none"), run.Bar(0.0, "", 1))
    for groups in ((), (run.Group("a" * 90, bars),), (run.Group('"<b>"', (run.Bar(1e12, "1"), run.Bar(1e-9, "2"))),)):
        text = run.svg("Title <&>", 'sub "title"', [run.Panel("P", "note", ("one", "two"), groups)])
        facts = {"machine": {"processor": "sub", "device": "Title <&>"}}
        check_chart(text, facts)
