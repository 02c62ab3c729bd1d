"""A workflow and its prompt as the text that ComfyUI's front end finds in a dropped file.

What its readers expect was read from the package comfyui-frontend-package, 1.39 to 1.47: the keys `prompt` and
`workflow` with JSON, in MP4 and QuickTime as mdta tags within the first 64 MiB, in WebM as tags within the first
2 MiB, in PNG as text chunks, in WebP as Exif strings of the form key:JSON. It reads nothing from a GIF.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from typing import Any

EXIF_MODEL = 0x0110  # where core puts the prompt; the others take the tags below
EXIF_ASCII = 2
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
BRACES = {ord("{"): "\\u007b", ord("}"): "\\u007d"}


def workflow_tags(prompt: Any, extra: Mapping[str, Any] | None) -> dict[str, str]:
    """The hidden values of a node (extra: its extra_pnginfo, with the workflow) as tags; None is left out."""
    values = {**(extra or {}), "prompt": prompt}
    return {key: plain_json(value) for key, value in values.items() if value is not None}


def plain_json(value: Any) -> str:
    """ASCII JSON without braces inside strings, since the front end's WebM reader counts them to find the end."""
    return JSON_STRING.sub(lambda match: match.group().translate(BRACES), json.dumps(value))


def exif(tags: Mapping[str, str]) -> bytes:
    """Tags as an Exif block (little-endian TIFF) of ASCII entries "key:value", the prompt under 0x0110; b"" if none."""
    names = ["prompt"] * ("prompt" in tags) + [key for key in tags if key != "prompt"]
    first = EXIF_MODEL if "prompt" in tags else EXIF_MODEL - 1
    texts = [(first - index, f"{key}:{tags[key]}".encode() + b"\0") for index, key in enumerate(names)]
    if not texts:
        return b""
    texts.sort()
    offset = 8 + 2 + 12 * len(texts) + 4
    entries, values = b"", b""
    for tag, text in texts:
        text = text.ljust(5, b"\0")  # four bytes and fewer would lie in the entry itself
        entries += struct.pack("<HHII", tag, EXIF_ASCII, len(text), offset + len(values))
        values += text + b"\0" * (len(text) % 2)
    return b"II*\0" + struct.pack("<IH", 8, len(texts)) + entries + b"\0\0\0\0" + values
