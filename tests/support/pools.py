"""A pool in this very process, whose servers are the fake program, and what it must not leave behind."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
from pydantic import PrivateAttr

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.llamacpp.launcher import pool_model
from llama_smart_proxy.backends.pool.instance import Instance
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.config import Config, ModelConfig
from tests.fakes.llama_server import install
from tests.support import harness
from tests.support.harness import free_port, logged, ports, until

CHAT = "/v1/chat/completions"
QUICK = {"stop_timeout_s": 1.0, "load_timeout_s": 60.0, "queue_timeout_s": 60.0, "swap_after_s": 0.2}


class FakeModel(ModelConfig):
    """A model whose server is the fake program."""

    _program: str = PrivateAttr()  # no field: those are the configuration's

    def at(self, name: str) -> PoolModel:
        """It under a name, as the pool knows it."""
        return pool_model(name, self, self._program, helper=bool(self.helper))

    def run_by(self, program: Path) -> Self:
        """The same, served by the program that is there."""
        self._program = str(program)
        return self


@dataclass
class Fakes:
    """The fake program, a model file for it, and the events of all its processes."""

    folder: Path
    program: Path = field(init=False)
    gguf: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.program = install(self.folder)
        self.gguf = self.folder / "model.gguf"
        self.gguf.write_bytes(b"GGUF")
        self.log = self.folder / "events"

    def model(self, *, fake: Mapping[str, object] | None = None, **fields: Any) -> FakeModel:
        """A model; `fake` are its manners, without the `FAKE_` (see the fake program)."""
        manners = {f"FAKE_{name}": str(value) for name, value in (fake or {}).items()}
        env: dict[str, str | None] = {"FAKE_LOG": str(self.log), **manners}
        return FakeModel(path=self.gguf, env=env, **fields).run_by(self.program)

    def config(self, **server_pool: Any) -> Config:
        pool = QUICK | ports() | server_pool
        return Config.model_validate({"llama_cpp": {"server": str(self.program)}, "server_pool": pool})

    def events(self, kind: str, path: str | None = None) -> list[dict[str, Any]]:
        """What the fakes wrote down, oldest first: all events of one kind, or only those of requests for `path`."""
        return [event for event in logged(self.log) if event["event"] == kind and path in (None, event.get("path"))]

    @property
    def spawns(self) -> int:
        return len(self.events("start"))


def children() -> list[psutil.Process]:
    """Living children of this process, zombies too; not those of before the test, the proxies that other tests share,
    and theirs."""
    shared = set(harness.companions)
    for pid in harness.earlier | {proxy.pid for proxy in harness.proxies}:
        with suppress(psutil.NoSuchProcess):
            shared |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in shared]


def own_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {task for task in [asyncio.current_task()] if task is not None}


@asynccontextmanager
async def open_pool(config: Config) -> AsyncIterator[Pool]:
    """A started pool. On leaving it is closed, and must have left no process, task, or file descriptor."""
    await warm_up()
    before, tasks, fds = {child.pid for child in children()}, own_tasks(), open_fds()
    pool = Pool(config.server_pool)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close(drain_s=0)
    assert {child.pid for child in children()} <= before
    await until(lambda: own_tasks() <= tasks, what="the end of all tasks")
    await until(lambda: open_fds() <= fds, what="the closing of all files")


def open_fds() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


async def warm_up() -> None:
    """Have the event loop open what it opens with its first socket and keeps: libuv does that."""
    with suppress(OSError):
        await asyncio.open_connection("127.0.0.1", free_port())


async def chat(instance: Instance, **fake: object) -> bytes:
    """Have the fake generate an answer; `fake` steers it."""
    call = UpstreamRequest("POST", CHAT, json.dumps({"fake": fake}).encode())
    status, body = await instance.connections.fetch(call, timeout_s=60)
    assert status == 200, body
    instance.worked = True
    return body


@asynccontextmanager
async def leased(pool: Pool, name: str, model: FakeModel, *, slot: bool = True) -> AsyncIterator[Instance]:
    """The instance of a model, as a request holds it."""
    async with pool.lease(model.at(name), UpstreamRequest("POST", CHAT, slot=slot)) as lease:
        yield lease.instance


async def ask(pool: Pool, name: str, model: FakeModel, **fake: object) -> bytes:
    """One request as the proxy makes it."""
    async with leased(pool, name, model) as instance:
        return await chat(instance, **fake)


async def elapse(seconds: float) -> None:
    """Let so much time pass: to set things off at odd moments, never to wait for something."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.Event().wait()


class Census:
    """Counts living children every few milliseconds, while it is entered, but for those that there were before, such as
    programs that other tests share; `most` is the highest count."""

    def __init__(self) -> None:
        self.most = 0
        self._before = harness.direct_children()
        self._handle: asyncio.TimerHandle | None = None

    def _count(self) -> None:
        self.most = max(self.most, len(harness.direct_children() - self._before))
        self._handle = asyncio.get_running_loop().call_later(0.005, self._count)

    async def __aenter__(self) -> Census:
        self._count()
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._handle is not None
        self._handle.cancel()
