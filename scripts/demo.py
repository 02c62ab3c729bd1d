"""Takes a quantised Wan model through the real ComfyUI to a playable MP4: what scripts/demo.sh runs.

Without options everything is small and made on the spot: random models in the real file formats, so the picture is
noise, but every step is the real one. With ``--models`` the same workflow runs with real files. It begins on any
Python of version 3.10 or later and goes on in the environment that scripts/environment.py makes.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import environment
import fetch_comfyui
from comfyui_server import ComfyServer, Prompt, PromptError, ServerError
from fetch_comfyui import ROOT, FetchError, last_error

CACHE = ROOT / ".cache"
BASE = CACHE / "demo"
SMALL_MODELS = CACHE / "small-models"
WORKFLOWS = ROOT / "workflows"
DEFAULT_WORKFLOW = "wan2.1_t2v_1.3b_16gb"

HELP = """Run a quantised Wan model in the real ComfyUI and make an MP4.

Needs Python 3.10 or later and, the first time, the network. Makes these folders, all in the repository:
  .venv                 virtual environment: torch (unless a suitable one is present) and what ComfyUI needs
  .cache/comfyui        ComfyUI, unless COMFYUI_DIR names one or this repository lies in its custom_nodes
  .cache/small-models   small models in the real file formats (not with --models)
  .cache/demo           the server's own folders: custom_nodes with a link to this repository, input, output with
                        the MP4, user, temp, and its log comfyui.log
  .cache/logs           what pip and the model maker printed
Outside the repository only pip's download cache and the system's temporary folder change; a ComfyUI of your own
and its models are only read.

Workflows: {workflows}"""


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one sentence for the user."""


class ModelInput(NamedTuple):
    """An input that names a model file: what the file is, and the folders of ComfyUI/models it may lie in."""

    role: str
    folders: tuple[str, ...]


MODEL_INPUTS: dict[str, ModelInput] = {
    "unet_name": ModelInput("diffusion_model", ("diffusion_models", "unet")),
    "clip_name": ModelInput("text_encoder", ("text_encoders", "clip")),
    "vae_name": ModelInput("vae", ("vae",)),
    "lora_name": ModelInput("lora", ("loras",)),
}
FAMILIES = ("ti2v", "i2v", "t2v")
"""What a Wan model makes, as it stands in file names; the last one where none does."""

EXPERTS = ("high", "low")
"""The experts of Wan 2.2 A14B, as they stand in file names."""

SMALL_SIZES = {"width": 192, "height": 112, "length": 17}
"""Pixels and frames of the small run."""

SMALL_STEPS = 4
STEP_INPUTS = ("steps", "start_at_step", "end_at_step")
SERVER_ARGUMENTS = {("Darwin", "arm64"): ()}
"""ComfyUI's arguments by system and machine; elsewhere it computes on the CPU."""


def find_workflow(name: str) -> tuple[Prompt, dict[str, Any] | None]:
    """Return a workflow in API format, and in UI format where both are there.

    ``name`` is one of workflows/ (with or without .json) or the path of a file. A file in UI format is run through
    its twin of the same name in the folder api beside it.
    """
    path = Path(name) if Path(name).is_file() else WORKFLOWS / f"{name.removesuffix('.json')}.json"
    if not path.is_file():
        raise DemoError(f"There is no workflow {name}: use one of {', '.join(workflow_names())}, or a file's path.")
    content = read_json(path)
    if "nodes" not in content:
        return content, None
    twin = path.parent / "api" / path.name
    if not twin.is_file():
        raise DemoError(
            f"{path} is in ComfyUI's UI format: export it in API format (Workflow menu) and name that file."
        )
    return read_json(twin), content


def workflow_names() -> list[str]:
    """Return the names of the workflows that come with the pack."""
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DemoError(f"{path} cannot be read as JSON ({error}): check that it is a workflow file.") from error
    if not isinstance(content, dict):
        raise DemoError(f"{path} is no workflow: name a file that ComfyUI exported.")
    return content


def model_inputs(prompt: Prompt) -> Iterator[tuple[str, str, str, ModelInput]]:
    """Yield node id, input name, file name and meaning of every model file that a prompt names."""
    for node, content in prompt.items():
        for name, value in content["inputs"].items():
            if name in MODEL_INPUTS and isinstance(value, str):
                yield node, name, value, MODEL_INPUTS[name]


def role_of(file: str, kind: ModelInput) -> str:
    """Return a file's role: its kind, and for models and LoRAs what they make (FAMILIES) and which expert they are."""
    name = file.lower()
    if kind.role == "vae":
        return "vae_2.2" if "2.2" in name else "vae"
    if kind.role == "text_encoder":
        return kind.role
    family = next((family for family in FAMILIES if family in name), FAMILIES[-1])
    expert = next((f"_{expert}" for expert in EXPERTS if expert in name), "")
    return f"{kind.role}_{family}{expert}"


def made_small(prompt: Prompt, substitutions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return a copy of a prompt with small models, sizes and step counts.

    ``substitutions``: the small file's name for each role; DemoError if the workflow has a role that is not there.
    """
    found = list(model_inputs(prompt))
    missing = {role_of(file, kind) for _, _, file, kind in found} - set(substitutions)
    if missing:
        raise DemoError(f"No small models stand for {', '.join(sorted(missing))}: name real ones with --models.")
    small = {node: {**content, "inputs": dict(content["inputs"])} for node, content in prompt.items()}
    for node, name, file, kind in found:
        small[node]["inputs"][name] = substitutions[role_of(file, kind)]
    for content in small.values():
        shrink(content["inputs"])
    return small


def shrink(inputs: dict[str, Any]) -> None:
    """Lower sizes and step counts in place; the share of the steps that each of several samplers does is kept."""
    for name, limit in SMALL_SIZES.items():
        if isinstance(inputs.get(name), int):
            inputs[name] = min(inputs[name], limit)
    steps = inputs.get("steps")
    if isinstance(steps, int) and steps > SMALL_STEPS:
        for name in STEP_INPUTS:
            if isinstance(inputs.get(name), int) and inputs[name] <= steps:
                inputs[name] = round(inputs[name] * SMALL_STEPS / steps)


def missing_models(prompt: Prompt, models: Path) -> list[str]:
    """Return the files that a prompt names and a models folder lacks, with the subfolder that each belongs in."""
    return [
        f"{kind.folders[0]}/{file}"
        for _, _, file, kind in model_inputs(prompt)
        if not any((models / folder / file).is_file() for folder in kind.folders)
    ]


def make_small_models() -> Mapping[str, str]:
    """Have the small models made unless they are up to date; return which file stands for which role."""
    log = CACHE / "logs" / "small-models.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not SMALL_MODELS.exists():
        say("Making small models (once) ...")
    maker = ROOT / "scripts" / "make_small_models.py"
    command = [sys.executable, str(maker), "--output", str(SMALL_MODELS), "--set", "demo"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    log.write_text(result.stdout + result.stderr)
    if result.returncode:
        raise DemoError(f"The small models could not be made ({last_error(result.stderr)}): see {log}.")
    return read_json(SMALL_MODELS / "manifest.json")["substitutions"]


def gradient_png(width: int = 448, height: int = 256) -> bytes:
    """Return a PNG file with a colour gradient, for workflows that begin with a picture."""
    rows = b"".join(
        b"\0" + bytes(value for x in range(width) for value in (x * 255 // width, y * 255 // height, 128))
        for y in range(height)
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def moving_gradient(frames: int = 24, width: int = 448, height: int = 256) -> bytes:
    """Return an MP4 of 16 frames a second in which a gradient moves, for workflows that begin with a clip."""
    import av
    import numpy

    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        y, x = numpy.mgrid[0:height, 0:width]
        for number in range(frames):
            shifted = (x + number * 8) % width * 255 // width
            picture = numpy.stack([shifted, y * 255 // height, numpy.full_like(x, 128)], axis=-1).astype(numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


class Source(NamedTuple):
    """What a node begins with: its input, the file's name, and what makes one."""

    input: str
    name: str
    make: Callable[[], bytes]


SOURCES = {
    "LoadImage": Source("image", "gradient.png", gradient_png),
    "MPSLoadVideo": Source("file", "gradient.mp4", moving_gradient),
}


def provide_sources(server: ComfyServer, prompt: Mapping[str, dict[str, Any]], picture: Path | None) -> None:
    """Upload the pictures and clips that the prompt begins with, and name them there."""
    for kind, source in SOURCES.items():
        nodes = [content for content in prompt.values() if content["class_type"] == kind]
        if not nodes:
            continue
        chosen = picture if kind == "LoadImage" else None
        try:
            content = chosen.read_bytes() if chosen else source.make()
        except OSError as error:
            raise DemoError(f"The picture {picture} cannot be read ({error.strerror}): check --image.") from error
        name = server.upload_image(content, chosen.name if chosen else source.name)
        for node in nodes:
            node["inputs"][source.input] = name


class Progress:
    """Shows which node runs and its steps: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, prompt: Prompt) -> None:
        """Number the nodes of a prompt as they come."""
        self._titles = {node: content["class_type"] for node, content in prompt.items()}
        self._seen: list[str] = []
        self._rewrites = sys.stderr.isatty()
        self._line = ""

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take one message of the server."""
        node = data.get("node")
        if kind == "executing" and node in self._titles:
            self._show(node, "")
        elif kind == "progress" and node in self._titles and data["max"] > 1:
            self._show(node, f" {data['value']}/{data['max']}")

    def _show(self, node: str, step: str) -> None:
        if node not in self._seen:
            self._seen.append(node)
        line = f"[{len(self._seen)}/{len(self._titles)}] {self._titles[node]}{step}"
        if line != self._line:
            self._line = line
            print(f"\r\033[K{line}" if self._rewrites else line, end="" if self._rewrites else "\n", file=sys.stderr)
            sys.stderr.flush()

    def end(self) -> None:
        """Take the rewritten line away."""
        if self._rewrites and self._line:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def describe_video(path: Path) -> str:
    """Read a video back and return its path, size, frame count and duration as lines of text."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            width, height, rate = stream.width, stream.height, float(stream.average_rate or 0)
            seconds = (container.duration or 0) / av.time_base
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DemoError(f"{path} was written but cannot be read back ({error}): report it.") from error
    return (
        f"Video:    {path}\n"
        f"Size:     {path.stat().st_size:,} bytes, {width}x{height} pixels\n"
        f"Frames:   {frames} at {rate:g} per second\n"
        f"Duration: {seconds:.2f} s"
    )


def say(message: str) -> None:
    """Tell the user what is going on."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Refuse a second demo in the same checkout while one runs."""
    BASE.mkdir(parents=True, exist_ok=True)
    with open(BASE / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError("Another demo is running in this checkout: wait for its end.") from None
        yield


def run(options: argparse.Namespace) -> None:
    """Do everything after the environment: models, server, workflow, result."""
    prompt, workflow = find_workflow(options.workflow)
    if options.models:
        missing = missing_models(prompt, options.models)
        if missing:
            raise DemoError(f"{options.models} lacks {', '.join(missing)}: put the files there under these names.")
    comfyui = fetch_comfyui.find(options.comfyui_version)
    if not fetch_comfyui.is_comfyui(comfyui):
        say(f"Fetching ComfyUI {comfyui.name} ...")
        fetch_comfyui.fetch(comfyui.name)
    substitutions: Mapping[str, str] = {} if options.models else make_small_models()
    runnable = {node: {**content, "inputs": dict(content["inputs"])} for node, content in prompt.items()}
    if not options.models:
        runnable, workflow = made_small(prompt, substitutions), None
    arguments = SERVER_ARGUMENTS.get((platform.system(), platform.machine()), ("--cpu",))
    server = ComfyServer(
        comfyui, BASE, models=options.models or SMALL_MODELS, arguments=(*arguments, *options.server_arguments)
    )
    say(f"Starting ComfyUI from {comfyui} ...")
    with server:
        provide_sources(server, runnable, options.image)
        say(f"Running {options.workflow} at {server.url} (log: {server.log}) ...")
        progress = Progress(runnable)
        try:
            outputs = server.run(runnable, workflow=workflow, timeout=options.timeout, listener=progress)
        finally:
            progress.end()
        videos = server.files(outputs, ".mp4")
        if not videos:
            raise DemoError(f"The workflow {options.workflow} ended without an MP4: it needs a Save Video (MPS) node.")
        for video in videos:
            print(describe_video(video), flush=True)
        if options.keep_server:
            say(f"ComfyUI stays at {server.url} until Ctrl-C.")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; what follows ``--`` is for ComfyUI."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo.sh",
        usage="%(prog)s [options] [-- arguments for ComfyUI]",
        description=HELP.format(workflows=", ".join(workflow_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workflow", default=DEFAULT_WORKFLOW, help="name of a workflow, or an API-format file")
    parser.add_argument("--models", type=Path, metavar="DIR", help="real models, in the folders of ComfyUI/models")
    parser.add_argument("--image", type=Path, metavar="FILE", help="first picture for image-to-video workflows")
    parser.add_argument(
        "--comfyui-version", choices=fetch_comfyui.DISTRIBUTIONS, help="use the pinned copy of this version"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up after this long (900; none for --models)"
    )
    parser.add_argument("--keep-server", action="store_true", help="leave ComfyUI running at the end, until Ctrl-C")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks and the server's log after a failure")
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.server_arguments = list(arguments[split + 1 :])
    options.timeout = options.timeout or (float("inf") if options.models else 900.0)
    if options.models:
        options.models = options.models.absolute()
    return options


def enter_environment(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Make the environment and, if another interpreter runs this, begin anew in it."""
    python = environment.ensure(comfyui_version=options.comfyui_version)
    if os.path.realpath(sys.prefix) != os.path.realpath(environment.VENV):
        os.execv(python, [str(python), os.path.abspath(__file__), *arguments])


def stop(*_: object) -> None:
    """End as Ctrl-C does, so that the server is stopped."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        enter_environment(options, arguments)
        with only_one():
            run(options)
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except PromptError as error:
        fail(f"{error}: see {BASE / 'comfyui.log'}.", options.verbose)
        return 1
    except (DemoError, ServerError, FetchError, environment.SetupError) as error:
        fail(str(error), options.verbose)
        return 1
    except Exception as error:
        fail(f"The demo failed unexpectedly ({type(error).__name__}: {error}): run it with --verbose and report it.",
             options.verbose)  # fmt: skip
        return 1
    return 0


def fail(sentence: str, verbose: bool) -> None:
    """Tell what went wrong; at length if asked for."""
    if verbose:
        traceback.print_exc()
        say((BASE / "comfyui.log").read_text(errors="replace") if (BASE / "comfyui.log").exists() else "")
    say(sentence)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
