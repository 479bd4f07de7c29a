"""A model server that is no llama-server: a little of OpenAI's API, started and ended by command lines of its own.

`plain_server.py serve --port N` serves until SIGTERM. `--detach FILE` has the server run in a process of its own, whose
pid is in FILE, as a container's is: the command itself ends when that does, and SIGTERM does not end it.
`plain_server.py stop FILE` ends that process; `stop --pid N` a process. All write what happens into `--log`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

POLL_S = 0.005


class Handler(BaseHTTPRequestHandler):
    """`GET` of the health path, and chats, which are answered with what the server got."""

    args: ClassVar[argparse.Namespace]

    def do_GET(self) -> None:
        ready = self.args.ready is None or Path(self.args.ready).exists()
        note("get", path=self.path)
        self._send(200 if self.path == self.args.health and ready else 404 if ready else 503, {})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        form = self.headers.get("Content-Type", "").startswith("multipart/")
        body = {"form": data.decode()} if form else json.loads(data)
        note("post", path=self.path, body=body, key=self.headers["Authorization"])
        if self.args.gate is not None:
            until(Path(self.args.gate).exists)
        message = {"role": "assistant", "content": f"{self.args.name} got {body.get('model')}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send(200, {"id": "1", "object": "chat.completion", "model": "x", "created": 1, "choices": [choice]})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def note(event: str, **fields: object) -> None:
    """Write down what happened."""
    if log := os.environ.get("PLAIN_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps({"event": event, "time": time.monotonic(), "pid": os.getpid(), **fields}) + "\n")


def until(condition: Any) -> None:
    while not condition():
        time.sleep(POLL_S)


def ended(*_: object) -> None:
    note("term")
    os._exit(0)


def serve(args: argparse.Namespace) -> None:
    note("start", argv=sys.argv[1:], env=dict(os.environ))
    if args.deaf:
        signal.signal(signal.SIGTERM, lambda *_: note("ignored"))
    else:
        signal.signal(signal.SIGTERM, ended)
    if args.detach:
        detach(Path(args.detach))
    if args.silent:
        until(lambda: False)
    if args.fail:
        sys.exit("cannot serve: out of luck")
    Handler.args = args
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


def detach(file: Path) -> None:
    """Go on in a process that is neither a child nor in the group of this one; this one waits for its end."""
    middle = os.fork()
    if middle == 0:
        os.setsid()
        own = os.fork()
        if own:
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        part = file.with_suffix(".part")
        part.write_text(str(os.getpid()))
        part.rename(file)
        return
    os.waitpid(middle, 0)
    signal.signal(signal.SIGTERM, lambda *_: note("ignored"))
    until(file.exists)
    pid = int(file.read_text())
    until(lambda: not alive(pid))
    note("client ends")
    sys.exit(0)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stop(args: argparse.Namespace) -> None:
    note("stop", argv=sys.argv[1:])
    if args.hang:
        until(lambda: False)
    if args.refuse:
        sys.exit(3)
    pid = args.pid or int(Path(args.file).read_text())
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid))


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    server = commands.add_parser("serve")
    server.set_defaults(run=serve)
    server.add_argument("--port", type=int, required=True)
    server.add_argument("--name", default="plain")
    server.add_argument("--health", default="/health")
    server.add_argument("--ready", help="a file; until it is there, the health path is answered with 503")
    server.add_argument("--gate", help="a file; until it is there, no chat is answered")
    server.add_argument("--detach")
    for flag in ("--deaf", "--silent", "--fail"):
        server.add_argument(flag, action="store_true")
    stopper = commands.add_parser("stop")
    stopper.set_defaults(run=stop)
    stopper.add_argument("file", nargs="?")
    stopper.add_argument("--pid", type=int)
    for flag in ("--hang", "--refuse"):
        stopper.add_argument(flag, action="store_true")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
