"""Seconds that the pack adds to ComfyUI's start, and what it loads and connects to while it does.

A process of its own starts ComfyUI as far as its own nodes, then loads the pack as ComfyUI does: the module, its entry
point, its list of nodes. ``python benchmarks/import_time.py`` prints the figures as JSON; the ComfyUI is the one that
the pack lies in, $COMFYUI_DIR, or the pinned one.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from measure import SCRIPTS, Row, in_own_process, main

RUNS = 2
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
"""Audit events of Python that mean a connection, or the way to one."""


def measure(core_nodes: str = "all") -> Row:
    """Load the pack in this process.

    Args:
        core_nodes: "all": ComfyUI's own nodes are loaded before, as in a real start; "few": only its ``nodes`` module,
            which is quicker and leaves more for the pack to load.

    Returns:
        core_seconds: of ComfyUI and its nodes; pack_seconds: of the pack; modules: top-level names of what the pack
        loaded first; connections: audit events of the network meanwhile.
    """
    _comfyui()
    start = time.perf_counter()
    import nodes

    if core_nodes == "all":
        import execution  # noqa: F401
        import server  # noqa: F401

        asyncio.run(nodes.init_builtin_extra_nodes())
    core_seconds = time.perf_counter() - start
    connections: list[str] = []
    sys.addaudithook(lambda event, _: connections.append(event) if event in NETWORK else None)
    before = set(sys.modules)
    start = time.perf_counter()
    _load_pack()
    pack_seconds = time.perf_counter() - start
    modules = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
    return {
        "core_seconds": core_seconds,
        "pack_seconds": pack_seconds,
        "modules": modules,
        "connections": connections,
    }


def _comfyui() -> None:
    """Put ComfyUI on the path, with the arguments of a start on this machine."""
    import torch
    from fetch_comfyui import fetch, find, is_comfyui

    tree = find()
    sys.path.insert(0, str(tree if is_comfyui(tree) else fetch()))
    sys.argv = ["main.py"] if torch.backends.mps.is_available() else ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import utils.extra_config  # noqa: F401 (main.py's order: nodes.py puts a folder with another utils on the path)


def _load_pack() -> Any:
    sys.path.append(SCRIPTS)
    from _pack import load_pack

    async def load() -> Any:
        extension = await load_pack().comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return asyncio.run(load())


def run() -> list[Row]:
    """One row: the quicker of two processes."""
    return [in_own_process(__file__, "all", runs=RUNS)]


if __name__ == "__main__":
    try:
        main(measure, run)
    except RuntimeError as error:
        sys.exit(str(error))
