"""Fake Ollama servers for tests: started, talked to, looked into."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.backends.ollama.model import OllamaModel
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.config import ModelConfig, OllamaConfig
from tests.support import raw_client
from tests.support.harness import companions, environment, logged, until
from tests.support.pools import open_fds, own_tasks, warm_up


@dataclass
class FakeOllama:
    """A running fake (`tests.fakes.ollama`)."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def set(self, **manners: Any) -> None:
        """Change its manners from now on."""
        answer = await raw_client.post(self.port, "/fake", manners)
        assert answer.status == 200

    def events(self, kind: str, path: str | None = None) -> list[dict[str, Any]]:
        """What it wrote down, oldest first: all events of one kind, or only those of requests for `path`."""
        return [event for event in logged(self.log) if event["event"] == kind and path in (None, event.get("path"))]

    async def kill(self) -> None:
        """End it; its port refuses connections from then on."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)


@asynccontextmanager
async def running_ollama(
    *models: str, port: int = 0, golden: Path | None = None, **manners: Any
) -> AsyncIterator[FakeOllama]:
    """A fake Ollama that has these models; for `manners` see the fake. It ends with the context."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "events"
        argv = ["--port", str(port), "--log", str(log), "--models", ",".join(models), "--manners", json.dumps(manners)]
        fake = _launch([*argv, *(["--golden", str(golden)] if golden is not None else [])], log)
        companions.add(fake.process.pid)
        try:
            assert fake.process.stdout is not None
            fake.port = int(await asyncio.to_thread(fake.process.stdout.readline))
            yield fake
        finally:
            await fake.kill()
            fake.process.communicate()
            companions.discard(fake.process.pid)


def _launch(args: list[str], log: Path) -> FakeOllama:
    argv = [sys.executable, "-S", "-m", "tests.fakes.ollama", *args]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment())
    return FakeOllama(process, 0, log)


@contextmanager
def black_hole() -> Iterator[int]:
    """A port to which connections are neither made nor refused, as of a machine that is switched off."""
    with closing(socket.socket()) as listener, closing(socket.socket()) as first, closing(socket.socket()) as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for sock in (first, second):  # these fill its queue
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@asynccontextmanager
async def opened(
    *ports: int, configured: dict[str, Any] | None = None, listing_timeout_s: float = 30.0, **settings: Any
) -> AsyncIterator[Hosts]:
    """The Ollama hosts at these ports; `settings` are fields of its section, `configured` are models by name. Hosts
    may take their time for a list, as a fake on a busy machine does. On leaving it is closed, and must have left no
    task and no socket."""
    await warm_up()
    tasks, fds = own_tasks(), open_fds()
    hosts = [f"127.0.0.1:{port}" for port in ports]
    config = OllamaConfig.model_validate({"host": hosts, **settings})
    own = {
        name: ModelConfig.model_validate({"backend": "ollama", **fields}) for name, fields in (configured or {}).items()
    }
    downloads = Downloads()
    upstream = Hosts(config, downloads, own)
    patient(upstream, listing_timeout_s)
    upstream.start()
    try:
        yield upstream
    finally:
        await downloads.close()
        await upstream.close()
    await until(lambda: own_tasks() <= tasks, what="the end of all tasks")
    await until(lambda: open_fds() <= fds, what="the closing of all sockets")


def patient(upstream: Hosts, seconds: float) -> None:
    """Have it wait so long for each list of a host."""
    for host in upstream.hosts:
        for listing in host._listings:
            listing._timeout_s = seconds


async def unwatched(upstream: Hosts) -> None:
    """Have it hear now that nothing is loaded, and not look again unless it is told to: when it does is left to chance,
    and what it hears then is the least that it asks for."""
    await upstream.listed()
    await upstream.refresh_loaded()
    for host in upstream.hosts:
        host._ps_listing._max_age_s = math.inf


def chat(model: str, *, num_ctx: int | None = None, stream: bool = False) -> UpstreamRequest:
    """A chat as a request of ours, of a model that was prepared for that size."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    if num_ctx is not None:
        body["options"] = {"num_ctx": num_ctx}
    return UpstreamRequest("POST", "/api/chat", json.dumps(body).encode(), prepared=num_ctx)


def sized(model: OllamaModel, asked: int | None) -> int | None:
    """The context size to send for a client that asks for so much."""
    return model.prepare({} if asked is None else {"options": {"num_ctx": asked}})


async def ask(backend: Model | Management, call: UpstreamRequest) -> tuple[int, Any]:
    """Status and JSON of the answer to `call`."""
    async with backend.open(call) as response:
        return response.status, json.loads(await response.read(2**20) or b"null")


def asked_of(*fakes: FakeOllama) -> list[int]:
    """How many chats each of them was sent."""
    return [len(fake.events("request", "/api/chat")) for fake in fakes]
