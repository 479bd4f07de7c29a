"""A stand-in for llama-server: its command line, its wire format, and every bad manner we want to survive.

Tests point `llama_cpp.server` at the script that `install()` writes; the proxy spawns that as it would the real one.
From the command line it uses `-m/--model`, `-a/--alias`, `--host`, `--port`, `-np/--parallel`; it ignores the rest.
Like llama-server it binds first, answers 503 while loading, then serves `-np` requests at a time while others wait;
all but `/health` want `Authorization: Bearer $LLAMA_API_KEY`; with a stream under way the first SIGTERM only stops it
once the stream ends, and a second one makes it exit with code 1.

A request body may carry `"fake": {...}`, or a last message whose text is that object, which gets through a translation:

    tokens=8 token_ms=0      as below                       stall_after=n  is silent after n tokens (0: before all)
    die_after=n              as below                       mute           is silent before the head of the answer
    pings                    a comment before each token; with `stall_after` one each 50 ms while it is silent
    busy=s                   uses s seconds of processor time before the first token
    deaf                     accepts no more connections from then on
    tool_call=[name, args]   behind the text                refuse=[status, text]   an error in place of an answer
    error_after=n            as FAKE_INBAND_ERROR           answer=text    in place of tokens
    texts=[...]              the tokens                     thoughts=text  in front of them (chats, streamed)
    last_at=file             the last token comes when that file is there
    cut_at=[n, m] cut_by=close|reset|end    after n chunks of a stream and m bytes of the next one; -m: all but m bytes

The environment switches manners on, most easily through a model's `env:`:

    FAKE_LOAD_S=1.5          loading takes so long          FAKE_LOG_LOAD=1    and prints a line each 100 ms
    FAKE_LOAD_UNTIL=file     loading takes until that file is there; FAKE_SHARE=0.35 is reported to a router meanwhile
    FAKE_EXIT=3 | SIGSEGV    ends so at start; `3@loaded`: once ready instead
    FAKE_NEVER=nobind|mute|503   never becomes healthy: does not listen | accepts and stays silent | loads for ever
    FAKE_TOKENS=8 FAKE_TOKEN_MS=0    tokens of an answer, and the pause before each
    FAKE_ECHO=1              repeats the last message, word for word         FAKE_STRICT=1    refuses an n over -np
    FAKE_ANSWER=text         in place of tokens             FAKE_IF=[[words, text], ...]   if the last message has them
    FAKE_DIE_AFTER=n         SIGKILLs itself after n tokens of an answer
    FAKE_WEDGED=file         generates nothing while that file is there (and answers /slots)
    FAKE_RST=before_headers|after_headers    resets the connection of a generating request
    FAKE_CUT=short_cl|chunked_no_end|rst|fin_mid_event|no_done    how an answer is truncated, after all its tokens
    FAKE_INBAND_ERROR=n      after n tokens an error event, and a clean end without [DONE]
    FAKE_TIMES=n FAKE_COUNTER=file   FAKE_EXIT, _DIE_AFTER, _RST, _CUT, _INBAND_ERROR act only the first n times
                                     in all, counted in that file over all processes
    FAKE_IGNORE_TERM=1       ignores SIGTERM                FAKE_FORK=1|setsid   forks a grandchild that holds stdout
    FAKE_SPAM=max|n          prints without a newline, as fast as it can or n MB/s
    FAKE_LOG=file            appends a JSON object a line for each event, with pid and monotonic time: start, loaded,
                             request (method, path, headers, body), done, closed (the client left first), fork, stop
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time

from tests.fakes.llama_forms import FORMS, Texts, steering
from tests.fakes.manners import ENV, bound, die, fork_grandchild, log, manner, report, say, spam

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

KEY = ENV.get("LLAMA_API_KEY", "")
REASONS = {200: "OK", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}
GENERATING = {"/v1/chat/completions", "/v1/messages", "/v1/completions", "/completion", "/v1/embeddings", "/v1/rerank"}
GENERATING |= {"/infill"}


def install(directory: Path) -> Path:
    """Write an executable `llama-server` into `directory` that runs this program; return its path."""
    script = directory / "llama-server"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = f"import sys; sys.path.insert(0, {root!r}); from tests.fakes.llama_server import main; main()"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S -c "{code}" "$@"\n')
    script.chmod(0o755)
    return script


class Gone(Exception):
    """The client closed its connection, or we broke it off on purpose."""


class Server:
    def __init__(self) -> None:
        self.model = option("--model", "-m", "")
        self.alias = option("--alias", "-a", "fake")
        self.slots = int(option("--parallel", "-np", "4"))
        self.loaded, self.streams, self.decoded = False, 0, 0
        self.free = threading.Semaphore(self.slots)

    def listen(self, host: str, port: int) -> None:
        try:
            listener = bound(host, port)
        except OSError as exc:
            say(f"couldn't bind HTTP server socket, hostname: {host}, port: {port}: {exc.strerror}")
            os._exit(1)
        self.listener = listener
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return listener.close()
            if listener.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Connection(self, sock).serve, daemon=True).start()

    def load(self) -> None:
        until = time.monotonic() + float(ENV.get("FAKE_LOAD_S", 0))
        say(f"load_model: loading model '{self.model}'")
        report()
        while (left := until - time.monotonic()) > 0:
            if "FAKE_LOG_LOAD" in ENV:
                say(f"load_model: {left:.1f} s to go")
            time.sleep(min(left, 0.1))
        while (file := ENV.get("FAKE_LOAD_UNTIL")) and not os.path.exists(file):
            time.sleep(0.01)
        if ENV.get("FAKE_NEVER") == "503":
            return
        if (how := ENV.get("FAKE_EXIT", "")).endswith("@loaded") and manner("EXIT"):
            die(how.removesuffix("@loaded"))
        log("loaded")
        self.loaded = True
        say("main: model loaded")


class Connection:
    """One client connection, on a thread of its own."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.buffer = b""
        self.keep = True

    def serve(self) -> None:
        try:
            if ENV.get("FAKE_NEVER") == "mute":
                self.read_until(lambda: False)
            while self.keep:
                self.one()
        except (Gone, OSError):
            pass
        finally:
            self.sock.close()

    def read_until(self, done: Any) -> None:
        while not done():
            data = self.sock.recv(65536)
            if not data:
                raise Gone
            self.buffer += data

    def one(self) -> None:
        """Read one request and answer it."""
        self.read_until(lambda: b"\r\n\r\n" in self.buffer)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        self.read_until(lambda: len(self.buffer) >= length)
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        log("request", method=method, path=target, headers=headers, body=body.decode("utf-8", "replace"))
        try:
            self.route(target.partition("?")[0], headers, body)
        except (Gone, OSError):
            log("closed", path=target)
            raise
        log("done", path=target)

    def route(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if not self.server.loaded:
            return self.refuse(503, "Loading model", "unavailable_error")
        if path == "/health":
            return self.reply(200, {"status": "ok"})
        if KEY and headers.get("authorization") != f"Bearer {KEY}":
            self.keep = False
            return self.refuse(401, "Invalid API Key", "authentication_error")
        if not path.startswith("/v1/") and f"/v1{path}" in GENERATING:
            path = f"/v1{path}"
        if path in GENERATING:
            return self.generate(path, json.loads(body or b"{}"))
        self.reply(*self.question(path, body))

    def question(self, path: str, body: bytes) -> tuple[int, object]:
        server = self.server
        if path == "/props":
            return 200, {"total_slots": server.slots, "model_path": server.model, "model_alias": server.alias}
        if path == "/slots":
            work = [{"n_decoded": server.decoded}]
            return 200, [{"is_processing": n < server.streams, "next_token": work} for n in range(server.slots)]
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": server.alias, "object": "model", "owned_by": "llamacpp"}]}
        if path == "/tokenize":
            return 200, {"tokens": [len(word) for word in json.loads(body).get("content", "").split()]}
        counted = {"input_tokens": 1} if path.endswith("input_tokens") else {}
        return 200, {"path": path, "echo": body.decode("utf-8", "replace"), **counted}

    def generate(self, path: str, body: dict[str, Any]) -> None:
        if "FAKE_STRICT" in ENV and int(body.get("n") or 1) > self.server.slots:
            return self.refuse(400, "n_cmpl cannot be greater than the number of slots", "invalid_request_error")
        while not self.server.free.acquire(timeout=0.01):
            self.pause(0)
        try:
            self.server.streams += 1
            answer = Answer(self, path, body)
            if (rst := manner("RST")) == "before_headers":
                self.reset()
            answer.send(reset_after_headers=rst == "after_headers")
        finally:
            self.server.streams -= 1
            self.server.free.release()

    def pause(self, seconds: float) -> None:
        """Wait so long; raise `Gone` as soon as the client closes its side."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if poll.poll(min(seconds, 1e6) * 1000) and not self.sock.recv(1, socket.MSG_PEEK):
            raise Gone

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # on, 0 s: close sends RST
        raise Gone

    def head(self, status: int, *headers: str) -> None:
        after = "Keep-Alive: timeout=5, max=100" if self.keep else "Connection: close"
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Reason')}", "Server: llama.cpp", *headers, after, "\r\n"]
        self.sock.sendall("\r\n".join(lines).encode())

    def reply(self, status: int, value: object, missing: int = 0) -> None:
        data = json.dumps(value).encode()
        self.head(status, "Content-Type: application/json; charset=utf-8", f"Content-Length: {len(data) + missing}")
        self.sock.sendall(data)

    def refuse(self, status: int, message: str, kind: str) -> None:
        self.reply(status, {"error": {"message": message, "type": kind, "code": status}})


class Answer:
    """One generated answer, streamed or whole, and what goes wrong with it."""

    def __init__(self, connection: Connection, path: str, body: dict[str, Any]) -> None:
        steer = steering(body)
        self.connection = connection
        self.embedding = path == "/v1/embeddings"
        self.stream = bool(body.get("stream"))
        self.tokens = int(steer.get("tokens", min(int(ENV.get("FAKE_TOKENS", 8)), body.get("max_tokens") or 1 << 30)))
        self.token_s = float(steer.get("token_ms", ENV.get("FAKE_TOKEN_MS", 0))) / 1000
        self.stall_after = int(steer.get("stall_after", -1))
        self.die_after = int(steer.get("die_after", -1 if self.embedding else manner("DIE_AFTER") or -1))
        self.cut = manner("CUT")
        self.error_after = int(steer.get("error_after", manner("INBAND_ERROR") or -1))
        self.refusal = steer.get("refuse")
        self.mute, self.pings, self.last_at = "mute" in steer, "pings" in steer, steer.get("last_at")
        self.busy_s = float(steer.get("busy", 0))
        if "deaf" in steer:
            connection.server.listener.shutdown(socket.SHUT_RDWR)
        self.cut_at, self.cut_by, self.chunks = steer.get("cut_at", [-1, 0]), steer.get("cut_by"), 0
        texts = steer.get("texts") or [f"t{n} " for n in range(self.tokens)]
        if (answer := steer.get("answer", ENV.get("FAKE_ANSWER"))) is not None and "texts" not in steer:
            texts = [answer]
        last = str(body["messages"][-1].get("content")) if body.get("messages") else str(body.get("prompt"))
        texts = next(([reply] for words, reply in json.loads(ENV.get("FAKE_IF", "[]")) if words in last), texts)
        if "FAKE_ECHO" in ENV:
            texts = re.findall(r"\S+\s*", last)
        self.tokens = len(texts)
        self.form = FORMS.get(path, Texts)(connection.server.alias, body, texts, steer.get("tool_call"))
        self.form.thoughts = steer.get("thoughts", "")

    def send(self, *, reset_after_headers: bool) -> None:
        if self.mute:
            self.connection.pause(1e6)
        if self.refusal:
            status, text = self.refusal
            return self.connection.refuse(status, text, "server_error")
        (self.send_stream if self.stream else self.send_whole)(reset_after_headers)

    def token(self, index: int) -> None:
        """Let the time of one token pass, and die or stall in front of it if so told."""
        if index == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        while time.thread_time() < self.busy_s:
            pass
        while index == self.stall_after and self.pings:
            self.chunk(b":\n\n")
            self.connection.pause(0.05)
        self.connection.pause(1e6 if index == self.stall_after else self.token_s)
        while (file := ENV.get("FAKE_WEDGED")) and os.path.exists(file):
            self.connection.pause(0.2)
        self.connection.server.decoded += 1
        while self.last_at and index == self.tokens - 1 and not os.path.exists(self.last_at):
            self.connection.pause(0.01)

    def send_whole(self, reset_after_headers: bool) -> None:
        connection = self.connection
        for index in range(self.tokens + (self.die_after == self.tokens)):
            if index == self.error_after:
                return connection.refuse(500, "fake failure", "server_error")
            self.token(index)
        if self.embedding:
            data = [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]
            return connection.reply(200, {"object": "list", "model": connection.server.alias, "data": data})
        if reset_after_headers:
            connection.head(200, "Content-Type: application/json", "Content-Length: 1000")
            connection.reset()
        if self.cut in ("", "no_done"):
            return connection.reply(200, self.form.whole())
        connection.reply(200, self.form.whole(), missing=100)
        if self.cut == "rst":
            connection.reset()
        raise Gone

    def send_stream(self, reset_after_headers: bool) -> None:
        connection, form = self.connection, self.form
        framing = "Content-Length: 9999999" if self.cut == "short_cl" else "Transfer-Encoding: chunked"
        connection.head(200, "X-Accel-Buffering: no", "Content-Type: text/event-stream", framing)
        if reset_after_headers:
            connection.reset()
        if first := form.first():
            self.chunk(first)
        for index in range(self.tokens):
            if index == self.error_after:
                self.chunk(form.error({"code": 500, "message": "fake failure", "type": "server_error"}))
                return self.chunk(b"")
            self.token(index)
            if self.pings:
                self.chunk(b":\n\n")
            self.chunk(form.token(index))
        if self.die_after == self.tokens:
            self.token(self.tokens)
        for event in form.called():
            self.chunk(event)
        self.finish()

    def finish(self) -> None:
        """The end of a stream: its last events, and the end of the body; or one of the truncations."""
        if self.cut == "rst":
            self.connection.reset()
        if self.cut == "fin_mid_event":
            self.chunk(self.form.last()[:20])
        elif self.cut not in ("chunked_no_end", "short_cl"):
            self.chunk(self.form.last())
            for event in self.form.counts():
                self.chunk(event)
            if self.cut != "no_done" and self.form.done:
                self.chunk(self.form.done)
            return self.chunk(b"")
        raise Gone

    def chunk(self, data: bytes) -> None:
        wire = data if self.cut == "short_cl" else b"%x\r\n%b\r\n" % (len(data), data)
        whole, part = self.cut_at
        if self.chunks == whole:
            self.connection.sock.sendall(wire[:part])
            if self.cut_by == "reset":
                self.connection.reset()
            if self.cut_by == "end":
                self.connection.sock.sendall(b"0\r\n\r\n")
            raise Gone
        self.chunks += 1
        self.connection.sock.sendall(wire)


def option(long: str, short: str, default: str) -> str:
    """The value of the last of these flags on the command line."""
    places = [index for index, word in enumerate(sys.argv) if word in (long, short)]
    return sys.argv[places[-1] + 1] if places else default


def wait_for_term(server: Server) -> None:
    """Return at the signal that ends the process."""
    asked = 0
    while True:
        if signal.sigtimedwait([signal.SIGTERM, signal.SIGINT], 0.01 if asked else 1e6) is not None:
            log("stop", ignored="FAKE_IGNORE_TERM" in ENV)
            asked += "FAKE_IGNORE_TERM" not in ENV
        if asked > 1:
            os._exit(1)
        if asked and not server.streams:
            os._exit(0)


def main() -> None:
    log("start", argv=sys.argv[1:], owner=ENV.get("LSP_OWNER"))
    if how := ENV.get("FAKE_FORK"):
        fork_grandchild(how)
    if (how := ENV.get("FAKE_EXIT", "")) and "@" not in how and manner("EXIT"):
        die(how)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    if rate := ENV.get("FAKE_SPAM"):
        threading.Thread(target=spam, args=(rate,), daemon=True).start()
    server = Server()
    if ENV.get("FAKE_NEVER") != "nobind":
        server.listen(option("--host", "", "127.0.0.1"), int(option("--port", "", "8080")))
        threading.Thread(target=server.load, daemon=True).start()
    wait_for_term(server)
