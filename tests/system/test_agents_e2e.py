"""Agents around real chats: the same edits in every API, streamed or not; and what is not touched passes as it came."""

from __future__ import annotations

import re

import pytest

from llama_smart_proxy.proxy.chat import Fold
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, proxy_with_agents
from tests.support.e2e_support import Fakes, fakes

__all__ = ["fakes"]
IDENTITY = '''
class Same(Agent):
    """Passes everything on."""
    command = "same"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        async for chunk in stream:
            yield chunk
'''
IDENTITY_BY_CHUNK = '''
class Each(Agent):
    """Passes each chunk on."""
    command = "each"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        return chunk
'''
SHOUT = '''
class Shout(Agent):
    """Makes it louder."""
    command = "shout"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.last_user_text = request.last_user_text + " "
        return None
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        if chunk.text:
            chunk.text = chunk.text.upper()
        return chunk
'''


def timeless(body: bytes) -> bytes:
    """The answer without the one figure that the fake server measures, and that is never the same twice."""
    return re.sub(rb'"predicted_ms": [0-9.e-]+', b"", body)


async def test_an_agent_makes_the_same_edits_in_every_api(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"shout": SHOUT}) as proxy:
        for way in WAYS:
            said = await way.ask(proxy, way.steered("/shout", tokens=3))
            assert (said.text, said.error) == ("T0 T1 T2 ", None), way
            assert said.finish in ("stop", "end_turn"), way
            plain = await way.ask(proxy, way.steered(tokens=3))
            assert plain.text == "t0 t1 t2 ", way


@pytest.mark.parametrize("command", ["/same", "/each", "/same /each"])
async def test_an_identity_agents_stream_is_the_relays_byte_for_byte(fakes: Fakes, command: str) -> None:
    async with proxy_with_agents(fakes, {"same": IDENTITY, "each": IDENTITY_BY_CHUNK}) as proxy:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
            way = Way(path, stream=True)
            for manners in ({"tokens": 5}, {"tokens": 2, "tool_call": ["f", {"a": 1}]}, {"tokens": 2, "pings": True}):
                if path == "/v1/completions":
                    manners.pop("tool_call", None)
                relayed = await raw_client.post(proxy.port, path, way.steered(**manners))
                passed = await raw_client.post(proxy.port, path, way.steered(command, **manners))
                assert passed.status == relayed.status == 200
                assert timeless(passed.body) == timeless(relayed.body), (path, manners)


def test_the_tokens_of_several_answers_are_summed() -> None:
    whole = Fold()
    for index in (0, 1):
        whole.add({"choices": [{"index": index, "delta": {"content": "x"}}]})
    for tokens in (3, 4):
        whole.add(
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}}
        )
    assert whole.completion()["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


IMPATIENT = '''
class Impatient(Agent):
    """Puts a dot where the model pauses."""
    command = "impatient"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        pauses = 0
        while True:
            try:
                chunk = await asyncio.wait_for(anext(stream), 0.02)
            except TimeoutError:
                pauses += 1
                if pauses == 3:
                    Path(GO).touch()
                continue
            except StopAsyncIteration:
                break
            yield chunk
        yield Chunk.of("." if pauses >= 3 else "too fast")
'''


@pytest.mark.parametrize("skip", [False, True])
async def test_an_agent_may_give_up_waiting_for_a_chunk_and_wait_again(fakes: Fakes, skip: bool) -> None:
    go = fakes.folder / "go"
    source = f"from pathlib import Path\nGO = {str(go)!r}\n{IMPATIENT}"
    entries = [{"impatient": {"on_error": "skip" if skip else "fail"}}]
    async with proxy_with_agents(fakes, {"impatient": source}, entries) as proxy:
        for way in WAYS:
            go.unlink(missing_ok=True)
            said = await way.ask(proxy, way.steered("/impatient", tokens=4, last_at=str(go)))
            assert (said.text, said.error) == ("t0 t1 t2 t3 .", None), way
