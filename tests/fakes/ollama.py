"""A stand-in for Ollama: its API, its reloads, and every bad manner we want to survive.

`python -m tests.fakes.ollama --port 0 --models a,b:1b [--log FILE] [--golden FOLDER] [--manners JSON]` prints the port
it listens on. Tests use `running_ollama()`. `POST /fake` with a JSON object changes manners while it runs:

    models            names it has, in place of those it had        unload     name of a model to unload now
    tokens=4 token_s=0    of an answer, and the pause before each   answer     text of an answer, in one piece
    thinking          text in front of the answer                   tool_call  [name, arguments] in its last line
    delay_s load_s    before the first byte of an answer; of a load
    hang=[]           paths that are never answered ("*": all)
    error             [status, text]: how it refuses to generate    error_after=n  an error line after n tokens
    die_after=n       resets the connection after n tokens          registry       names that can be pulled; null: all
    pull_steps=3 pull_step_s=0    progress lines of a pull          pull_error     an error line in the middle of one
    pull_dies         resets the connection in the middle of one
    default_ctx=4096 train_ctx=1048576    what it loads a model with if nobody asks, and at most
    account           who is signed in
    absent_ctx_counts     a request without num_ctx means default_ctx, as in older versions; else it fits any

A model is loaded anew for another `num_ctx`, also a smaller one. Events, a JSON object a line in the log: request
(method, path, headers, body), done, closed (the client left first), load and reload (model, ctx), unload, pull.
`--golden` replays transcripts: JSON files with `request` (method, path, body) and `response` (status, headers, and
`lines` or `body`). One is played for a request that has all fields of its body, at every level.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes.http_wire import Gone, Refused, Server, Wire, dumps, fits

Json = dict[str, Any]
MANNERS: Json = {
    **{"tokens": 4, "token_s": 0, "answer": None, "thinking": "", "tool_call": None, "delay_s": 0, "load_s": 0},
    **{"hang": [], "error": None, "error_after": -1, "die_after": -1, "registry": None},
    **{"pull_error": "", "pull_steps": 3, "pull_step_s": 0, "pull_dies": False, "default_ctx": 4096},
    **{"train_ctx": 1 << 20, "absent_ctx_counts": False, "account": None},
}
LOADING = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
_DURATION = re.compile(r"(-?[\d.]+)(ms|s|m|h)")


def key_of(name: str) -> str:
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e9):09d}Z"


def keep_s(value: object) -> float:
    if isinstance(value, str) and (found := _DURATION.fullmatch(value)):
        return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]
    seconds = float(value) if isinstance(value, int | float | str) else 300.0
    return seconds if seconds >= 0 else 1e9


def fold(lines: Iterator[Json]) -> Json:
    """What a client gets that did not ask for a stream: the last line, with the text of all."""
    whole: Json = {}
    texts: dict[str, str] = {}
    for line in lines:
        if "error" in line:
            raise Refused(500, line["error"])
        part = line.get("message", line)
        for key in texts.keys() | {"content", "response", "thinking"} & part.keys():
            texts[key] = texts.get(key, "") + part.get(key, "")
        whole = line
    whole.get("message", whole).update(texts)
    return whole


class State:
    """What the fake has: models and runners by the key of their name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.log_path: str | None = args.log
        self.manners = MANNERS | json.loads(args.manners)
        self.models: dict[str, Json] = {}
        self.runners: dict[str, Json] = {}
        self.blobs: set[str] = set()
        self.loading, self.writing = threading.Lock(), threading.Lock()
        files = sorted(Path(args.golden).glob("*.json")) if args.golden else []
        self.golden: list[Json] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        played = [(golden["request"].get("body") or {}).get("model") for golden in self.golden]
        for name in filter(None, (*args.models.split(","), *played)):
            self.add(name)

    def log(self, event: str, **fields: object) -> None:
        if self.log_path:
            line = json.dumps({"event": event, "time": time.monotonic(), **fields}) + "\n"
            with self.writing, open(self.log_path, "a", encoding="utf-8") as file:
                file.write(line)

    def change(self, changes: Json) -> None:
        if (names := changes.pop("models", None)) is not None:
            self.models.clear()
            for name in names:
                self.add(name)
        if (name := changes.pop("unload", None)) is not None:
            self.runners.pop(key_of(name), None)
        assert changes.keys() <= self.manners.keys(), "no such manner"
        self.manners.update(changes)

    def add(self, name: str) -> None:
        name = name if ":" in name.rpartition("/")[2] else name + ":latest"
        details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"]}
        details |= {"parameter_size": "134.52M", "quantization_level": "Q4_K_M"}
        digest = hashlib.sha256(name.encode()).hexdigest()
        item = {"name": name, "model": name, "modified_at": "2026-01-02T03:04:05.123456789+02:00", "size": 91739413}
        self.models.setdefault(key_of(name), {**item, "digest": digest, "details": details})

    def item(self, name: str) -> Json:
        if key_of(name) not in self.models:
            raise Refused(404, f"model '{name}' not found")
        return self.models[key_of(name)]

    def loaded(self) -> dict[str, Json]:
        now = time.time()
        self.runners = {key: runner for key, runner in self.runners.items() if runner["ends"] > now}
        return self.runners


class Handler(Wire):
    """One client connection, on a thread of its own."""

    state: State

    def do_POST(self) -> None:
        """Any method: read the request and answer it."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/fake":
            self.state.change(json.loads(body))
            return self.reply(200, {})
        text, headers = body.decode("utf-8", "replace"), {key.lower(): value for key, value in self.headers.items()}
        self.state.log("request", method=self.command, path=path, headers=headers, body=text)
        try:
            self.route(path.rstrip("/") or "/", body)
            self.state.log("done", path=path)
        except Refused as exc:
            status, message = exc.args
            self.reply(status, {"error": message})
        except (Gone, OSError):
            self.state.log("closed", path=path)
            self.close_connection = True

    do_GET = do_HEAD = do_DELETE = do_POST

    def route(self, path: str, raw: bytes) -> None:
        state = self.state
        if path in state.manners["hang"] or "*" in state.manners["hang"]:
            self.pause(1e6)
        if path.startswith("/api/blobs/"):
            return self.blob(path.removeprefix("/api/blobs/"))
        if self.command == "POST" and not raw and path != "/api/me":
            raise Refused(400, "missing request body")
        body: Json = json.loads(raw) if raw else {}
        if (golden := self.transcript(path, body)) is not None:
            return self.play(golden["response"])
        if path in LOADING:
            return self.generate(path, body)
        if path == "/":
            return self.send(200, b"Ollama is running", "text/plain; charset=utf-8")
        method = getattr(self, path.removeprefix("/").replace("/", "_"), None)
        if method is None or not path.startswith("/api/"):
            return self.send(404, b"404 page not found", "text/plain")
        method(body)

    # -- what there is ---------------------------------------------------------------------------------------------

    def api_version(self, body: Json) -> None:
        self.reply(200, {"version": "0.12.6"})

    def api_me(self, body: Json) -> None:
        if self.state.manners["account"] is None:
            return self.send(404, b"404 page not found", "text/plain")
        self.reply(200, self.state.manners["account"])

    def api_tags(self, body: Json) -> None:
        self.reply(200, {"models": list(self.state.models.values())})

    def api_ps(self, body: Json) -> None:
        models = []
        for key, runner in self.state.loaded().items():
            item = {k: v for k, v in self.state.models[key].items() if k != "modified_at"}
            size = min(runner["ctx"], self.state.manners["train_ctx"])
            models.append({**item, "expires_at": stamp(runner["ends"]), "size_vram": 0, "context_length": size})
        self.reply(200, {"models": models})

    def api_show(self, body: Json) -> None:
        item = self.state.item(body.get("model") or body.get("name") or "")
        info = {"general.architecture": "llama", "general.basename": item["name"], "llama.context_length": 2048}
        more = {"template": "{{ .Prompt }}", "parameters": "stop                           <|im_end|>"}
        details = {"details": item["details"], "modified_at": item["modified_at"], "modelfile": "FROM x"}
        self.reply(200, {**details, **more, "model_info": info, "capabilities": ["completion", "tools"]})

    def api_delete(self, body: Json) -> None:
        self.state.item(body.get("model") or body.get("name") or "")
        self.state.models.pop(key_of(body.get("model") or body["name"]))
        self.send(200, b"", "text/plain")

    def api_copy(self, body: Json) -> None:
        self.state.item(body["source"])
        self.state.add(body["destination"])
        self.send(200, b"", "text/plain")

    def api_create(self, body: Json) -> None:
        self.state.add(body["model"])
        self.stream(body, iter([{"status": "writing manifest"}, {"status": "success"}]))

    def api_push(self, body: Json) -> None:
        self.state.item(body["model"])
        self.stream(body, iter([{"status": "pushing manifest"}, {"status": "success"}]))

    def blob(self, digest: str) -> None:
        known = digest in self.state.blobs
        self.state.blobs |= {digest} if self.command == "POST" else set()
        self.send(200 if known else 201 if self.command == "POST" else 404, b"", "text/plain")

    def api_pull(self, body: Json) -> None:
        self.stream(body, self.pulling(body.get("model") or body.get("name") or ""))

    def pulling(self, name: str) -> Iterator[Json]:
        state, manners = self.state, self.state.manners
        state.log("pull", model=name)
        yield {"status": "pulling manifest"}
        if manners["registry"] is not None and key_of(name) not in map(key_of, manners["registry"]):
            yield {"error": "pull model manifest: file does not exist"}
            return
        for step in range(manners["pull_steps"]):
            self.pause(manners["pull_step_s"])
            if step == manners["pull_steps"] // 2 and manners["pull_dies"]:
                self.reset()
            if step == manners["pull_steps"] // 2 and manners["pull_error"]:
                yield {"error": manners["pull_error"]}
                return
            part = {"digest": "sha256:" + "0" * 64, "total": 1000, "completed": 1000 * step // manners["pull_steps"]}
            yield {"status": "pulling 000000000000", **part}
        yield {"status": "verifying sha256 digest"}
        state.add(name)
        yield {"status": "success"}

    # -- answers ---------------------------------------------------------------------------------------------------

    def generate(self, path: str, body: Json) -> None:
        manners, begun = self.state.manners, time.monotonic_ns()
        name = body.get("model", "")
        self.state.item(name)
        if body.get("keep_alive") in (0, "0") and not (body.get("messages") or body.get("prompt") or body.get("input")):
            self.state.runners.pop(key_of(name), None)
            self.state.log("unload", model=name)
            return self.reply(200, self.line(path, name, {}) | {"done": True, "done_reason": "unload"})
        with self.state.loading:
            runner = self.load(key_of(name), body)
        loaded = time.monotonic_ns()
        self.pause(manners["delay_s"])
        if manners["error"]:
            raise Refused(*manners["error"])
        runner["ends"] = time.time() + keep_s(body.get("keep_alive", "5m"))
        times = {"load_duration": loaded - begun, "prompt_eval_count": 5, "prompt_eval_duration": 1000}
        if path.startswith("/api/embed"):
            return self.embed(path, body, times, min(runner["ctx"], manners["train_ctx"]))
        if not (body.get("messages") or body.get("prompt")):
            return self.reply(200, self.line(path, name, {}) | {"done": True, "done_reason": "load"})
        self.stream(body, self.answer(path, name, times, begun))

    def load(self, key: str, body: Json) -> Json:
        """The runner of the model: the one there is if it fits, else another one."""
        manners, asked = self.state.manners, (body.get("options") or {}).get("num_ctx")
        size = manners["default_ctx"] if asked is None else asked
        runner = self.state.loaded().get(key)
        if runner is not None and (runner["ctx"] == size or (asked is None and not manners["absent_ctx_counts"])):
            return runner
        self.state.log("load" if runner is None else "reload", model=key, ctx=size)
        self.state.runners.pop(key, None)
        self.pause(manners["load_s"])
        self.state.runners[key] = runner = {"ctx": size, "ends": time.time() + 300}
        return runner

    def embed(self, path: str, body: Json, times: Json, size: int) -> None:
        """A token is a word; each text has two more."""
        if path == "/api/embeddings":
            return self.reply(200, {"embedding": [3.0, 4.0] if body.get("prompt") else []})
        inputs = [body["input"]] if isinstance(body.get("input"), str) else body.get("input") or []
        counts = [len(text.split()) + 2 for text in inputs]
        if body.get("truncate") is False and any(count > size for count in counts):
            raise Refused(400, "the input length exceeds the context length")
        times |= {"prompt_eval_count": sum(min(count, size) for count in counts), "total_duration": 1}
        self.reply(200, {"model": body["model"], "embeddings": [[0.6, 0.8] for _ in inputs]} | times)

    def line(self, path: str, name: str, part: Json) -> Json:
        whole = {"model": name, "created_at": stamp(time.time())}
        if path == "/api/chat":
            return {**whole, "message": {"role": "assistant", "content": "", **part}, "done": False}
        return {**whole, **{"response" if k == "content" else k: v for k, v in {"content": "", **part}.items()}}

    def answer(self, path: str, name: str, times: Json, begun: int) -> Iterator[Json]:
        manners = self.state.manners
        texts = [f"t{n} " for n in range(manners["tokens"])] if manners["answer"] is None else [manners["answer"]]
        if manners["thinking"]:
            yield self.line(path, name, {"thinking": manners["thinking"]})
        for count, text in enumerate([*texts, None]):
            if count == manners["error_after"]:
                yield {"error": "an error was encountered while running the model: unexpected EOF"}
                return
            if count == manners["die_after"]:
                self.reset()
            if text is not None:
                self.pause(manners["token_s"])
                yield self.line(path, name, {"content": text}) | {"done": False}
        last: Json = {}
        if manners["tool_call"]:
            called, arguments = manners["tool_call"]
            last["tool_calls"] = [{"id": "call_1", "function": {"index": 0, "name": called, "arguments": arguments}}]
        counts = {"eval_count": len(texts), "eval_duration": 1000, "total_duration": time.monotonic_ns() - begun}
        yield self.line(path, name, last) | {"done": True, "done_reason": "stop", **times, **counts}

    # -- the wire --------------------------------------------------------------------------------------------------

    def transcript(self, path: str, body: Json) -> Json | None:
        """The golden transcript for the request: of those whose fields it has, the one with most."""
        fitting = [
            golden
            for golden in self.state.golden
            if (golden["request"].get("method", "POST"), golden["request"]["path"]) == (self.command, path)
            and fits(golden["request"].get("body") or {}, body)
        ]
        return max(fitting, key=lambda golden: len(golden["request"].get("body") or {}), default=None)

    def stream(self, body: Json, lines: Iterator[Json]) -> None:
        """The lines as they come, or for `"stream": false` all in one object."""
        if body.get("stream") is False:
            return self.reply(200, fold(lines))
        first = next(lines)  # the status line waits for it
        self.begin(200, "application/x-ndjson")
        for value in itertools.chain([first], lines):
            self.chunk(dumps(value) + b"\n")
        self.chunk(b"")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    for name, default in (("models", ""), ("log", None), ("golden", None), ("manners", "{}")):
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    Handler.state = State(args)
    server = Server(("127.0.0.1", args.port), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
