"""Every node's texts: tooltips everywhere, English locale equal to the schema, Chinese complete, help in both."""

import json
import re
from pathlib import Path

import pytest
from apple_silicon_video.nodes.folders import register_gguf_folders

ROOT = Path(__file__).resolve().parents[3]
CJK = re.compile(r"[\u4e00-\u9fff]")


def schemas():
    register_gguf_folders()
    from apple_silicon_video.nodes import NODES

    return {schema.node_id: schema for schema in (node.define_schema() for node in NODES)}


SCHEMAS = schemas()


def locale(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def shape(value):
    """The keys of nested dictionaries."""
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else None


def texts(value):
    return [text for item in value.values() for text in texts(item)] if isinstance(value, dict) else [value]


def test_locales_list_the_nodes():
    assert set(locale("en")) == set(locale("zh")) == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_english_locale_is_the_schema(name):
    schema, entry = SCHEMAS[name], locale("en")[name]
    assert entry["display_name"] == schema.display_name and entry["description"] == schema.description
    inputs = {item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs}
    assert entry.get("inputs", {}) == inputs
    tooltips = [item.tooltip for item in schema.outputs]
    assert [output["tooltip"] for output in entry.get("outputs", {}).values()] == tooltips
    assert all([*tooltips, *(item["tooltip"] for item in inputs.values())])
    assert schema.search_aliases and schema.category.startswith("Apple Silicon Video/")


@pytest.mark.parametrize("name", SCHEMAS)
def test_chinese_locale_is_complete(name):
    english, chinese = locale("en")[name], locale("zh")[name]
    assert shape(chinese) == shape(english)
    sentences = [text for text in texts(chinese) if len(text) > 20]
    assert all(texts(chinese)) and all(CJK.search(text) for text in sentences)


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_pages_name_every_input_and_output(name):
    schema = SCHEMAS[name]
    for page in (f"{name}.md", f"{name}/zh.md"):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        missing = [item.id for item in schema.inputs if not re.search(rf"[*`]{item.id}[*`]", text)]
        assert missing == [], page
        assert text.startswith("# ") and ("/zh" not in page or CJK.search(text))


def test_there_are_no_other_help_pages():
    folder = ROOT / "web" / "docs"
    assert {page.stem for page in folder.glob("*.md")} == set(SCHEMAS)
    assert {page.parent.name for page in folder.glob("*/*.md")} == set(SCHEMAS)
