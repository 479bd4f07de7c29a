"""One agent's trouble is its own: it raises, hangs, floods or breaks things, and everybody else is served."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import Iterator

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Said, Way, proxy_with_agents, write_agent
from tests.support.e2e_support import CHAT, Fakes, fakes, idle
from tests.support.harness import Proxy, session_proxy, until

__all__ = ["fakes"]
STREAM, WHOLE = Way(CHAT, stream=True), Way(CHAT, stream=False)
PLAIN = "t0 t1 t2 t3 "

BAD = {
    "request": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            request.messages.clear()
            raise KeyError("messages")
    """,
    "exits": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            raise SystemExit(3)
    """,
    "chunk": """
        async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
            if "t2" in chunk.text:
                raise ValueError("t2")
            return chunk
    """,
    "response": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                if "t2" in chunk.text:
                    raise RuntimeError("t2")
                yield chunk
    """,
    "cancelled": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                if "t2" in chunk.text:
                    raise asyncio.CancelledError
                yield chunk
    """,
    "last": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                yield chunk
            raise StopAsyncIteration
    """,
    "shape": """
        async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
            if "t2" in chunk.text:
                return Chunk({"choices": [7]})
            return chunk
    """,
    "text": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                yield chunk.text if "t2" in chunk.text else chunk
    """,
    "hangs": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            await asyncio.Event().wait()
    """,
    "stubborn": """
        async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
            if "t2" in chunk.text:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    await asyncio.Event().wait()
            return chunk
    """,
    "stuck": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                if "t2" in chunk.text:
                    await asyncio.Event().wait()
                yield chunk
    """,
    "floods": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                while "t2" in chunk.text:
                    yield Chunk.of("x" * 1000)
                yield chunk
    """,
    "repeats": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                yield chunk
                while "t1" in chunk.text:
                    yield chunk
    """,
    "swells": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                if "t2" in chunk.text:
                    yield Chunk.of("x" * 10_000_000)
                yield chunk
    """,
    "calls": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            function = {"name": "f", "arguments": "x" * 50_000}
            delta = {"tool_calls": [{"index": 0, "id": "1", "type": "function", "function": function}]}
            async for chunk in stream:
                while "t2" in chunk.text:
                    yield Chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                yield chunk
    """,
    "disguises": """
        async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
            if "t2" in chunk.text:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise ValueError("interrupted") from None
            return chunk
    """,
    "resigns": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                if "t2" in chunk.text:
                    try:
                        await asyncio.Event().wait()
                    except asyncio.CancelledError:
                        return
                yield chunk
    """,
    "pumps": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            queue: asyncio.Queue[Chunk] = asyncio.Queue(1)
            async def pump() -> None:
                async for chunk in stream:
                    await queue.put(chunk)
            self.task = asyncio.create_task(pump())
            while "t2" not in (chunk := await queue.get()).text:
                yield chunk
            raise ValueError("t2")
    """,
}
"""What each of them does wrong, nearly always at the third token."""
BEFORE = {"request", "exits", "hangs"}
"""Those that fail before there is an answer."""
HANG = {"hangs", "stubborn", "stuck", "disguises", "resigns"}
ENDLESS = {"floods", "repeats", "calls"}
FINAL = ENDLESS
"""Those without which the answer cannot go on: part of it is told already."""
OTHERS = {
    "probe": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            return say(str(len(asyncio.all_tasks())))
    """,
    "picky": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            raise BadRequest("that is too much to ask", status=413)
    """,
    "early": """
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                yield chunk
                if "t1" in chunk.text:
                    return
    """,
    "untidy": """
        class Config(Options):
            hang: bool = False
        per_call = frozenset({"hang"})
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            try:
                async for chunk in stream:
                    yield chunk
            finally:
                if ctx.config.hang:
                    await asyncio.Event().wait()
                raise OSError("disk full")
    """,
    "mirror": """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            url = f"http://{ctx.headers['x-where']}/v1/chat/completions"
            headers = {**ctx.forward_headers, "X-Agents": "mirror", "X-Where": ctx.headers["x-where"]}
            async with aiohttp.ClientSession() as session:
                async with session.post(url, json={**request.body, "stream": False}, headers=headers) as answer:
                    return say(f"{answer.status} < {await answer.text()}")
    """,
}
DEAF = """
        async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
            if "now" in request.last_user_text:
                await self.nothing()
        async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
            async for chunk in stream:
                yield chunk
                if "t1" in chunk.text:
                    await self.nothing()
        async def nothing(self) -> None:
            while True:
                try:
                    await asyncio.Event().wait()
                except BaseException as exc:
                    if isinstance(exc, GeneratorExit):
                        raise
"""
"""Goes on whatever it is told."""
WILD = {
    "empty": "request.messages.clear()",
    "number": "request.body['model'] = 7",
    "nothing": "request.body = None",
    "object": "request.body['x'] = object()",
    "strings": "request.body['messages'] = ['hi']",
    "gone": "request.model = 'nobody'",
    "later": "self.kept = request.body; asyncio.get_running_loop().call_later(0, request.body.clear)",
}
"""What some do to a request."""
ON_REQUEST = "async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:\n    "


def agent(name: str, body: str) -> str:
    source = textwrap.indent(textwrap.dedent(body), "    ")
    imports = "import aiohttp\nfrom llama_smart_proxy import BadRequest\n"
    return f'{imports}class {name.title()}(Agent):\n    """Does something wrong."""\n    command = "{name}"\n{source}'


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("isolation"))
    bodies = {**BAD, **OTHERS, **{name: ON_REQUEST + body for name, body in WILD.items()}}
    for name, body in bodies.items():
        write_agent(fakes.folder / "agents", name, agent(name, body))
    models = {"m": fakes.model(fields={"parallel": 16}, TOKENS=4)}
    models |= {
        f"skip-{name}": {"model": "m", "agents": [{name: {"on_error": "skip", "timeout_s": 0.6}}]} for name in BAD
    }
    config = fakes.config(models, keep_alive=-1) | {"agents_dirs": [str(fakes.folder / "agents")]}
    config["agents"] = [{name: {"timeout_s": 0.6}} if name in HANG else name for name in bodies]
    with session_proxy(config | {"agent_limits": {"output_kib": 64}}) as proxy:
        yield proxy, fakes
        proxy._log.clear()  # full of tracebacks, as it should be


async def tasks(proxy: Proxy) -> int:
    """How many tasks the proxy has while it does nothing else."""
    return int((await WHOLE.ask(proxy, WHOLE.body("/probe hi"))).text)


async def in_every_way(proxy: Proxy, text: str, **fields: str) -> list[tuple[Way, Said]]:
    """What each API's client is told, all at once."""
    said = await asyncio.gather(*(way.ask(proxy, way.body(text, **fields)) for way in WAYS))
    return list(zip(WAYS, said, strict=True))


@pytest.mark.parametrize("name", BAD)
async def test_a_failure_is_a_proper_error_in_every_api(stage: tuple[Proxy, Fakes], name: str) -> None:
    proxy, _ = stage
    await WHOLE.ask(proxy, WHOLE.body("hi"))  # the model's process has a task of its own
    before = await tasks(proxy)
    for way, said in await in_every_way(proxy, f"/{name} hi"):
        assert (said.error or "").startswith(f"agent {name} "), way
        if name in BEFORE or not way.stream:
            assert said.status == (504 if name in HANG else 500), way
        else:
            assert said.status == 200 and said.text.startswith("t0 t1 "), way

    async def nothing_left() -> bool:
        return await tasks(proxy) <= before

    await until(nothing_left, what="the end of all that was begun")


@pytest.mark.parametrize("name", [name for name in BAD if name not in FINAL])
async def test_a_failure_may_be_skipped(stage: tuple[Proxy, Fakes], name: str) -> None:
    proxy, fakes = stage
    for way, said in await in_every_way(proxy, "hi", model=f"skip-{name}"):
        assert (said.text, said.error) == (PLAIN, None), way
        assert said.finish in ("stop", "end_turn")
    body = json.loads([event for event in fakes.events("request") if event["path"] == CHAT][-1]["body"])
    assert body["messages"] == [{"role": "user", "content": "hi"}], "what it did to the request is undone"


async def test_others_are_served_while_one_floods(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(STREAM.ask(proxy, STREAM.body("/floods hi")))
        others = [group.create_task(STREAM.ask(proxy, STREAM.body("hi"))) for _ in range(8)]
    assert {other.result().text for other in others} == {PLAIN}
    listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
    assert listed["floods"]["errors"] >= 4 and listed["probe"]["errors"] == 0


async def test_an_error_of_the_agents_own_words_is_told_as_it_is(stage: tuple[Proxy, Fakes]) -> None:
    for way, said in await in_every_way(stage[0], "/picky hi"):
        assert (said.status, said.error) == (413, "that is too much to ask"), way


async def test_what_fails_while_it_cleans_up_spoils_no_answer(stage: tuple[Proxy, Fakes]) -> None:
    for options in ("", "hang=yes "):
        for way, said in await in_every_way(stage[0], f"/early /untidy {options}hi"):
            assert (said.text, said.error) == ("t0 t1 ", None) and said.finish in ("stop", "end_turn"), way


async def test_what_never_ends_is_given_up(fakes: Fakes) -> None:
    """Whatever it holds is free again; and the proxy can be stopped, as it is checked at the end."""
    entries = [{"deaf": {"timeout_s": 0.6}}, "clumsy"]
    clumsy = "async def close(self) -> None:\n    raise OSError('disk full')"
    sources = {"deaf": agent("deaf", DEAF), "clumsy": agent("clumsy", clumsy)}
    async with proxy_with_agents(fakes, sources, entries, clean_log=False) as proxy:
        whole = [way for way in WAYS if not way.stream]
        asked = [way.ask(proxy, way.body(f"/deaf {text}")) for way in whole for text in ("now", "hi")]
        for said in await asyncio.gather(*asked):
            assert (said.status, said.error) == (504, "agent deaf does not end when it is cancelled")
        await until(lambda: idle(proxy))
        assert (await STREAM.ask(proxy, STREAM.body("hi"))).error is None


UNUSABLE = {
    "syntax": ("class Broken(Agent)\n    pass", "SyntaxError: expected ':' (line"),
    "module": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "raises": ("raise RuntimeError('not today')", "RuntimeError: not today (line"),
    "exits": ("raise SystemExit", "SystemExit"),
    "closes": ("raise GeneratorExit", "GeneratorExit"),
    **{
        f"init_{kind.lower()}": (f"class A(Agent):\n    def __init__(self, config):\n        raise {kind}", f"{kind}: ")
        for kind in ("SystemExit", "GeneratorExit", "KeyboardInterrupt")
    },
    "nothing": ("x = 1", "contains no class derived from Agent"),
    "two": ("class A(Agent): pass\nclass B(Agent): pass", "contains several agents (A, B); keep one"),
    "hook": (
        "class A(Agent):\n    async def on_response(self, stream, ctx):\n        return stream",
        "on_response must",
    ),
    "sync": ("class A(Agent):\n    def on_request(self, request, ctx):\n        pass", "on_request must be an `async"),
    "command": ("class A(Agent):\n    command = 'A B'", "its command 'A B' must match"),
    "field": ("class A(Agent):\n    class Config(Options):\n        always: bool = True", "fields called always"),
    "percall": (
        "class A(Agent):\n    per_call = frozenset({'x'})",
        "names that Config does not have: x",
    ),
    "init": ("class A(Agent):\n    def __init__(self, config):\n        raise ValueError('no')", "ValueError: no"),
    "gone": (
        "import asyncio\nclass A(Agent):\n    async def start(self):\n        raise asyncio.CancelledError",
        "start:",
    ),
    "start": (
        "class A(Agent):\n    async def start(self):\n        raise OSError('no table')",
        "start: OSError: no table",
    ),
}
"""Files that hold no agent that could be used, and what is told of each."""


async def test_what_cannot_be_used_is_told_and_the_rest_serve(fakes: Fakes) -> None:
    sources = {name: source for name, (source, _) in UNUSABLE.items()}
    async with proxy_with_agents(fakes, sources, [*UNUSABLE, "example"]) as proxy:
        listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        for name, (_, words) in UNUSABLE.items():
            assert listed[name]["status"] == "failed" and words in listed[name]["error"], name
        health = await proxy.health()
        assert (health["status"], set(health["agents"]["failed"])) == ("degraded", set(UNUSABLE))
        assert (await WHOLE.ask(proxy, WHOLE.body("/example hi"))).text.startswith("# t0")


async def test_what_an_agent_does_to_a_request_is_that_requests_trouble(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    for name in WILD:
        for way, said in await in_every_way(proxy, f"/{name} hi"):
            status = {"gone": 404, "later": 200}.get(name, 500)
            if name == "empty" and way.path == "/v1/completions":
                status = 200  # there are none to take away
            assert said.status == status, (name, way, said)
            if status == 500:
                assert f"agent {name} " in (said.error or ""), (name, way)
    assert {said.text for _, said in await in_every_way(proxy, "hi")} == {PLAIN}


async def test_agents_that_call_agents_are_stopped(stage: tuple[Proxy, Fakes]) -> None:
    """By HTTP, with the headers that the context gives for it."""
    proxy, fakes = stage
    before = len(fakes.generated())
    said = await WHOLE.ask(proxy, WHOLE.body("/mirror hi"), [("X-Where", f"127.0.0.1:{proxy.port}")])
    assert said.text.startswith("200 < ") and "508 < " in said.text and "agents are calling agents" in said.text
    listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
    assert listed["mirror"]["calls"] == 3
    assert len(fakes.generated()) == before
