"""How a fake server is told to misbehave, and how it writes down what happens: through its environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time

ENV = os.environ


def log(event: str, **fields: object) -> None:
    if (path := ENV.get("FAKE_LOG")) and fields.get("path") != "/health":
        line = json.dumps({"event": event, "pid": os.getpid(), "time": time.monotonic(), **fields}) + "\n"
        append(path, line.encode())


def append(path: str, data: bytes) -> int:
    """Append in one write, so that lines of several processes stay whole; return the size after it."""
    with open(path, "ab", buffering=0) as file:
        file.write(data)
        return file.tell()


def manner(name: str) -> str:
    """The value of FAKE_<name>, or "" when it is not set or has acted FAKE_TIMES times already."""
    value = ENV.get(f"FAKE_{name}", "")
    if value and "FAKE_TIMES" in ENV and append(ENV["FAKE_COUNTER"], b".") > int(ENV["FAKE_TIMES"]):
        return ""
    return value


def bound(host: str, port: int) -> socket.socket:
    """A listener there; a host that ends in `.sock` is the path of a unix socket."""
    if not host.endswith(".sock"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(host)
    listener.listen(512)
    return listener


def say(text: str) -> None:
    os.write(2, f"{text}\n".encode(errors="surrogateescape"))


def report() -> None:
    """Started as by a router, report what is loaded, and end with the input."""
    if "LLAMA_SERVER_ROUTER_PORT" in ENV:
        stages, value = ["text_model", "mmproj_model"], 2 * float(ENV["FAKE_SHARE"])
        payload = {"stages": stages, "current": stages[0], "value": value}
        say("cmd_child_to_router:state:" + json.dumps({"state": "loading", "payload": payload}))
        threading.Thread(target=read_input, daemon=True).start()


def read_input() -> None:
    line = os.read(0, 1000).decode()
    log("input", line=line)
    os._exit(0 if line else 1)


def die(how: str) -> None:
    """End with this exit code, or by this signal."""
    say(f"fake: about to end by {how}")
    if how.isdigit():
        os._exit(int(how))
    number = signal.Signals[how]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    signal.pause()


def spam(rate: str) -> None:
    begun, sent = time.monotonic(), 0
    while True:
        sent += os.write(1, b"x" * 65536)
        if rate != "max" and (early_s := begun + sent / (float(rate) * 1e6) - time.monotonic()) > 0:
            time.sleep(early_s)


def fork_grandchild(how: str) -> None:
    settled, settle = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if how == "setsid":
            os.setsid()
        log("fork")
        os.write(settle, b".")
        signal.pause()
    os.read(settled, 1)
