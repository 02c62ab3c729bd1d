"""ComfyUI's running server as the pack needs it: text inside a node, what became of a prompt, who is running.

Everything here does nothing, or knows nothing, where ComfyUI runs without its web server.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from comfy_execution.utils import get_executing_context


def _instance() -> Any:
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_text(text: str, node_id: str | None) -> None:
    """Write the text into the node: the front end shows the result of PreviewText only for core's own nodes."""
    instance = _instance()
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)


def show_at_running_node(text: str) -> None:
    """Write a line into the node that is executing."""
    context = get_executing_context()
    show_text(text, context.node_id if context is not None else None)


def current_run() -> str:
    """The id of the prompt that runs, empty outside of ComfyUI's queue."""
    context = get_executing_context()
    return context.prompt_id if context is not None else ""


def run_succeeded(run: str) -> bool:
    """Whether ComfyUI's history says so of a prompt; False for one that it does not know."""
    queue = getattr(_instance(), "prompt_queue", None)
    entry = queue.history.get(run) if queue is not None and run else None
    return ((entry or {}).get("status") or {}).get("status_str") == "success"


def forget_results_after_run() -> bool:
    """Have ComfyUI forget all stored results of nodes once the running prompt ends; whether there is a queue to ask."""
    queue = getattr(_instance(), "prompt_queue", None)
    if queue is None:
        return False
    queue.set_flag("free_memory", True)
    return True


def on_every_prompt(call: Callable[[], None]) -> None:
    """Have ``call`` called whenever a prompt is queued."""

    def handler(prompt: Any) -> Any:
        call()
        return prompt

    instance = _instance()
    if instance is not None:
        instance.add_on_prompt_handler(handler)


def serve_meter(path: str, figures: Callable[[], dict[str, Any]]) -> None:
    """Answer GET requests to ``path`` with ``figures()`` as JSON."""
    instance = _instance()
    if instance is None:
        return
    from aiohttp import web

    @instance.routes.get(path)
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(figures())
