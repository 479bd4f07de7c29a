"""Agents in tests, written as a stranger would write them: a file with a class and a line of configuration; and the
twelve ways in which clients ask for an answer."""

from __future__ import annotations

import json
import textwrap
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import raw_client
from tests.support.e2e_support import Fakes
from tests.support.harness import Proxy, running_proxy
from tests.support.raw_client import Answer

RESPONSES = "/v1/responses"
HEAD = """
from collections.abc import AsyncIterator
from typing import Any
import asyncio
from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Options, Reply, fold, say
"""
"""Put in front of every agent that a test writes."""


def write_agent(folder: Path, name: str, source: str) -> Path:
    """Write the agent `name` into `folder`: `source` is the class (and whatever else), without imports."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(HEAD + textwrap.dedent(source))
    return file


@asynccontextmanager
async def proxy_with_agents(
    fakes: Fakes,
    sources: Mapping[str, str],
    entries: Sequence[Any] | None = None,
    *,
    models: Mapping[str, Any] | None = None,
    clean_log: bool = True,
    args: Sequence[str] = (),
    **config: Any,
) -> AsyncIterator[Proxy]:
    """A proxy with the model `m` on the fake llama-server and these agents, by name. `entries` is what `agents:` says;
    by default the names. `config` are further top-level fields."""
    folder = fakes.folder / "agents"
    for name, source in sources.items():
        write_agent(folder, name, source)
    whole = fakes.config(models or {"m": fakes.model(fields={"parallel": 4})}, keep_alive=-1)
    whole |= {"agents_dirs": [str(folder)], "agents": list(sources) if entries is None else list(entries), **config}
    async with running_proxy(whole, clean_log=clean_log, args=args) as proxy:
        yield proxy


@dataclass(frozen=True)
class Said:
    """What a client was told; `error` are the words if it failed."""

    status: int
    text: str
    reasoning: str = ""
    finish: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Way:
    """One endpoint, streamed or not."""

    path: str
    stream: bool

    @property
    def name(self) -> str:
        return f"{self.path.removeprefix('/').replace('/', '-')}-{'stream' if self.stream else 'whole'}"

    def body(self, text: str, *, model: str = "m", **fields: Any) -> dict[str, Any]:
        """A request whose last, and only, user text is `text`."""
        body: dict[str, Any] = {"model": model, "stream": self.stream, **fields}
        if self.path in ("/v1/completions", "/api/generate"):
            return body | {"prompt": text}
        if self.path == RESPONSES:
            return body | {"input": text}
        return body | {"messages": [{"role": "user", "content": text}]} | self._needed()

    def steered(self, command: str = "", *, model: str = "m", **manners: Any) -> dict[str, Any]:
        """A request that begins with `command` and tells the fake llama-server how to answer."""
        if self.path == "/v1/completions":
            return self.body(f"{command} hi".lstrip(), model=model, fake=manners)
        return self.body(f"{command} {json.dumps({'fake': manners})}".lstrip(), model=model)

    async def ask(self, proxy: Proxy, body: dict[str, Any], headers: Iterable[tuple[str, str]] = ()) -> Said:
        """What the client is told. Fails if it is not properly framed; an Ollama client's error cuts the connection."""
        if not self.stream:
            return self.read(await raw_client.post(proxy.port, self.path, body, headers=headers))
        async with raw_client.connected(proxy.port) as client:
            await client.send(raw_client.request("POST", self.path, body, headers=headers))
            _, status, found = await client.head()
            names = dict(found)
            if names.get("transfer-encoding") != "chunked":
                length = int(names["content-length"])
                return self.read(Answer(status, found, await client.exactly(length)))
            return self.read_stream(*await _chunks(client))

    def read(self, answer: Answer) -> Said:
        """An answer that is one JSON object, or an error."""
        value = answer.json()
        if answer.status != 200:
            error = value.get("error", value)
            return Said(answer.status, "", error=error if isinstance(error, str) else error["message"])
        if self.path.startswith("/api/"):
            message = value.get("message") or {"content": value.get("response"), "thinking": value.get("thinking")}
            return Said(200, message["content"], message.get("thinking") or "", value["done_reason"])
        if self.path == "/v1/messages":
            texts = {kind: "" for kind in ("text", "thinking")}
            for block in value["content"]:
                texts[block["type"]] = texts.get(block["type"], "") + str(block.get(block["type"], ""))
            return Said(200, texts["text"], texts["thinking"], value["stop_reason"])
        if self.path == RESPONSES:
            return _read_response(value)
        choice = value["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        return Said(200, message.get("content") or "", message.get("reasoning_content") or "", choice["finish_reason"])

    def read_stream(self, data: bytes, intact: bool) -> Said:
        """A stream, every frame of which has to be whole."""
        if self.path.startswith("/api/"):
            return self._read_lines(data, intact)
        assert intact, data[-200:]
        *events, rest = data.split(b"\n\n")
        assert rest == b"", data[-200:]
        if self.path == RESPONSES:
            return _read_response(json.loads(events[-1].partition(b"\ndata: ")[2])["response"])
        return _read_messages(events) if self.path == "/v1/messages" else _read_openai(events)

    def _read_lines(self, data: bytes, intact: bool) -> Said:
        *lines, rest = data.split(b"\n")
        assert rest == b"", data[-200:]
        values = [json.loads(line) for line in lines if line]  # blank ones are a server's
        error = values.pop()["error"] if "error" in values[-1] else None
        assert intact is (error is None)
        told = [value.get("message") or {"content": value["response"], **value} for value in values]
        text, reasoning = ("".join(one.get(key) or "" for one in told) for key in ("content", "thinking"))
        if error is not None:
            return Said(200, text, reasoning, error=error)
        assert [value["done"] for value in values] == [False] * (len(values) - 1) + [True]
        return Said(200, text, reasoning, values[-1]["done_reason"])

    def _needed(self) -> dict[str, Any]:
        return {"max_tokens": 100} if self.path == "/v1/messages" else {}


WAYS = [
    Way(path, stream)
    for path in (*("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", RESPONSES),)
    for stream in (True, False)
]
"""The twelve ways to ask: six endpoints, streamed and not."""


async def _chunks(client: raw_client.RawClient) -> tuple[bytes, bool]:
    """The body of a chunked answer, and whether it ended properly."""
    pieces = []
    try:
        while piece := await client.chunk():
            pieces.append(piece)
    except (raw_client.BrokenAnswer, ConnectionError):
        return b"".join(pieces), False
    return b"".join(pieces), True


def _read_openai(events: list[bytes]) -> Said:
    assert events[-1] == b"data: [DONE]" and events.count(b"data: [DONE]") == 1, events
    values = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1] if not event.startswith(b":")]
    error = values.pop()["error"]["message"] if values and "error" in values[-1] else None
    choices = [value["choices"][0] for value in values if value["choices"]]
    deltas = [choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    if error is None:
        assert len(finishes) == 1, finishes
        assert choices[-1]["finish_reason"], "the end is the last thing that is said"
    text, reasoning = ("".join(delta.get(key) or "" for delta in deltas) for key in ("content", "reasoning_content"))
    return Said(200, text, reasoning, finishes[0] if finishes else None, error)


def _read_response(response: Any) -> Said:
    """The end of a response in the words of a chat."""
    parts = [part for item in response["output"] for part in item.get("content", ())]
    text, reasoning = (
        "".join(p["text"] for p in parts if p["type"] == f"{kind}_text") for kind in ("output", "reasoning")
    )
    if response["status"] == "failed":
        return Said(200, text, reasoning, error=response["error"]["message"])
    return Said(200, text, reasoning, {"completed": "stop", "incomplete": "length"}[response["status"]])


def _read_messages(events: list[bytes]) -> Said:
    pairs = [event.removeprefix(b"event: ").split(b"\ndata: ", 1) for event in events]
    values = [json.loads(data) for _, data in pairs]
    assert all(
        value.get("type", name.decode()) == name.decode() for (name, _), value in zip(pairs, values, strict=True)
    )
    error = values.pop() if pairs[-1][0] == b"error" else None
    assert error is not None or values[-1]["type"] == "message_stop"
    assert not values or values[0]["type"] == "message_start"
    texts = {"text": "", "thinking": ""}
    open_block: int | None = None
    finish = None
    for value in values:
        match value["type"]:
            case "content_block_start":
                assert open_block is None, "a block begins within another one"
                open_block = value["index"]
            case "content_block_stop":
                assert open_block == value["index"]
                open_block = None
            case "content_block_delta":
                # Clients put what belongs to a tool call where its index says, also when a text has come in between.
                assert open_block == value["index"] or "partial_json" in value["delta"], "text outside of its block"
                for kind in texts:
                    texts[kind] += value["delta"].get(kind) or ""
            case "message_delta":
                assert open_block is None
                finish = value["delta"]["stop_reason"]
    words = None if error is None else error.get("error", error)["message"]
    return Said(200, texts["text"], texts["thinking"], finish, words)
