"""HTTP as a fake server needs it: answers of any framing, and a client that is seen to leave."""

from __future__ import annotations

import json
import select
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Gone(Exception):
    """The client closed its connection, or we broke it off on purpose."""


class Refused(Exception):
    """What is asked for cannot be done: a status and Ollama's words."""


class Wire(BaseHTTPRequestHandler):
    """One client connection, on a thread of its own."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None: ...

    def play(self, response: dict[str, Any]) -> None:
        headers = {key.lower(): value for key, value in response.get("headers", {}).items()}
        status, kind = response.get("status", 200), headers.get("content-type", "application/json; charset=utf-8")
        if "lines" in response:
            self.begin(status, headers.get("content-type", "application/x-ndjson"))
            for line in response["lines"]:
                self.chunk(dumps(line) + b"\n")
            return self.chunk(b"")
        self.send(status, dumps(response.get("body", "")), kind)

    def begin(self, status: int, kind: str) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def reply(self, status: int, value: object) -> None:
        self.send(status, dumps(value), "application/json; charset=utf-8")

    def send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def pause(self, seconds: float) -> None:
        """Wait so long; raise `Gone` as soon as the client closes its side."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(min(seconds, 1e6) * 1000) and not self.connection.recv(1, socket.MSG_PEEK):
            raise Gone

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # close sends RST
        self.connection.close()
        raise Gone


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # without asking for the names of addresses
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def dumps(value: object) -> bytes:
    """JSON as Ollama writes it; a text is taken for what it should be."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def fits(wanted: Any, got: Any) -> bool:
    """Whether `got` is `wanted`, but for fields that it has besides."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        return all(key in got and fits(value, got[key]) for key, value in wanted.items())
    return bool(wanted == got)
