"""The tables that scripts/build_readme.py writes into README.md and README.zh-CN.md, each from its one source.

Defects come from mps_patches/registry.py, nodes from nodes/*.py and locales/, models from workflow_table.py. A function
takes the language, "en" or "zh", and returns Markdown.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable
from math import fsum
from typing import Any, Literal

from _pack import ROOT, load_pack
from readme_chinese import SEEN, TREATED, WHEN
from readme_symptoms import SYMPTOMS
from workflow_files import FILES
from workflow_plans import model_files, planned
from workflow_table import TABLE, Row

from apple_silicon_video.memory.plan import GIB, VERDICTS, Plan  # isort: skip

Language = Literal["en", "zh"]

PICTURES = ("assets/frames.jpg", "workflows/wan2.2_i2v_a14b_fast_24gb.jpg")
"""Shown at the top, as far as they are there."""

CAPTIONS = {
    "assets/frames.jpg": ("Frames of small random models", "小型随机模型的画面"),
    "workflows/wan2.2_i2v_a14b_fast_24gb.jpg": (
        "The workflow wan2.2_i2v_a14b_fast_24gb in ComfyUI",
        "ComfyUI 中的工作流 wan2.2_i2v_a14b_fast_24gb",
    ),
}

GROUPS = {
    "loaders": ("Loaders", "加载"),
    "conditioning": ("Conditioning", "条件"),
    "video": ("Video", "视频"),
    "vae": ("VAE", "VAE"),
    "memory": ("Memory", "内存"),
    "patches": ("Patches", "修补"),
    "diagnosis": ("Diagnosis", "诊断"),
}
"""Groups of nodes in the order in which they are shown, and their names in English and Chinese."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a vertical bar in a cell is escaped."""
    heading = list(head)
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("| --- |", "|---|").replace(" --- |", "---|") for line in lines)


def pictures(language: Language) -> str:
    """The pictures that there are."""
    shown = [f"![{CAPTIONS[name][language == 'zh']}]({name})" for name in PICTURES if (ROOT / name).is_file()]
    return "\n\n".join(shown)


def defects(language: Language) -> str:
    """Symptom, trigger, upstream reference and cure of every known defect."""
    load_pack()
    from apple_silicon_video.mps_patches.registry import DEFECTS, treatment

    heads = {
        "en": ("id", "what you see", "when", "upstream", "what the pack does"),
        "zh": ("id", "现象", "何时出现", "上游问题", "本包的处理"),
    }
    rows = []
    for defect in DEFECTS.values():
        seen, when, treated = defect.symptom, defect.trigger, treatment(defect)
        if language == "zh":
            seen, when, treated = chinese(SEEN, seen), chinese(WHEN, when), chinese_treatment(treated)
        rows.append((defect.id, seen, when, " ".join(defect.upstream), treated))
    return table(heads[language], rows)


def chinese(texts: dict[str, str], text: str) -> str:
    """The Chinese of a text of the registry; exits if it has none."""
    if text not in texts:
        raise SystemExit(f"scripts/readme_chinese.py has no Chinese for {text!r}: add it.")
    return texts[text]


def chinese_treatment(text: str) -> str:
    """The Chinese of what the pack does, piece by piece."""
    pieces = []
    for piece in text.split("; "):
        before, colon, after = piece.partition(": ")
        switch = before.removesuffix(" switches its patch on")
        if switch != before:
            pieces.append(f"用 {switch} 开启补丁")
        else:
            pieces.append(chinese(TREATED, before) + (f"：{chinese(TREATED, after)}" if colon else ""))
    return "；".join(pieces)


def symptoms(language: Language) -> str:
    """What people see, what to do, and the defects that may be behind it."""
    heads = {
        "en": ("what you see", "what to do", "known causes"),
        "zh": ("现象", "怎么办", "已知原因"),
    }
    index = int(language == "zh")
    rows = ((row.seen[index], row.do[index], ", ".join(f"`{name}`" for name in row.defects)) for row in SYMPTOMS)
    return table(heads[language], rows)


def node_groups() -> dict[str, list[str]]:
    """Group -> ids of its nodes, in the order of ``GROUPS`` and of the menus; read from the source, without ComfyUI."""
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    listed = re.findall(
        r"^    \*(\w+)\.NODES,$", (ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    for module in listed:
        tree = ast.parse((ROOT / "nodes" / f"{module}.py").read_text(encoding="utf-8"))
        constants = {
            statement.targets[0].id: statement.value.value
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            and isinstance(statement.targets[0], ast.Name)
            and isinstance(statement.value, ast.Constant)
        }
        for call in ast.walk(tree):
            keywords = {word.arg: word.value for word in call.keywords} if isinstance(call, ast.Call) else {}
            if "node_id" in keywords and "category" in keywords:
                category = _constant(keywords["category"], constants)
                group = category.rsplit("/", 1)[-1]
                found.setdefault(group, []).append(_constant(keywords["node_id"], constants))
    return {name: nodes for name, nodes in found.items() if nodes}


def _constant(value: ast.expr, constants: dict[str, Any]) -> str:
    return str(constants[value.id]) if isinstance(value, ast.Name) else str(ast.literal_eval(value))


def nodes(language: Language) -> str:
    """A table per group: name with a link to the help page, and what the node does."""
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    heads = {"en": ("node", "what it does"), "zh": ("节点", "作用")}
    page = {"en": "web/docs/{}.md", "zh": "web/docs/{}/zh.md"}[language]
    parts = []
    for group, ids in node_groups().items():
        title = GROUPS.get(group, (group, group))[language == "zh"]
        rows = (
            (f"[**{texts[name]['display_name']}**]({page.format(name)})", texts[name]["description"]) for name in ids
        )
        parts.append(f"**{title}**\n\n{table(heads[language], rows)}")
    return "\n\n".join(parts)


def models(language: Language) -> str:
    """Which workflow is for which Mac: weights, size, length and what has to be downloaded."""
    heads = {
        "en": ("your Mac", "what it makes", "workflow", "weights", "pixels", "frames", "download", "planned peak"),
        "zh": ("你的 Mac", "生成内容", "工作流", "权重", "像素", "帧数", "下载", "计划峰值"),
    }
    rows = [
        (
            f"{row.memory} GB",
            title(row, language),
            f"[{name}](workflows/{name}.json)",
            row.quantisation,
            f"{row.width}x{row.height}",
            length(row, language),
            f"{fsum(FILES[file].gigabytes for file in model_files(row)):.1f} GB",
            peak(planned(row), language),
        )
        for name, row in sorted(TABLE.items(), key=lambda item: item[1].memory)
    ]
    return table(heads[language], rows)


TITLES = {
    "text to video": "文生视频",
    "image to video": "图生视频",
    "video to video": "视频转视频",
    "first and last frame": "首尾帧",
    "long video": "长视频",
    ", 4 steps": "，4 步",
}


def title(row: Row, language: Language) -> str:
    """What a workflow makes, with the model's name."""
    text = row.title
    if language == "zh":
        for english, translated in TITLES.items():
            text = text.replace(english, translated)
    return text


STAGES = {
    "text encoding": "文本编码",
    "image encoding": "图像编码",
    "sampling": "采样",
    "sampling high": "高噪声采样",
    "sampling low": "低噪声采样",
    "decoding": "解码",
}
"""Chinese names of the stages of memory/plan.py that can be the fullest."""


def peak(made: Plan, language: Language) -> str:
    """What the fullest stage takes of the Mac's working set; the verdict where it does not simply fit."""
    stage, recommended = made.peak, made.machine.recommended
    taken = f"{stage.device / GIB:.1f} / {recommended / GIB:.1f} GiB"
    name = STAGES[stage.name] if language == "zh" else stage.name
    warning = "" if made.verdict == "fits" else f"; {VERDICTS[made.verdict]}"
    return f"{taken} ({name}{warning})"


def length(row: Row, language: Language) -> str:
    """Frames of the finished clip, segments joined at one frame, and their seconds."""
    prompt = row.draw(row).to_api().values()
    segments = sum("length" in node["inputs"] for node in prompt) or 1
    (fps,) = {node["inputs"]["fps"] for node in prompt if node["class_type"] == "MPSSaveVideo"}
    frames = segments * row.frames - (segments - 1)
    return f"{frames} ({frames / fps:.1f} {'s' if language == 'en' else '秒'})"


SECTIONS: dict[str, Callable[[Language], str]] = {
    "pictures": pictures,
    "models": models,
    "nodes": nodes,
    "symptoms": symptoms,
    "defects": defects,
}
"""Name of the markers -> what stands between them."""
