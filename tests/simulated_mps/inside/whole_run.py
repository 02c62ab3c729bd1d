"""A shipped workflow from its graph to its video on a simulated Mac with 16 GB, at full size in dry mode.

ComfyUI's own executor runs the nodes that its own loader registered, on sparse files of the published names and sizes.
One block of a transformer runs (see full_size_sampling.py). Of ComfyUI only the web server is missing.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import core_tree
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import execution
import folder_paths
import full_size_sampling as full
import psutil
from apple_silicon_video.memory import governor
from apple_silicon_video.mps_patches import install
from apple_silicon_video.quantization import comfy_loader
from PIL import Image
from published_tables import published_table
from small_models import write_full_size_encoder, write_full_size_wan
from workflow_files import FILES

import nodes

GIB = 1 << 30
RAM = 16 * GIB
RECOMMENDED = RAM * 2 // 3
"""Metal's working set on such a Mac; here the allocator's ceiling too, so that a byte more is an error."""
LEFT_TO_MACOS = 3 * GIB
FREE_TO_CORE = 120 * GIB
"""So much that core never unloads a model by itself, only the pack does; too little for both prompts at once."""
WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows" / "api"
PACK = "from apple_silicon_video import WEB_DIRECTORY, comfy_entrypoint\n"
CORE_NODES = ("nodes_hunyuan", "nodes_wan", "nodes_model_advanced")
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras")
EXPERTS = ("wan2.2-t2v-a14b-high", "wan2.2-i2v-a14b-high")
OTHER_NODES = "other nodes"
STAGES = {
    "MPSEncodePrompts": ("text encoding",),
    "WanImageToVideo": ("image encoding",),
    "KSamplerAdvanced": ("sampling high", "sampling low"),
    "VAEDecode": ("decoding",),
    "MPSSaveVideo": ("saving",),
}
"""Node -> the stages of the nodes of its kind, in order. A stage begins with what the one before left on the device."""


@dataclass(frozen=True)
class Run:
    """What was counted from the first node to the last; sizes in bytes.

    peak: most that was live at once; driver: most that the driver held, cache included; stages: most that was live in
    each; fullest: the buffers of the fullest moment, their stages as modules; videos: the saved files.
    """

    peak: int
    driver: int
    stages: dict[str, int]
    fullest: sim.Timeline
    videos: list[Path]

    def table(self) -> str:
        """The stages and the fullest moment, as Markdown."""
        lines = [f"{self.peak / GIB:.3f} GiB live, {self.driver / GIB:.3f} GiB held by the driver.", ""]
        lines += ["| stage | GiB |", "|---|---:|"]
        lines += [f"| {name} | {size / GIB:.3f} |" for name, size in self.stages.items()]
        return "\n".join([*lines, "", self.fullest.table(5)])


class Client:
    """In place of ComfyUI's web server: tells the timeline the stage of each node that begins, and keeps errors."""

    client_id, last_node_id, sockets_metadata = "test", None, {}

    def __init__(self, graph: dict) -> None:
        self.stages: dict[str, str] = {}
        for kind, names in STAGES.items():
            found = [key for key, node in graph.items() if node["class_type"] == kind]
            self.stages |= dict(zip(found, names, strict=False))
        self.begun: list[tuple[str, int]] = []
        self.errors: list[str] = []

    def send_sync(self, event: object, data: dict, client: object = None) -> None:
        if event == "executing" and data["node"] is not None:
            stage = self.stages.get(data["node"], OTHER_NODES)
            self.begun.append((stage, len(sim.device.extension().timeline()[2])))
            sim.device.extension().set_module(stage)
        elif event == "execution_error":
            self.errors.append(f"{self.begun[-1][0]}: {data['exception_type']}: {data['exception_message']}")


def graph_of(name: str) -> dict:
    """A shipped workflow in API format."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def with_steps(graph: dict, steps: int) -> dict:
    """The graph with so many steps for each expert; every step is like every other to memory."""
    for node in graph.values():
        if node["class_type"] == "KSamplerAdvanced":
            inputs = node["inputs"]
            first = inputs["start_at_step"] == 0
            inputs |= {"steps": 2 * steps, "start_at_step": 0 if first else steps}
            inputs["end_at_step"] = steps if first else 10000
    return graph


def with_other_prompt(graph: dict) -> dict:
    """What a user queues next: the graph with another prompt and another seed."""
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        if node["class_type"] == "MPSEncodePrompts":
            node["inputs"]["positive"] += ", at night"
        if node["class_type"] == "KSamplerAdvanced":
            node["inputs"]["noise_seed"] += 1
    return graph


def run(folder: Path, *graphs: dict) -> Run:
    """Queue the graphs one after the other, inside ``mac_with_16_gb``. Raises RuntimeError: the stage and its error."""
    client = Client(graphs[0])
    cache = {"lru": 0, "ram": 2.0, "ram_inactive": RAM / GIB}  # what main.py chooses on such a Mac
    executor = execution.PromptExecutor(client, cache_type=execution.CacheType.RAM_PRESSURE, cache_args=cache)
    for graph in graphs:
        write_files(graph, folder)
    with driver_peak() as drivers:
        sim.reset()
        for number, graph in enumerate(graphs):
            valid, error, outputs, problems = asyncio.run(execution.validate_prompt(str(number), graph, None))
            assert valid, (error, problems)
            executor.execute(graph, str(number), {"client_id": client.client_id}, outputs)
            if not executor.success:
                raise RuntimeError("; ".join(client.errors))
        peak = sim.stats().peak
    fullest = sim.timeline()
    sim.device.extension().set_module("")
    assert fullest.peak == peak
    stages = stage_peaks(client.begun, fullest.curve)
    return Run(peak, max(drivers), stages, fullest, sorted((folder / "output").rglob("*.mp4")))


def stage_peaks(begun: list[tuple[str, int]], curve: list[int]) -> dict[str, int]:
    """Most bytes live in each stage; begun: the stage of each node, and where in the curve it began."""
    peaks: dict[str, int] = {}
    ends = [start for _, start in begun[1:]] + [len(curve) - 1]
    for (stage, start), end in zip(begun, ends, strict=True):
        peaks[stage] = max(peaks.get(stage, 0), *curve[start : end + 1])
    return peaks


@contextmanager
def driver_peak() -> Iterator[list[int]]:
    """What the driver holds whenever its cache is about to be emptied, and at the end: it only grows until then."""
    drivers: list[int] = []
    empty: Callable[[], None] = torch._C._mps_emptyCache

    def noting() -> None:
        drivers.append(torch.mps.driver_allocated_memory())
        empty()

    torch._C._mps_emptyCache = noting
    try:
        yield drivers
    finally:
        drivers.append(torch.mps.driver_allocated_memory())
        torch._C._mps_emptyCache = empty


@contextmanager
def mac_with_16_gb(monkeypatch, folder: Path) -> Iterator[None]:
    """A Mac's limits in dry mode, ComfyUI's folders below ``folder``, and nodes registered.

    Memory that the pack counts as available does not shrink with what is on the device: macOS takes buffers that rest
    for inactive, and psutil inactive pages for available. The governor looks at every chance that it gets, as on a Mac,
    where a chunk of a block takes about as long as its period.
    """
    original, load = psutil.virtual_memory, comfy_loader.load_diffusion_model
    available = RAM - LEFT_TO_MACOS
    with own_folders(monkeypatch, folder):
        asyncio.run(register_nodes(folder))
        for variant in EXPERTS:
            full.check_blocks(folder, variant)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: original()._replace(total=RAM, available=available))
        monkeypatch.setattr(comfy_loader, "load_diffusion_model", lambda *given: full.run_one_block(load(*given)))
        monkeypatch.setattr(governor, "PERIOD", 0)
        try:
            with full.dry_device(lambda: FREE_TO_CORE):
                sim.limits(RECOMMENDED, RECOMMENDED * 3 // 4, RECOMMENDED)
                yield
        finally:
            install.remove()


@contextmanager
def own_folders(monkeypatch, folder: Path) -> Iterator[None]:
    """Empty folders in place of ComfyUI's own; lists of models' folders are changed in place, as names share them."""
    for name in ("input", "output", "temp", "user"):
        path = str(folder / name)
        os.mkdir(path)
        monkeypatch.setattr(folder_paths, f"{name}_directory", path, raising=False)
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda path=path: path)
    lists = {name: folder_paths.folder_names_and_paths[name][0] for name in MODEL_FOLDERS}
    before = {name: paths[:] for name, paths in lists.items()}
    for name, paths in lists.items():
        (folder / name).mkdir()
        paths[:] = [str(folder / name)]
    folder_paths.filename_list_cache.clear()
    try:
        yield
    finally:
        for name, paths in lists.items():
            paths[:] = before[name]
        folder_paths.filename_list_cache.clear()


async def register_nodes(folder: Path) -> None:
    """As ComfyUI does at its start: the core nodes that the workflows have, and the pack."""
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text(PACK)
    for name in CORE_NODES:
        assert await nodes.load_custom_node(os.path.join(core_tree.folder(), "comfy_extras", f"{name}.py"))
    assert await nodes.load_custom_node(str(folder / "pack"))


def write_files(graph: dict, folder: Path) -> None:
    """The files that the graph names, at their published sizes, and a picture."""
    for node in graph.values():
        for key, name in node["inputs"].items():
            path = folder / FILES[name].directory / name if isinstance(name, str) and name in FILES else None
            if path is None or path.exists():
                continue
            recipe = path.stem.rsplit("-", 1)[-1]
            if key == "unet_name":
                task, expert = path.stem.lower().split("-")[1], "high" if "HighNoise" in name else "low"
                write_full_size_wan(path, f"wan2.2-{task}-a14b-{expert}", recipe)
            elif key == "clip_name":
                write_full_size_encoder(path, recipe)
            else:
                write_hole(path)
            assert abs(path.stat().st_size / 1e9 - FILES[name].gigabytes) < 0.06, name
    Image.new("RGB", (832, 480), "teal").save(folder / "input" / "example.png")


def write_hole(path: Path) -> None:
    """A safetensors file with the published tensors, whose data takes no room on the disk."""
    header, offset = {}, 0
    for name, entry in published_table(path.name).entries.items():
        end = offset + entry.nbytes
        header[name] = {"dtype": entry.type_name, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
