"""Ends: of each of several answers, of a chain of proxies, and of a proxy whose agent does not end."""

from __future__ import annotations

import json
import signal

from tests.support import raw_client
from tests.support.agent_clients import Way, proxy_with_agents
from tests.support.e2e_support import CHAT, Fakes, fakes
from tests.support.harness import until

__all__ = ["fakes"]
WHOLE, STREAM = Way(CHAT, stream=False), Way(CHAT, stream=True)
ENDLESS = '''
class Endless(Agent):
    """Answers no cancellation."""
    command = "endless"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
'''
CUTS = '''
class Cuts(Agent):
    """Drops every end."""
    command = "cuts"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        return None if chunk.finish_reason else chunk
'''
PUMPS = '''
class Pumps(Agent):
    """Has a task read the answer, and takes its time."""
    command = "pumps"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
        async def pump() -> None:
            async for chunk in stream:
                await queue.put(chunk)
            await queue.put(None)
        task = asyncio.create_task(pump())
        while (chunk := await queue.get()) is not None:
            await asyncio.sleep(0.02)
            yield chunk
'''
STALLS = '''
class Stalls(Agent):
    """Hangs at the second word, if it is told to."""
    command = "stalls"
    per_call = frozenset({"now"})
    class Config(Options):
        now: bool = True
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        if ctx.config.now and "t1" in chunk.text:
            await asyncio.Event().wait()
        return chunk
'''


async def test_each_of_several_answers_has_its_end_whatever_agents_drop(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"cuts": CUTS}) as proxy:
        answer = await raw_client.post(proxy.port, CHAT, STREAM.body("/cuts hi", n=2, max_tokens=2))
        events = [event.removeprefix(b"data: ") for event in answer.body.split(b"\n\n") if event]
        choices = [json.loads(event)["choices"][0] for event in events if event != b"[DONE]"]
        ended = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert sorted(ended) == [0, 1]


async def test_no_depth_is_too_deep_to_be_seen(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"cuts": CUTS}) as proxy:
        for depth, status in (("3", 508), ("99999999999", 508), ("0", 200), ("-1", 200), ("x", 200)):
            said = await WHOLE.ask(proxy, WHOLE.body("/cuts hi"), [("X-Agents-Depth", depth)])
            assert said.status == status, depth


async def test_who_hangs_below_an_agent_that_reads_in_a_task_is_told(fakes: Fakes) -> None:
    limits = {"timeout_s": 1.0}
    async with proxy_with_agents(fakes, {"pumps": PUMPS, "stalls": STALLS}, agent_limits=limits) as proxy:
        said = await WHOLE.ask(proxy, WHOLE.body("/pumps /stalls hi"))
        assert (said.status, said.error) == (504, "agent stalls did not go on within 1 s")
        said = await WHOLE.ask(proxy, WHOLE.body("/pumps /stalls now=no hi", max_tokens=8))
        assert (said.status, said.error) == (200, None)
        listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert listed["pumps"]["mean_latency_ms"] * 2 > 8 * 20, "its time counts while another's hook runs"


async def test_a_proxy_ends_although_an_agent_does_not(fakes: Fakes) -> None:
    async with (
        proxy_with_agents(fakes, {"endless": ENDLESS}, clean_log=False, server={"drain_s": 0.1}) as proxy,
        raw_client.connected(proxy.port) as client,
    ):
        await client.send(raw_client.request("POST", CHAT, WHOLE.body("/endless hi")))
        await until(lambda: _running(proxy.port), what="the request under way")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


async def _running(port: int) -> bool:
    listed = {item["name"]: item for item in (await raw_client.get(port, "/plugins")).json()}
    return bool(listed["endless"]["calls"] == 1)
