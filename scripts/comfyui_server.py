"""Runs the real ComfyUI server as a subprocess and talks to it over its HTTP and WebSocket interface.

The server gets a private base directory (models, input, output, temp, user, custom_nodes with a link to the pack),
a free loopback port and no reason to use the network, so ComfyUI's own folder is only read. Used by scripts/demo.py
and by the tests; standard library only. The routes and messages are those of ComfyUI's server.py and execution.py.
"""

import atexit
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _websocket import WebSocket
from fetch_comfyui import ROOT

HOST = "127.0.0.1"
PACK_FOLDER = "apple-silicon-video"
FOLDERS = ("custom_nodes", "input", "output", "temp", "user")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
STOP_SIGNALS = ((signal.SIGINT, 10.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""How the server is asked to end, and for how many seconds each is waited for."""

Prompt = Mapping[str, Mapping[str, Any]]
"""A workflow in ComfyUI's API format: node id -> class_type and inputs."""

Listener = Callable[[str, dict[str, Any]], None]
"""Called with the type and the data of every message that the server sends while a prompt runs."""


class ServerError(RuntimeError):
    """The server did not start, did not answer or ended; the message is one sentence."""


class PromptError(ServerError):
    """A prompt was refused or a node failed; ``details`` is what ComfyUI said, including any traceback."""

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        """Keep ComfyUI's own account beside the sentence."""
        super().__init__(message)
        self.details = details


class PromptInterrupted(ServerError):
    """The prompt was interrupted before its end."""


class ComfyServer:
    """One running ComfyUI; a context manager that starts and stops it."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        pack: Path | None = ROOT,
        models: Path | None = None,
        arguments: Sequence[str] = ("--cpu",),
        launcher: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        startup_timeout: float = 300.0,
    ) -> None:
        """Prepare a server without starting it.

        ``comfyui`` is ComfyUI's source tree, ``base`` the private directory, made if missing. ``pack`` is linked
        as the only custom node (None: none), ``models`` stands for ``base/models``. ``arguments`` are ComfyUI's.
        ``launcher`` goes between the interpreter and main.py: ["wrapper.py"] or ["-m", "module"], which then runs
        the script that its first argument names, with that script's folder first in sys.path. ``environ`` is added
        to the environment; times are in seconds.
        """
        self.comfyui = comfyui
        self.base = base.absolute()
        self.port = 0
        self.log = self.base / "comfyui.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._pack = pack
        self._models = models
        self._python = python
        self._launcher = tuple(launcher)
        self._arguments = tuple(arguments)
        self._environ = dict(environ or {})
        self._startup_timeout = startup_timeout

    @property
    def url(self) -> str:
        """Where a browser finds the server."""
        return f"http://{HOST}:{self.port}"

    # Starting and stopping

    def start(self) -> "ComfyServer":
        """Start the server and return when it answers; raise ServerError if it does not."""
        self._make_folders()
        for attempt in (1, 2, 3):
            self.port = free_port()
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    self._command(),
                    cwd=self.base,
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            atexit.register(self.stop)
            try:
                self._wait_until_ready()
                return self
            except BaseException:
                self.stop()
                if attempt == 3 or "address already in use" not in self.log_text().lower():
                    raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the server and everything it started; nothing happens if it does not run."""
        process = self.process
        if process is None:
            return
        for number, patience in STOP_SIGNALS:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        self.process = None
        atexit.unregister(self.stop)

    def __enter__(self) -> "ComfyServer":
        """Start the server."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop the server."""
        self.stop()

    def log_text(self) -> str:
        """Return what the server has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _make_folders(self) -> None:
        for name in FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self._models:
            link(self.base / "models", self._models)
        else:
            (self.base / "models").mkdir(exist_ok=True)
        if self._pack:
            link(self.base / "custom_nodes" / PACK_FOLDER, self._pack)

    def _command(self) -> list[str]:
        command = [self._python, *self._launcher, str(self.comfyui / "main.py")]
        command += ["--listen", HOST, "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-api-nodes", "--disable-all-custom-nodes"]
        command += ["--whitelist-custom-nodes", PACK_FOLDER] if self._pack else []
        return [*command, *self._arguments]

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, **OFFLINE, "PYTHONUNBUFFERED": "1"}
        if not self.comfyui.is_relative_to(ROOT):
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        return environment | self._environ

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._startup_timeout
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError, http.client.HTTPException, ServerError):
                self.get("/system_stats", timeout=5.0)
                return
            time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {self._startup_timeout:g} s: see {self.log}.")

    def check_alive(self) -> None:
        """Raise ServerError if the server is not running."""
        if self.process is None:
            raise ServerError("The ComfyUI server is not running: start it first.")
        status = self.process.poll()
        if status is not None:
            lines = [line.strip() for line in self.log_text().splitlines() if line.strip()]
            reason = lines[-1] if lines else "it printed nothing"
            raise ServerError(f"ComfyUI ended with status {status} ({reason}): see {self.log}.")

    # Requests

    def request(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json", timeout: float = 60.0
    ) -> tuple[int, bytes]:
        """Send one HTTP request; return the status and the body. OSError if nobody answers within ``timeout``."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str, timeout: float = 60.0) -> Any:
        """Return the JSON at a path."""
        status, body = self.request("GET", path, timeout=timeout)
        return answer(path, status, body)

    def post(self, path: str, content: Mapping[str, Any]) -> Any:
        """Send JSON to a path; return the answer, None for an empty one."""
        status, body = self.request("POST", path, json.dumps(content).encode())
        return answer(path, status, body)

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Return the description of every node, or of one, by node id; empty if there is no such node."""
        return self.get(f"/object_info/{node}" if node else "/object_info")

    def upload_image(self, content: bytes, name: str) -> str:
        """Put an image file's bytes into the input folder; return the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        overwrite = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue'
        body = head.encode() + content + overwrite.encode() + f"\r\n--{boundary}--\r\n".encode()
        status, reply = self.request("POST", "/upload/image", body, f"multipart/form-data; boundary={boundary}")
        stored = answer("/upload/image", status, reply)
        return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

    def interrupt(self) -> None:
        """Interrupt the prompt that runs."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Ask the server to unload all models and to forget cached results; it does so between prompts."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    # Prompts

    def submit(self, prompt: Prompt, client: str = "", workflow: Mapping[str, Any] | None = None) -> str:
        """Queue a prompt and return its id; raise PromptError if ComfyUI refuses it or any part of it.

        ``workflow`` is the UI-format workflow to be embedded in the output files.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        content = {"prompt": prompt, "client_id": client, "extra_data": extra}
        status, body = self.request("POST", "/prompt", json.dumps(content).encode())
        reply = json.loads(body) if body[:1] == b"{" else {"error": body.decode(errors="replace")}
        if status != 200 or reply.get("node_errors"):
            if "prompt_id" in reply:
                self.post("/queue", {"delete": [reply["prompt_id"]]})
            raise PromptError(f"ComfyUI refused the workflow: {refusal(reply)}", reply)
        return reply["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """Return the history entry of a finished prompt, None while it is queued or running."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def run(
        self,
        prompt: Prompt,
        *,
        workflow: Mapping[str, Any] | None = None,
        timeout: float = 900.0,
        listener: Listener | None = None,
    ) -> dict[str, Any]:
        """Run a prompt to its end and return its outputs, by node id.

        ``listener`` hears of every message. Raises PromptError for a failed node, PromptInterrupted, and
        ServerError if the server ends or ``timeout`` seconds pass (the prompt is then interrupted).
        """
        client = uuid.uuid4().hex
        with WebSocket(HOST, self.port, f"/ws?clientId={client}") as messages:
            prompt_id = self.submit(prompt, client, workflow)
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                if self._listen(messages, prompt_id, listener):
                    entry = self.history(prompt_id)
                    if entry is not None:
                        return outcome(entry)
        self.interrupt()
        raise ServerError(f"The workflow did not end within {timeout:g} s: see {self.log}.")

    def _listen(self, messages: WebSocket, prompt_id: str, listener: Listener | None) -> bool:
        """Pass one message on; return whether the prompt may have ended."""
        try:
            message = messages.receive(timeout=1.0)
        except OSError as error:
            time.sleep(0.2)  # a dying process closes its sockets first
            self.check_alive()
            raise ServerError(f"The connection to ComfyUI broke ({error}): see {self.log}.") from error
        if message is None:
            self.check_alive()
            return True
        if isinstance(message, bytes):
            return False
        content = json.loads(message)
        kind, data = content["type"], content.get("data") or {}
        if listener:
            listener(kind, data)
        ended = kind.startswith("execution_") and kind not in ("execution_start", "execution_cached")
        return data.get("prompt_id") == prompt_id and (ended or (kind == "executing" and data["node"] is None))

    def files(self, outputs: Mapping[str, Any], suffix: str = "") -> list[Path]:
        """Return the files that outputs name, of one suffix (".mp4") or all, in the order of the nodes."""
        return [path for path in self._named_files(outputs) if path.name.endswith(suffix)]

    def _named_files(self, outputs: Mapping[str, Any]) -> Iterator[Path]:
        for output in outputs.values():
            for entries in output.values():
                for entry in entries if isinstance(entries, list) else []:
                    if isinstance(entry, dict) and "filename" in entry:
                        folder = self.base / entry.get("type", "output") / entry.get("subfolder", "")
                        yield folder / entry["filename"]


def free_port() -> int:
    """Return a loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to ``target``; an older link is replaced, anything else refused."""
    target = target.absolute()
    if path.is_symlink():
        if path.readlink() == target:
            return
        path.unlink()
    elif path.exists():
        raise ServerError(f"{path} is in the way of a link to {target}: move it away.")
    path.symlink_to(target, target_is_directory=True)


def answer(path: str, status: int, body: bytes) -> Any:
    """Return an answer's JSON, None for an empty one; raise ServerError for a failed request."""
    if status != 200:
        raise ServerError(f"ComfyUI answered {status} to {path}: {body[:200].decode(errors='replace')}")
    return json.loads(body) if body.strip() else None


def refusal(reply: Mapping[str, Any]) -> str:
    """Say in a few words what ComfyUI found wrong with a prompt."""
    found = []
    for node, errors in (reply.get("node_errors") or {}).items():
        for error in errors["errors"]:
            found.append(f"{errors['class_type']} (node {node}): {error['message']}: {error['details']}")
    error = reply.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return ("; ".join(found) or str(error or reply)).rstrip(".")


def outcome(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of a history entry; raise what it reports otherwise."""
    messages = dict(entry["status"]["messages"])
    if "execution_error" in messages:
        error = messages["execution_error"]
        reason = (error["exception_message"].strip().splitlines() or [error["exception_type"]])[0].rstrip(".")
        raise PromptError(f"{error['node_type']} (node {error['node_id']}) failed: {reason}", error)
    if "execution_interrupted" in messages:
        raise PromptInterrupted("The workflow was interrupted.")
    return entry["outputs"]
