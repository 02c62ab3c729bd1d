"""The parts of the server driver that need no ComfyUI: WebSocket frames, links, and what errors say."""

import hashlib
import http.server
import socket
import struct
import threading

import apple_silicon_video.tests.scripts_path  # noqa: F401
import pytest

import comfyui_server as driver  # isort: skip
from _websocket import WebSocket, WebSocketClosed  # isort: skip


@pytest.fixture
def serve():
    """Serve one connection: answer the upgrade, send the given pieces, then hand over the socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    peers = []

    def start(*pieces, status="101 Switching Protocols"):
        def run():
            peer, _ = listener.accept()
            peers.append(peer)
            while b"\r\n\r\n" not in peer.recv(4096, socket.MSG_PEEK):
                pass
            peer.recv(4096)
            peer.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
            for piece in pieces:
                peer.sendall(piece)

        thread = threading.Thread(target=run)
        thread.start()
        return listener.getsockname()[1], thread, peers

    yield start
    listener.close()
    for peer in peers:
        peer.close()


def frame(opcode, payload, final=True):
    head = bytes([(0x80 if final else 0) | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 65536:
        return head + bytes([126]) + struct.pack(">H", len(payload)) + payload
    return head + bytes([127]) + struct.pack(">Q", len(payload)) + payload


def test_messages_of_every_length_and_in_parts(serve):
    long, longer = "ä" * 500, bytes(70000)
    fragments = frame(1, b"one ", False) + frame(9, b"ping") + frame(0, b"message")
    port, thread, peers = serve(
        frame(1, b"{}") + frame(1, long.encode())[:7], frame(1, long.encode())[7:], frame(2, longer), fragments
    )
    with WebSocket("127.0.0.1", port, "/ws") as web:
        assert [web.receive(5.0) for _ in range(4)] == ["{}", long, longer, "one message"]
        thread.join()
        pong = peers[0].recv(100)
    mask, masked = pong[2:6], pong[6:]
    assert pong[:2] == b"\x8a\x84" and bytes(a ^ b for a, b in zip(mask, masked)) == b"ping"


def test_nothing_to_receive(serve):
    port, thread, _ = serve(frame(1, b"whole")[:4])
    with WebSocket("127.0.0.1", port, "/ws") as web:
        assert web.receive(0.05) is None
        thread.join()


def test_closed_and_refused_connections(serve):
    port, thread, _ = serve(frame(8, b"\x03\xe8"))
    with WebSocket("127.0.0.1", port, "/ws") as web, pytest.raises(WebSocketClosed, match="closed the connection"):
        web.receive(5.0)
    thread.join()
    port, thread, _ = serve(status="404 Not Found")
    with pytest.raises(WebSocketClosed, match="404 Not Found"):
        WebSocket("127.0.0.1", port, "/ws")
    thread.join()


def test_links_are_renewed_and_nothing_else_replaced(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    path = tmp_path / "link"
    for target in (first, first, second, tmp_path / "missing", second):
        driver.link(path, target)
        assert path.readlink() == target
    with pytest.raises(driver.ServerError, match=r"first is in the way of a link to .*second: move it away"):
        driver.link(first, second)
    assert first.is_dir() and not first.is_symlink()


def history(*messages):
    return {"outputs": {"1": {}}, "status": {"messages": [["execution_start", {}], *messages]}}


def test_outcome_of_a_prompt():
    assert driver.outcome(history()) == {"1": {}}
    with pytest.raises(driver.PromptInterrupted):
        driver.outcome(history(["execution_interrupted", {}]))
    error = {"node_id": "3", "node_type": "KSampler", "exception_message": "x is bad.\nmore\n", "exception_type": "E"}
    with pytest.raises(driver.PromptError, match=r"^KSampler \(node 3\) failed: x is bad$") as failure:
        driver.outcome(history(["execution_error", error]))
    assert failure.value.details == error
    with pytest.raises(driver.PromptError, match=r"failed: MemoryError$"):
        driver.outcome(history(["execution_error", error | {"exception_message": "", "exception_type": "MemoryError"}]))


@pytest.mark.parametrize(
    "reply, words",
    [
        ({"error": {"message": "No outputs."}, "node_errors": {}}, "No outputs"),
        ({"error": "500: Internal Server Error"}, "500: Internal Server Error"),
        (
            {"node_errors": {"2": {"class_type": "VAELoader", "errors": [{"message": "Not in list", "details": "x"}]}}},
            "VAELoader (node 2): Not in list: x",
        ),
    ],
)
def test_refusals(reply, words):
    assert driver.refusal(reply) == words


def test_files_named_by_outputs(tmp_path):
    comfy = driver.ComfyServer(tmp_path, tmp_path)
    outputs = {
        "1": {"images": [{"filename": "a.mp4", "subfolder": "video", "type": "output"}], "animated": [True]},
        "2": {"images": [{"filename": "b.png", "subfolder": "", "type": "temp"}], "text": ["hello"]},
    }
    assert comfy.files(outputs) == [tmp_path / "output" / "video" / "a.mp4", tmp_path / "temp" / "b.png"]
    assert comfy.files(outputs, ".mp4") == [tmp_path / "output" / "video" / "a.mp4"]


def test_uploads_are_multipart_forms(tmp_path):
    received = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received["body"] = self.rfile.read(int(self.headers["Content-Length"]))
            received["type"] = self.headers["Content-Type"]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "a.png", "subfolder": "b", "type": "input"}')

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as peer:
        threading.Thread(target=peer.handle_request).start()
        comfy = driver.ComfyServer(tmp_path, tmp_path)
        comfy.port = peer.server_port
        content = b"\x89PNG\r\n\x1a\n--"
        assert comfy.upload_image(content, "a.png") == "b/a.png"
    boundary = received["type"].split("boundary=")[1].encode()
    first, second, end = received["body"].split(b"--" + boundary)[1:]
    head, body = first.split(b"\r\n\r\n", 1)
    assert b'name="image"; filename="a.png"' in head
    assert hashlib.sha256(body.removesuffix(b"\r\n")).digest() == hashlib.sha256(content).digest()
    assert b'name="overwrite"\r\n\r\ntrue\r\n' in second and end == b"--\r\n"
