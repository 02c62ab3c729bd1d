"""README.md and README.zh-CN.md as tests read them: text, and the commands in it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}


def text(language="en"):
    """A README's text."""
    return FILES[language].read_text(encoding="utf-8")


def blocks(language="en"):
    """The commands of every fenced block of shell code, block by block, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(language), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in found} == {"sh"}, "code blocks hold commands and are marked sh"
    return [[line for line in code.splitlines() if line and not line.startswith("#")] for _, code in found]


def commands(language="en"):
    """All commands in order, in blocks and in the text."""
    inline = re.findall(r"`((?:scripts/\w+\.sh|python) [^`]+)`", text(language))
    return [command for block in blocks(language) for command in block] + inline
