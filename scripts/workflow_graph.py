"""A small description of a ComfyUI graph that is written in both of its file formats.

The UI format (LiteGraph, version 0.4) is what people open; the API format is what scripts post to /prompt. Both come
from the same nodes, so they cannot differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

GAP = 40
HEADER, ROW = 26, 26
VISIBLE = (1790, 972)
MARGINS = (96, 98)
"""Pixels of a window of 1920 x 1080: its part that is free for the graph, and what lies left of and above it."""


@dataclass
class Node:
    """One node: sockets by name, widgets in the node's own order.

    Args:
        kind: node id as ComfyUI knows it.
        links: input name -> (node, index of its output).
        widgets: widget name -> value; a name that begins with "~" is a front-end control and no input.
        outputs: (name, type) of each output.
        models: files that the front end offers for download (name, url, directory).
        colors: of title and body; the front end's own if None.
    """

    kind: str
    links: dict[str, tuple[Node, int]] = field(default_factory=dict)
    widgets: dict[str, Any] = field(default_factory=dict)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    title: str | None = None
    models: list[dict[str, str]] = field(default_factory=list)
    width: int = 360
    height: int | None = None
    colors: tuple[str, str] | None = None
    id: int = 0
    position: tuple[int, int] = (0, 0)

    def size(self) -> list[int]:
        rows = max(len(self.links), len(self.outputs)) + len(self.widgets)
        return [self.width, self.height or HEADER + ROW * rows]


@dataclass
class Graph:
    """Nodes in columns; each column has a title and becomes a group."""

    columns: list[tuple[str, list[Node]]] = field(default_factory=list)

    def column(self, title: str, *nodes: Node) -> None:
        self.columns.append((title, list(nodes)))

    def nodes(self) -> list[Node]:
        return [node for _, nodes in self.columns for node in nodes]

    def _place(self) -> list[dict[str, Any]]:
        groups, x = [], 0
        for title, nodes in self.columns:
            y, width = 0, max(node.width for node in nodes)
            for node in nodes:
                node.position, node.width = (x, y), width
                y += node.size()[1] + ROW + GAP
            bounding = [x - 20, -90, width + 40, y + 60]
            groups.append({"title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}})
            x += width + 2 * GAP
        return groups

    def to_ui(self) -> dict[str, Any]:
        """The graph as the front end saves it."""
        groups = self._place()
        nodes = self.nodes()
        for number, node in enumerate(nodes, 1):
            node.id = number
        links: list[list[Any]] = []
        inputs: dict[int, list[dict[str, Any]]] = {}
        outgoing: dict[tuple[int, int], list[int]] = {}
        for node in nodes:
            sockets = inputs.setdefault(node.id, [])
            for slot, (name, (source, index)) in enumerate(node.links.items()):
                kind = source.outputs[index][1]
                link = len(links) + 1
                links.append([link, source.id, index, node.id, slot, kind])
                outgoing.setdefault((source.id, index), []).append(link)
                sockets.append({"name": name, "type": kind, "link": link})
        out = []
        for order, node in enumerate(nodes):
            properties: dict[str, Any] = {"Node name for S&R": node.kind}
            if node.models:
                properties["models"] = node.models
            item: dict[str, Any] = {
                "id": node.id,
                "type": node.kind,
                "pos": list(node.position),
                "size": node.size(),
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs[node.id],
                "outputs": [
                    {
                        "name": name,
                        "type": kind,
                        "slot_index": index,
                        "links": outgoing.get((node.id, index), []),
                    }
                    for index, (name, kind) in enumerate(node.outputs)
                ],
                "properties": properties,
                "widgets_values": list(node.widgets.values()),
            }
            if node.title:
                item["title"] = node.title
            if node.colors:
                item["color"], item["bgcolor"] = node.colors
            out.append(item)
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": out,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": self._view()},
            "version": 0.4,
        }

    def _view(self) -> dict[str, Any]:
        """Zoom and offset with which the whole graph is seen, clear of the front end's own bars, at 1920 x 1080."""
        groups = [group["bounding"] for group in self._place()]
        (left, top, *_), right = groups[0], groups[-1][0] + groups[-1][2]
        whole = (right - left, max(height for _, _, _, height in groups))
        scale = math.floor(min(1.0, *(room / size for room, size in zip(VISIBLE, whole, strict=True))) * 100) / 100
        return {"scale": scale, "offset": [round(MARGINS[0] / scale - left), round(MARGINS[1] / scale - top)]}

    def to_api(self) -> dict[str, Any]:
        """The graph as /prompt takes it."""
        nodes = self.nodes()
        for number, node in enumerate(nodes, 1):
            node.id = number
        prompt = {}
        for node in nodes:
            if node.kind == "MarkdownNote":
                continue
            values = {name: value for name, value in node.widgets.items() if not name.startswith("~")}
            links = {name: [str(source.id), index] for name, (source, index) in node.links.items()}
            prompt[str(node.id)] = {
                "class_type": node.kind,
                "inputs": values | links,
                "_meta": {"title": node.title or node.kind},
            }
        return prompt
