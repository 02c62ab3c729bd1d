"""A small synchronous WebSocket client (RFC 6455): text, binary, ping and close, without extensions.

ComfyUI reports progress over a WebSocket. The driver of its server is synchronous and needs one connection to
the loopback address, so the few frames it reads are taken apart here instead of bringing in an event loop.
"""

import base64
import contextlib
import os
import socket
import struct
import time

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


class WebSocketClosed(ConnectionError):
    """The other side closed the connection or refused it."""


class WebSocket:
    """One client connection; a context manager."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10.0) -> None:
        """Connect and upgrade; raise WebSocketClosed or OSError if that fails within ``timeout`` seconds."""
        self._buffer = b""
        self._message = b""
        self._socket = socket.create_connection((host, port), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._read()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        status = head.split(b"\r\n", 1)[0].decode(errors="replace")
        if " 101 " not in f"{status} ":
            self.close()
            raise WebSocketClosed(f"the server answered {status!r} instead of upgrading")

    def receive(self, timeout: float) -> str | bytes | None:
        """Return the next message, text as str; None if none is complete after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            frame = self._next_frame()
            if frame is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                self._socket.settimeout(remaining)
                with contextlib.suppress(TimeoutError):
                    self._read()
                continue
            final, opcode, payload = frame
            if opcode == CLOSE:
                raise WebSocketClosed("the server closed the connection")
            if opcode == PING:
                self._send(PONG, payload)
            elif opcode in (TEXT, BINARY, CONTINUATION):
                self._kind = opcode or self._kind
                self._message += payload
                if final:
                    message, self._message = self._message, b""
                    return message.decode() if self._kind == TEXT else message

    def close(self) -> None:
        """Close the connection; the server notices by itself."""
        self._socket.close()

    def __enter__(self) -> "WebSocket":
        """Return the connection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    _kind = BINARY

    def _read(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise WebSocketClosed("the server ended the connection")
        self._buffer += data

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        """Take one whole frame off the buffer: final flag, opcode, payload."""
        if len(self._buffer) < 2:
            return None
        length, start = self._buffer[1] & 0x7F, 2
        if length >= 126:
            layout = ">H" if length == 126 else ">Q"
            start += struct.calcsize(layout)
            if len(self._buffer) < start:
                return None
            (length,) = struct.unpack_from(layout, self._buffer, 2)
        if len(self._buffer) < start + length:
            return None
        first, payload = self._buffer[0], self._buffer[start : start + length]
        self._buffer = self._buffer[start + length :]
        return bool(first & 0x80), first & 0x0F, payload

    def _send(self, opcode: int, payload: bytes) -> None:
        """Send a control frame (at most 125 bytes), masked as a client's frames must be."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes((0x80 | opcode, 0x80 | len(payload))) + mask + masked)
