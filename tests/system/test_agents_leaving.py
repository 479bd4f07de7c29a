"""A client that leaves, whenever: what its request began ends, and the model is free."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import raw_client
from tests.support.agent_clients import Way, write_agent
from tests.support.e2e_support import CHAT, Fakes, idle
from tests.support.harness import Proxy, session_proxy, until

STREAM, WHOLE = Way(CHAT, stream=True), Way(CHAT, stream=False)
NOTES = '''
from pathlib import Path
NOTES = Path({path!r})

class Noted:
    """Around what an agent does: writes down when it begins and when it has ended."""
    def __init__(self, what: str) -> None:
        self.what = what
    def __enter__(self) -> None:
        with NOTES.open("a") as file:
            file.write(f"begun {{self.what}}\\n")
    def __exit__(self, *exc: object) -> None:
        with NOTES.open("a") as file:
            file.write(f"ended {{self.what}}\\n")

async def for_ever(what: str) -> None:
    with Noted(what):
        await asyncio.Event().wait()
'''
PHASES = {
    "asked": '''
class Asked(Agent):
    """Waits before the model is asked."""
    command = "asked"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        await for_ever("asked")
''',
    "answering": '''
class Answering(Agent):
    """Answers for ever."""
    command = "answering"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return self.answer()
    async def answer(self) -> AsyncIterator[Chunk]:
        with Noted("answering"):
            while True:
                yield Chunk.of("x")
                await asyncio.sleep(0.01)
''',
    "flooding": '''
class Flooding(Agent):
    """Answers as fast as it can."""
    command = "flooding"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return self.answer()
    async def answer(self) -> AsyncIterator[Chunk]:
        with Noted("flooding"):
            while True:
                yield Chunk.of("x")
                await asyncio.sleep(0)
''',
    "holding": '''
class Holding(Agent):
    """Holds everything back."""
    command = "holding"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        with Noted("holding"):
            held = [chunk async for chunk in stream]
            for chunk in held:
                yield chunk
''',
    "passing": '''
class Passing(Agent):
    """Passes on what comes."""
    command = "passing"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        with Noted("passing"):
            async for chunk in stream:
                yield chunk
''',
    "pumping": '''
class Pumping(Agent):
    """Has a task read the answer."""
    command = "pumping"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        queue: asyncio.Queue[Chunk] = asyncio.Queue()
        async def pump() -> None:
            with Noted("pumping"):
                async for chunk in stream:
                    await queue.put(chunk)
        self.kept = asyncio.create_task(pump())
        while True:
            yield await queue.get()
''',
    "stubborn": '''
class Stubborn(Agent):
    """Does not care to be told once that it is over."""
    command = "stubborn"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        if chunk.text:
            with Noted("stubborn"):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    await asyncio.Event().wait()
        return chunk
''',
    "tasks": '''
class Tasks(Agent):
    """Starts tasks in every way, and forgets them."""
    command = "tasks"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        self.kept = asyncio.create_task(for_ever("tasks"))
        asyncio.ensure_future(for_ever("tasks"))
        asyncio.get_running_loop().create_task(self.group())
        return None
    async def group(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(for_ever("tasks"))
            await asyncio.gather(for_ever("tasks"), for_ever("tasks"))
''',
}
"""Agents, by what they are doing when the client leaves."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("leaving"))
    notes = NOTES.format(path=str(fakes.folder / "notes"))
    for name, source in PHASES.items():
        write_agent(fakes.folder / "agents", name, notes + source)
    models = {"m": fakes.model(fields={"parallel": 4}, TOKENS=100_000, TOKEN_MS=5), "brief": fakes.model(TOKENS=2)}
    config = fakes.config(models, keep_alive=-1)
    with session_proxy(config | {"agents_dirs": [str(fakes.folder / "agents")], "agents": list(PHASES)}) as proxy:
        yield proxy, fakes


def notes(fakes: Fakes, word: str, phase: str) -> int:
    file = fakes.folder / "notes"
    return file.read_text().splitlines().count(f"{word} {phase}") if file.exists() else 0


@pytest.mark.parametrize("way", [STREAM, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", PHASES)
async def test_everything_ends_with_the_client(stage: tuple[Proxy, Fakes], phase: str, way: Way) -> None:
    proxy, fakes = stage
    begun, closed = notes(fakes, "begun", phase), len(fakes.events("closed"))
    asks_model = phase not in ("asked", "answering", "flooding")
    requests = len(fakes.generated())
    expected = 5 if phase == "tasks" else 1
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, way.body(f"/{phase} hi")))
        await until(lambda: notes(fakes, "begun", phase) == begun + expected)
        if asks_model:
            await until(lambda: len(fakes.generated()) == requests + 1)
        client.leave()
    await until(lambda: notes(fakes, "ended", phase) == begun + expected, what="the end of what the agent did")
    if asks_model:
        await until(lambda: len(fakes.events("closed")) == closed + 1, what="the end of the model's answer")
    await until(lambda: idle(proxy))


async def test_clients_that_leave_in_the_middle_of_a_flood_are_no_bug_to_be_told(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    for _ in range(30):
        async with raw_client.connected(proxy.port) as client:
            await client.send(raw_client.request("POST", CHAT, STREAM.body("/flooding hi")))
            await client.head()
            client.leave()
        await until(lambda: idle(proxy))
    proxy.check_log()


async def test_what_an_agent_left_running_ends_with_the_answer(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    begun = notes(fakes, "begun", "tasks")
    said = await STREAM.ask(proxy, STREAM.body("/tasks hi", model="brief"))
    assert (said.text, said.error) == ("t0 t1 ", None)
    await until(lambda: notes(fakes, "begun", "tasks") == notes(fakes, "ended", "tasks") == begun + 5)


async def test_a_shutdown_ends_agents_too(stage: tuple[Proxy, Fakes], tmp_path_factory: pytest.TempPathFactory) -> None:
    _, fakes = stage
    config = fakes.config({"m": fakes.model(TOKENS=2)}) | {"server": {"drain_s": 0.1}}
    config |= {"agents_dirs": [str(fakes.folder / "agents")], "agents": list(PHASES)}
    begun = notes(fakes, "begun", "asked")
    with session_proxy(config) as proxy:
        async with raw_client.connected(proxy.port) as client:
            await client.send(raw_client.request("POST", CHAT, STREAM.body("/asked hi")))
            await until(lambda: notes(fakes, "begun", "asked") == begun + 1)
            proxy.process.terminate()
            await until(lambda: not proxy.alive, what="the end of the proxy")
        proxy._expected_end = True
    assert notes(fakes, "ended", "asked") == begun + 1
