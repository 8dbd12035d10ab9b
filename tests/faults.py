"""A proxy that breaks HTTP in the ways object stores and networks do.

It forwards requests byte for byte (a signature covers the Host header) and harms those that its script, or a seeded
chance, selects. Only for object stores over plain HTTP/1.1.
"""

import http.client
import random
import socket
import socketserver
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

CUTS = ("silence", "drop", "lost", "cut", "short")
"""No answer; close at once; forward, then close unanswered; half the answer; half the request, then close."""
WRONG = "wrong"
"""One byte in the middle of the answer's body is another one; not among `KINDS`, since only chunks notice."""
KINDS = ("500", "503", "429", *CUTS)
Fault = str | tuple[int, str] | None
"""One of `KINDS`, a status with a body, or None to leave the request alone."""


class FaultyProxy:
    """Listens on `url` in front of `target`; a context manager."""

    def __init__(
        self,
        target: str,
        script: Iterable[Fault] = (),
        *,
        rate: float = 0.0,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
    ) -> None:
        """Do to request i what item i of the script says; past its end, harm requests with probability `rate`."""
        parts = urlsplit(target)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.requests: list[str] = []
        """Method, path and fault of every request so far."""
        self._script = iter(script)
        self.rate = rate
        self._kinds = kinds
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            faulty = proxy

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.allow_reuse_address = True
        self._server.request_queue_size = 128
        self._server.server_bind()
        self._server.server_activate()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def script(self, faults: Iterable[Fault]) -> None:
        """Do this to the next requests."""
        with self._lock:
            self._script = iter(faults)

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            fault: Fault = next(self._script, "chance")
            if fault == "chance":
                fault = self._random.choice(self._kinds) if self._random.random() < self.rate else None
            self.requests.append(f"{request} {fault}")
            return fault


class _Handler(socketserver.StreamRequestHandler):
    faulty: FaultyProxy
    disable_nagle_algorithm = True

    def handle(self) -> None:
        try:
            while not self.faulty.closing.is_set() and self._one():
                pass
        except OSError:
            pass

    def _one(self) -> bool:
        """Serve a request; False ends the connection."""
        head = self._head()
        if not head:
            return False
        method, path = head[0].decode().split(" ")[:2]
        fields = {k.strip().lower(): v.strip() for k, _, v in (h.decode().partition(":") for h in head[1:])}
        if "100-continue" in fields.get("expect", "").lower():
            head = [h for h in head if not h.lower().startswith(b"expect:")]
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._body(fields)
        fault = self.faulty.next_fault(f"{method} {path}")
        if isinstance(fault, tuple) or fault in ("500", "503", "429"):
            status, text = fault if isinstance(fault, tuple) else (int(fault), "injected")
            data = b"" if method == "HEAD" else text.encode()
            reason = http.client.responses[status]
            self.wfile.write(f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            return True
        if fault == "silence":
            while not self.faulty.closing.is_set() and not self._gone():
                pass
            return False
        if fault == "drop":
            return False
        with socket.create_connection(self.faulty.upstream, 60) as upstream:
            sent = body[: len(body) // 2] if fault == "short" else body
            upstream.sendall(b"\r\n".join(head) + b"\r\n\r\n" + sent)
            return fault != "short" and self._answer(upstream, method, fault)

    def _answer(self, upstream: socket.socket, method: str, fault: Fault) -> bool:
        answer = http.client.HTTPResponse(upstream, method=method)
        try:
            answer.begin()
            data = answer.read()
        finally:
            answer.close()
        if fault == "lost":
            return False
        if fault == WRONG and data:
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        drop = {"transfer-encoding", "connection", "content-length"}
        lines = [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in drop]
        size = answer.getheader("Content-Length") if method == "HEAD" else str(len(data))
        if size is not None and answer.status != 204:
            lines.append(f"Content-Length: {size}")
        head = "\r\n".join([f"HTTP/1.1 {answer.status} {answer.reason}", *lines, "", ""]).encode("latin-1")
        if fault == "cut":
            whole = head + data
            self.wfile.write(whole[: len(head) + len(data) // 2] if data else head[:-10])
            return False
        self.wfile.write(head + data)
        return True

    def _head(self) -> list[bytes]:
        lines: list[bytes] = []
        while line := self.rfile.readline():
            if line in (b"\r\n", b"\n"):
                return lines
            lines.append(line.rstrip(b"\r\n"))
        return []

    def _body(self, fields: dict[str, Any]) -> bytes:
        if "chunked" in fields.get("transfer-encoding", "").lower():
            raise RuntimeError("no client here sends chunked requests")
        return self.rfile.read(int(fields.get("content-length", 0)))

    def _gone(self) -> bool:
        """Whether the client closes within 50 ms."""
        self.connection.settimeout(0.05)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return False
        finally:
            self.connection.settimeout(None)
