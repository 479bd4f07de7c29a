"""Questions that agents ask models: never waiting for themselves, within a budget, and over when the request is."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, proxy_with_agents, write_agent
from tests.support.e2e_support import CHAT, Fakes, fakes, idle, instance
from tests.support.harness import Proxy, session_proxy, until

__all__ = ["fakes"]
STREAM, WHOLE = Way(CHAT, stream=True), Way(CHAT, stream=False)
ASK = """
def about(text: str, model: str = "m", **fields: Any) -> ChatRequest:
    return ChatRequest({"model": model, "messages": [{"role": "user", "content": text}], **fields})

async def outcome(ctx: Context, request: ChatRequest) -> str:
    try:
        return (await ctx.complete(request)).text
    except Exception as exc:
        return f"{getattr(exc, 'code', type(exc).__name__)}"

async def vectors(ctx: Context, model: str) -> str:
    try:
        return str(await ctx.embed(["x"], model))
    except Exception as exc:
        return f"{getattr(exc, 'code', type(exc).__name__)}"
"""
AGENTS = {
    "first": '''
class First(Agent):
    """Asks before the model is asked."""
    command = "first"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        ctx.state["said"] = await outcome(ctx, request)  # the model of the request
        return None
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        yield Chunk.of(f"[{ctx.state['said']}]")
        async for chunk in stream:
            yield chunk
''',
    "during": '''
class During(Agent):
    """Asks while the model answers, and when it has."""
    command = "during"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        ctx.state["asked"] = about("x", request.model)
        return None
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        asked = False
        async for chunk in stream:
            yield chunk
            if chunk.text and not asked:
                asked = True
                yield Chunk.of(f"[{await outcome(ctx, ctx.state['asked'])}]")
        yield Chunk.of(f"[{await outcome(ctx, ctx.state['asked'])}]")
''',
    "waiting": '''
class Waiting(Agent):
    """Starts a question, and waits for it only when the answer has begun."""
    command = "waiting"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        ctx.state["asked"] = [asyncio.create_task(outcome(ctx, about("x"))) for _ in range(3)]
        ctx.state["asked"].append(asyncio.create_task(vectors(ctx, "m")))
        return None
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        async for chunk in stream:
            yield chunk
            for task in ctx.state["asked"] if "t0" in chunk.text else ():
                yield Chunk.of(f"[{await task}]")
''',
    "many": '''
class Many(Agent):
    """Asks a thousand questions at once."""
    command = "many"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        said = await asyncio.gather(*(outcome(ctx, about(str(n), request.model)) for n in range(1000)))
        return say(" ".join(f"{word}:{said.count(word)}" for word in sorted(set(said))))
''',
    "others": '''
class Others(Agent):
    """Asks whom there is, and whom there is not."""
    command = "others"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        both = await ctx.complete(about("x", n=2))
        said = [await outcome(ctx, about("x", model)) for model in ("nobody", "virtual", "broken")]
        told = [await vectors(ctx, model) for model in ("m", "nobody")]
        return say(f"{told} {both.texts} {said} {await ctx.fitting(['m', 'other', 'third'])}")
''',
    "stops": '''
class Stops(Agent):
    """Has heard enough after a word, and goes on."""
    command = "stops"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        stream = ctx.chat(about("x", fake={"tokens": 1000, "token_ms": 20}))
        async for chunk in stream:
            if chunk.text:
                break
        await stream.aclose()
        return None
''',
    "odd": '''
class Odd(Agent):
    """Asks in ways in which nobody can answer."""
    command = "odd"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        bodies: tuple[Any, ...] = (None, {"messages": []}, {"model": 7, "messages": []})
        said = [await outcome(ctx, ChatRequest(body)) for body in bodies]
        said.append(await outcome(ctx, about("x", more=object())))
        stream = ctx.chat(about("x"))
        await stream.aclose()
        return say(f"{said} {[chunk.text async for chunk in stream]}")
''',
    "cold": '''
class Cold(Agent):
    """Is the first to want a model."""
    command = "cold"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return say(f"{await vectors(ctx, 'third')} {await ctx.fitting(['third'])}")
''',
    "same": '''
class Same(Agent):
    """Asks twice, and changes what it asked in between."""
    command = "same"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        first = ctx.chat(request)
        request.last_user_text = "changed"
        await fold(first)
        return None
''',
}  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    """`m` has one slot; of three models two fit."""
    fakes = Fakes(tmp_path_factory.mktemp("side"))
    for name, source in AGENTS.items():
        write_agent(fakes.folder / "agents", name, ASK + source)
    models: dict[str, Any] = {name: fakes.model(fields={"parallel": 1}, TOKENS=2) for name in ("m", "other", "third")}
    models |= {"broken": fakes.model(EXIT=3), "virtual": {"model": "m", "agents": ["first"]}}
    models["wide"] = fakes.model(fields={"parallel": 4}, TOKENS=2, TOKEN_MS=5)
    models["slow"] = fakes.model(fields={"parallel": 4}, TOKENS=10_000, TOKEN_MS=20)
    config = fakes.config(models, keep_alive=-1, size=2)
    limits = {"side_calls": 20, "side_calls_at_once": 2}
    config |= {"agents_dirs": [str(fakes.folder / "agents")], "agents": list(AGENTS), "agent_limits": limits}
    with session_proxy(config) as proxy:
        yield proxy, fakes


async def test_before_the_answer_a_question_may_wait(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        said = await way.ask(stage[0], way.body("/first hi"))
        assert (said.text, said.error) == ("[t0 t1 ]t0 t1 ", None), way


async def test_while_the_answer_streams_it_gets_a_slot_at_once_or_none(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        said = await way.ask(stage[0], way.body("/during hi"))
        assert (said.text, said.error) == ("t0 [no_slot_now]t1 [t0 t1 ]", None), way


async def test_a_free_slot_is_there_to_be_had(stage: tuple[Proxy, Fakes]) -> None:
    said = await STREAM.ask(stage[0], STREAM.body("/during hi", model="wide"))
    assert said.text == "t0 [t0 t1 ]t1 [t0 t1 ]"


async def test_a_question_in_the_queue_gives_way_to_the_answer(stage: tuple[Proxy, Fakes]) -> None:
    said = await STREAM.ask(stage[0], STREAM.body("/waiting hi"))
    assert said.error is None, "it does not wait for itself"
    assert re.sub(r"\[(no_slot_now|t0 t1 |\[\[0.6, 0.8]])]", "", said.text) == "t0 t1 "
    assert said.text.count("[") == 4


async def test_a_budget_ends_a_fan_out(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(fakes.generated())
    said = await WHOLE.ask(proxy, WHOLE.body("/many hi"))
    assert said.text == "agent_budget:980 t0 t1 :20"
    assert len(fakes.generated()) - before == 20


async def test_no_more_than_so_many_are_asked_at_once(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(fakes.generated())
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, WHOLE.body("/many hi", model="slow")))
        await until(lambda: len(fakes.generated()) >= before + 2)
        slow = await instance(proxy, "slow")
        assert (slow["leases"], slow["queue"]) == (2, 0), "it has four slots, and twenty may be asked"
    await until(lambda: idle(proxy))


async def test_tokens_and_time_are_limited_too(fakes: Fakes) -> None:
    models = {"fast": fakes.model(TOKENS=50), "slow": fakes.model(TOKENS=8, TOKEN_MS=200)}
    limits = {"side_tokens": 9, "side_call_s": 1.2}
    async with proxy_with_agents(fakes, {"first": ASK + AGENTS["first"]}, models=models, agent_limits=limits) as proxy:
        for model, code in (("fast", "agent_budget"), ("slow", "side_call_timeout")):
            await WHOLE.ask(proxy, WHOLE.steered(model=model, tokens=1))  # loads it
            said = await STREAM.ask(proxy, STREAM.body("/first hi", model=model))
            assert said.text.startswith(f"[{code}]t0 "), said


async def test_models_of_all_kinds_can_be_asked(stage: tuple[Proxy, Fakes]) -> None:
    said = await WHOLE.ask(stage[0], WHOLE.body("/others hi"))
    assert said.text == (
        "['[[0.6, 0.8]]', 'model_not_found'] ['t0#0 t1#0 ', 't0#1 t1#1 '] "
        "['model_not_found', 't0 t1 ', 'model_load_failed'] "
        "[['m', 'other'], ['third']]"
    )


async def test_a_question_nobody_waits_for_any_more_frees_its_slot(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(fakes.events("closed"))
    said = await STREAM.ask(proxy, STREAM.body("/stops hi"))
    assert (said.text, said.error) == ("t0 t1 ", None), "there is but one slot"
    await until(lambda: len(fakes.events("closed")) == before + 1)


async def test_what_was_asked_is_not_changed_by_what_is_done_to_the_request(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    await WHOLE.ask(proxy, WHOLE.body("/same hi"))
    assert [body["messages"][-1]["content"] for body in fakes.generated()[-2:]] == ["hi", "changed"]


async def test_what_cannot_be_asked_is_told(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    said = await WHOLE.ask(proxy, WHOLE.body("/odd hi"))
    assert said.text == "['agent_failed', 'invalid_request', 'model_not_found', 'invalid_json'] []", said
    await until(lambda: proxy.log.count("agent odd: a side call failed") == 1, what="the line of the log")
    del proxy._log[:]  # has its traceback


async def test_a_model_that_was_loaded_for_one_stays(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    said = await WHOLE.ask(proxy, WHOLE.body("/cold hi"))
    assert said.text == "[[0.6, 0.8]] [['third']]"
    for model in ("third", "m"):
        assert (await WHOLE.ask(proxy, WHOLE.body("hi", model=model))).text == "t0 t1 "
    assert (await instance(proxy, "third"))["restarts"] == 0


@pytest.mark.parametrize("when", ["first", "during", "many"])
async def test_a_client_that_leaves_ends_them(stage: tuple[Proxy, Fakes], when: str) -> None:
    proxy, fakes = stage
    asked, closed = len(fakes.generated()), len(fakes.events("closed"))
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, STREAM.body(f"/{when} hi", model="slow")))
        expected = 1 if when == "first" else 2
        await until(lambda: len(fakes.generated()) == asked + expected)
        client.leave()
    await until(lambda: len(fakes.events("closed")) == closed + expected, what="the end of all of them")
    await until(lambda: idle(proxy))


async def test_depth_goes_on_to_the_next_proxy(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(fakes.generated())
    await WHOLE.ask(proxy, WHOLE.body("/first hi"), [("X-Agents-Depth", "1")])
    events = [event for event in fakes.events("request") if event["path"] == CHAT]
    depths = [{key.lower(): value for key, value in _headers(event)}.get("x-agents-depth") for event in events]
    assert depths[before:] == ["2", "1"], "the side call is one deeper than the request"
    said = await WHOLE.ask(proxy, WHOLE.body("/first hi"), [("X-Agents-Depth", "3")])
    assert said.status == 508


def _headers(event: dict[str, Any]) -> list[tuple[str, str]]:
    headers = event["headers"]
    return list(headers.items()) if isinstance(headers, dict) else [(key, value) for key, value in headers]


async def test_many_requests_with_side_calls_on_one_slot_all_end(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    texts = await asyncio.gather(*(STREAM.ask(proxy, STREAM.body(f"/{n} hi")) for n in ("first", "during") * 10))
    assert all(said.error is None and said.text.endswith(("t0 t1 ", "]")) for said in texts)
    assert json.dumps([said.finish for said in texts]).count("stop") == 20
