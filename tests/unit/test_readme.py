"""Both READMEs: generated tables are current, links lead somewhere, and the two say the same, command for command."""

import json
import re

import build_readme
import build_workflows
import pytest
import readme_chinese
import readme_tables
from apple_silicon_video.mps_patches.registry import DEFECTS
from apple_silicon_video.tests.archive import ROOT, archive_files
from apple_silicon_video.tests.readme import commands, text
from readme_symptoms import SYMPTOMS

LANGUAGES = ("en", "zh")
LINK = re.compile(r"""\]\(([^)\s]+)\)|src="([^"]+)\"""")
CJK = re.compile(r"[\u4e00-\u9fff]")


def nodes(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def headings(language):
    """(level, text) of every heading outside of code."""
    prose = re.sub(r"^```.*?^```$", "", text(language), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^(#+) (.+)$", prose, re.MULTILINE)


def anchor(heading):
    """How GitHub makes a heading's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("language", LANGUAGES)
def test_generated_sections_are_current(language):
    assert build_readme.built(text(language), language) == text(language), "run scripts/build_readme.py"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_workflow_is_named(language):
    for node in nodes(language).values():
        assert f"**{node['display_name']}**" in text(language)
    for name in build_workflows.TABLE:
        assert f"(workflows/{name}.json)" in text(language)


@pytest.mark.parametrize(("language", "pattern"), [("en", r"\*([A-Z][\w ]+ \(MPS\))\*"), ("zh", r"“([^“”]+ \(MPS\))”")])
def test_nodes_are_called_by_their_names(language, pattern):
    called = set(re.findall(pattern, text(language)))
    assert len(called) > 5
    assert called <= {node["display_name"] for node in nodes(language).values()}


@pytest.mark.parametrize("name", nodes("en"))
def test_every_help_page_has_an_example(name):
    pages = {f"{name}.md": r"^(## )?Example", f"{name}/zh.md": r"^(## )?示例"}
    for page, heading in pages.items():
        assert re.search(heading, (ROOT / "web" / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE), page


def test_groups_of_the_source_hold_all_nodes():
    listed = [name for names in readme_tables.node_groups().values() for name in names]
    assert sorted(listed) == sorted(nodes("en")) and set(readme_tables.node_groups()) <= set(readme_tables.GROUPS)


@pytest.mark.parametrize("language", LANGUAGES)
def test_links_lead_to_files_of_the_archive(language):
    anchors = {anchor(heading) for _, heading in headings(language)}
    files = {path.as_posix() for path in archive_files()}
    links = [first or second for first, second in LINK.findall(text(language))]
    assert len(links) > 40
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert link in files, link


@pytest.mark.parametrize("language", LANGUAGES)
def test_paths_in_the_text_exist(language):
    """Folders and files that are named in code, such as `benchmarks/`; model folders are ComfyUI's."""
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text(language)):
        assert path.startswith(("models/", "ComfyUI/")) or subfolder(path).exists(), path


def subfolder(path):
    """A path of the repository; tests' folders are named without ``tests/``."""
    return ROOT / path if (ROOT / path).exists() else ROOT / "tests" / path


def test_both_have_the_same_commands_and_sections():
    assert commands("en") == commands("zh")
    assert [level for level, _ in headings("en")] == [level for level, _ in headings("zh")]
    tables = [len(re.findall(r"^\|---", text(language), re.MULTILINE)) for language in LANGUAGES]
    assert tables[0] == tables[1] > 10


def test_chinese_is_chinese():
    for _, heading in headings("zh"):
        assert CJK.search(heading) or heading in ("Apple Silicon Video",)
    assert not CJK.search(text("en").replace("[中文]", ""))


def test_every_defect_is_behind_a_symptom():
    named = {name for symptom in SYMPTOMS for name in symptom.defects}
    assert named == set(DEFECTS)


def test_no_translation_is_left_over():
    assert set(readme_chinese.SEEN) == {defect.symptom for defect in DEFECTS.values()}
    assert set(readme_chinese.WHEN) == {defect.trigger for defect in DEFECTS.values()}


def test_text_without_translation_is_named():
    with pytest.raises(SystemExit, match="no Chinese for 'New symptom'"):
        readme_tables.chinese(readme_chinese.SEEN, "New symptom")


def test_missing_markers_are_named():
    with pytest.raises(SystemExit, match=r"\(en\) has no section models"):
        build_readme.built(text("en").replace("<!-- /models -->", ""), "en")


def test_check_only_compares():
    before = {path: path.stat().st_mtime_ns for path in build_readme.READMES}
    assert build_readme.main(["--check"]) == 0
    assert {path: path.stat().st_mtime_ns for path in build_readme.READMES} == before


def test_no_figure_is_claimed_for_a_mac():
    assert "a real Mac | **not yet**" in text("en") and "真实的 Mac | **尚未**" in text("zh")
