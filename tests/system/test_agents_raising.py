"""Whatever an agent raises, wherever: its client gets an error, its model is free again, and the proxy goes on."""

from __future__ import annotations

import json

import pytest

from tests.support.agent_clients import RESPONSES, Said, Way, proxy_with_agents
from tests.support.e2e_support import CHAT, Fakes, fakes, idle
from tests.support.harness import Proxy, until

__all__ = ["fakes"]  # fixtures
KINDS = (
    *("GeneratorExit", "StopIteration", "StopAsyncIteration", "KeyboardInterrupt", "SystemExit", "RecursionError"),
    *("MemoryError", "CancelledError", "TimeoutError", "ExceptionGroup", "BaseExceptionGroup", "ValueError", "Own"),
)
ENDING = ("GeneratorExit", "KeyboardInterrupt", "SystemExit", "CancelledError", "BaseExceptionGroup", "Own")
"""Those that are no `Exception`."""
RAISES = '''
class Own(BaseException):
    """Not one of Python's."""

def deeper(): return deeper()

def fail(what: str) -> None:
    if what == "RecursionError":
        deeper()
    if what == "CancelledError":
        raise asyncio.CancelledError
    if what == "Own":
        raise Own
    if what.endswith("Group"):
        raise BaseExceptionGroup("several", [ValueError() if what == "ExceptionGroup" else KeyboardInterrupt()])
    raise getattr(__builtins__, what, None) or __builtins__[what]

async def failing(what: str) -> None:
    await asyncio.sleep(0)
    fail(what)

async def failing_stream(what: str) -> ChunkStream:
    yield Chunk.of("made")
    fail(what)

def steps(what: str):
    yield
    fail(what)

class Raises(Agent):
    """Raises what and where it is told to."""
    command = "raises"
    per_call = frozenset({"at", "what"})
    class Config(Options):
        at: str = ""
        what: str = ""

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        match ctx.config.at:
            case "request":
                fail(ctx.config.what)
            case "task":
                await asyncio.create_task(failing(ctx.config.what))
            case "gathered":
                await asyncio.gather(failing(ctx.config.what), failing(ctx.config.what))
            case "thread":
                await asyncio.to_thread(fail, ctx.config.what)
            case "aside":
                await ctx.aside(steps(ctx.config.what))
            case "stray":
                await asyncio.wait({asyncio.create_task(failing(ctx.config.what))})
            case "answer":
                return failing_stream(ctx.config.what)
        return None

    def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        if ctx.config.at == "call":
            fail(ctx.config.what)
        return self.passed(stream, ctx)

    async def passed(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        if ctx.config.at == "before":
            fail(ctx.config.what)
        try:
            async for chunk in stream:
                if ctx.config.at == "midst" and "t3" in chunk.text:
                    fail(ctx.config.what)
                yield chunk
        finally:
            if ctx.config.at == "after":
                fail(ctx.config.what)

    async def on_reply(self, reply: Reply, ctx: Context) -> None:
        if ctx.config.at == "reply":
            fail(ctx.config.what)
'''
CALLS = (
    RAISES.partition("class Raises")[0]
    + '''
def plain(ctx: Context) -> str:
    """Runs in a thread."""
    fail(ctx.config.what)
    return "done"

async def awaited(ctx: Context) -> str:
    """Runs in the loop."""
    await failing(ctx.config.what)
    return "done"

class Calls(Agent):
    """Raises in functions that the model calls, and with a chunk."""
    command = "calls"
    per_call = frozenset({"what"})
    tools = (plain, awaited)
    class Config(Options):
        what: str = ""
'''
)
CHUNKS = (
    RAISES.partition("class Raises")[0]
    + '''
class Chunks(Agent):
    """Raises with a chunk."""
    command = "chunks"
    per_call = frozenset({"at", "what"})
    class Config(Options):
        at: str = ""
        what: str = ""

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        if ctx.config.at in chunk.text:
            fail(ctx.config.what)
        return chunk
'''
)
BEFORE = ("request", "task", "gathered", "thread", "aside", "call", "before")
WITHIN = ("midst", "after", "answer")
WAYS = [Way(path, stream) for path in (CHAT, "/v1/messages", "/api/chat", RESPONSES) for stream in (False, True)]
PLAIN, STREAM = Way(CHAT, stream=False), Way(CHAT, stream=True)


async def said(proxy: Proxy, way: Way, at: str, what: str, n: int = 1) -> Said:
    return await way.ask(proxy, way.body(f"/raises at={at} what={what} hi", max_tokens=8, n=n))


async def check_unharmed(proxy: Proxy) -> None:
    """The model is free again, and answers; nothing that is logged is a fault of the proxy."""
    await until(lambda: idle(proxy), what="the model that is free again")
    assert (await PLAIN.ask(proxy, PLAIN.body("hi", max_tokens=2))).status == 200
    assert "unhandled" not in proxy.log


async def test_whatever_an_agent_raises_in_a_hook_its_client_gets_an_error(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"raises": RAISES}, clean_log=False) as proxy:
        for what in KINDS:
            for way in WAYS if what == "GeneratorExit" else (PLAIN, STREAM):
                for at in (*BEFORE, *WITHIN):
                    if (at, what) == ("thread", "StopIteration"):
                        continue  # Python's own `to_thread` never returns then
                    answer = await said(proxy, way, at, what)
                    assert answer.error and "agent raises failed" in answer.error, (way, at, what, answer)
                    assert answer.status == (200 if way.stream and at in WITHIN else 500), (way, at, what, answer)
                for at in ("stray", "reply"):
                    answer = await said(proxy, way, at, what)
                    assert (answer.status, answer.error) == (200, None), (way, at, what, answer)
            answer = await said(proxy, PLAIN, "midst", what, n=2)
            assert answer.status == 500, (what, answer)
        await check_unharmed(proxy)


async def test_whatever_an_agent_raises_with_a_chunk_its_client_gets_an_error(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"chunks": CHUNKS}, clean_log=False) as proxy:
        for what in KINDS:
            for way in (PLAIN, STREAM):
                answer = await way.ask(proxy, way.body(f"/chunks at=t3 what={what} hi", max_tokens=8))
                assert answer.error and "agent chunks failed" in answer.error, (way, what, answer)
                assert answer.status == (200 if way.stream else 500), (way, what, answer)
        await check_unharmed(proxy)


async def test_what_ends_more_than_a_function_is_an_error_and_the_model_gets_all_else(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"calls": CALLS}, clean_log=False) as proxy:
        for what in KINDS:
            for name in ("plain", "awaited"):
                for way in (PLAIN, STREAM):
                    answer = await way.ask(proxy, way.steered(f"/calls what={what}", tool_call=[name, {}]))
                    told = [json.loads(event["body"])["messages"][-1] for event in fakes.events("request")[-1:]]
                    if what in ENDING:
                        assert answer.error and "agent calls failed" in answer.error, (way, name, what, answer)
                    else:
                        assert answer.error is None and told[0]["content"].startswith("error: "), (name, what, answer)
        await check_unharmed(proxy)


@pytest.mark.parametrize("at", [*BEFORE, "midst", "after"])
async def test_an_agent_that_may_be_skipped_is_skipped_whatever_it_raises(fakes: Fakes, at: str) -> None:
    entry = {"name": "raises", "on_error": "skip"}
    async with proxy_with_agents(fakes, {"raises": RAISES}, [entry], clean_log=False) as proxy:
        whole = await PLAIN.ask(proxy, PLAIN.body("hi", max_tokens=8))
        for what in KINDS:
            if (at, what) != ("thread", "StopIteration"):
                for way in (PLAIN, STREAM):
                    answer = await said(proxy, way, at, what)
                    assert (answer.status, answer.error, answer.text) == (200, None, whole.text), (way, what, answer)
        await check_unharmed(proxy)
