"""Servers that live and generate nothing: which ones are replaced, what becomes of their requests, which are not."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.pool.instance import Instance
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.pool.spawned import SpawnedModel
from llama_smart_proxy.proxy.errors import StartFailed, UpstreamFailed
from llama_smart_proxy.proxy.stream.upstream import Attempts, post_json
from tests.support.harness import PATIENCE_S, stopped, until
from tests.support.pools import CHAT, Fakes, leased, open_pool

LIMIT_S = 3.0
"""Time enough for whoever is not stalled, also on a busy machine."""
PROBES = "/completion"


@asynccontextmanager
async def served(fakes: Fakes, **fake: object) -> AsyncIterator[tuple[Pool, SpawnedModel, Instance]]:
    """A loaded model of two slots whose server may be silent for `LIMIT_S` seconds."""
    async with open_pool(fakes.config(stall_timeout_s=LIMIT_S)) as pool:
        model = fakes.model(fake=fake, parallel=2)
        async with leased(pool, "m", model) as instance:
            pass
        yield pool, SpawnedModel(pool, model.at("m"), kind="fake"), instance


async def asked(model: SpawnedModel, **fake: object) -> dict[str, Any]:
    """A whole answer, requested as the proxy does it: with one retry."""
    return await post_json(model, CHAT, {"fake": {"tokens": 2, **fake}}, slot=True)


def streaming(**fake: object) -> UpstreamRequest:
    return UpstreamRequest("POST", CHAT, json.dumps({"stream": True, "fake": fake}).encode())


async def looked_for(instance: Instance, seconds: float) -> None:
    """Return when the watch has looked at the instance for so long."""
    watch = instance._watch
    assert watch is not None
    await until(lambda: watch._looked_at > 0, what="a look")
    since = watch._looked_at
    await until(lambda: watch._looked_at > since + seconds, what="further looks")


# -- stalled -----------------------------------------------------------------------------------------------------------


async def stop(fakes: Fakes, instance: Instance) -> None:
    await stopped(instance.pid)


async def wedge(fakes: Fakes, instance: Instance) -> None:
    (fakes.folder / "wedged").touch()


async def recover(fakes: Fakes, instance: Instance) -> None:
    """The fresh process generates."""
    await until(lambda: fakes.spawns == 2, what="a fresh process")
    (fakes.folder / "wedged").unlink(missing_ok=True)


@pytest.mark.parametrize("how", [stop, wedge])
async def test_requests_of_a_stalled_server_are_all_answered_by_a_fresh_one(
    fakes: Fakes, how: Callable[[Fakes, Instance], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async with served(fakes, WEDGED=fakes.folder / "wedged") as (pool, model, instance):
        await how(fakes, instance)
        answers = [asyncio.ensure_future(asked(model)) for _ in range(6)]  # two are sent, four wait for a slot
        await until(lambda: "stalled" in pool.status()[0], what="the suspicion")
        reason = str(pool.status()[0]["stalled"])
        await recover(fakes, instance)
        async with asyncio.timeout(PATIENCE_S):
            assert all("t1" in json.dumps(answer) for answer in await asyncio.gather(*answers))
        assert fakes.spawns == 2 and not psutil.pid_exists(instance.pid)
        assert "nothing generated for" in reason and "2 requests wait" in reason
        assert "stalled" not in pool.status()[0]
        logged = next(line for line in caplog.messages if "it stalled" in line)
        assert "CPU time 0.0" in logged and "server_pool.stall_timeout_s: 3" in logged


async def test_a_stream_under_way_fails_with_its_server_and_is_not_sent_again(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, instance):
        async with model.open(streaming(tokens=1000, token_ms=10)) as response:
            assert await response.piece()
            await stop(fakes, instance)
            with pytest.raises(UpstreamFailed, match="it stalled: nothing generated") as failure:
                while await response.piece():
                    pass
        assert (failure.value.status, failure.value.code) == (502, "upstream_disconnected")
        assert "t1" in json.dumps(await asked(model)) and len(fakes.events("request", CHAT)) == 2


async def test_comments_in_a_stream_are_no_sign_of_life(fakes: Fakes) -> None:
    async with (
        served(fakes, WEDGED=fakes.folder / "wedged") as (_, model, instance),
        model.open(streaming(tokens=3, stall_after=1, pings=1)) as response,
    ):
        await wedge(fakes, instance)
        with pytest.raises(UpstreamFailed, match="it stalled"):
            while await response.piece():
                pass


async def test_a_question_that_is_not_answered_is_noticed_as_well(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, instance):
        await stop(fakes, instance)
        async for attempt in Attempts(model, UpstreamRequest("GET", "/props", slot=False)):
            async with attempt as response:
                assert response.status == 200
        assert fakes.spawns == 2


@pytest.mark.parametrize("streams", [False, True])
async def test_a_server_that_has_closed_its_listener_is_replaced_when_its_streams_are_over(
    fakes: Fakes, streams: bool
) -> None:
    gate = fakes.folder / "gate"
    async with served(fakes) as (pool, model, _):
        steer: dict[str, object] = {"tokens": 3, "deaf": 1, **({"last_at": str(gate)} if streams else {})}
        async with model.open(streaming(**steer)) as response:
            assert await response.piece()
            waiting = asyncio.ensure_future(asked(model))
            if streams:
                await until(lambda: pool.status()[0]["queue"] == 1, what="the next request, that waits")
                assert fakes.spawns == 1
            gate.touch()
            while await response.piece():
                pass
            assert response.complete
        assert "t1" in json.dumps(await waiting)
        assert fakes.spawns == 2


async def test_a_model_that_stalls_again_and_again_is_left_alone_for_a_while(fakes: Fakes) -> None:
    async with served(fakes, WEDGED=fakes.folder / "wedged") as (_, model, instance):
        await wedge(fakes, instance)
        with pytest.raises((StartFailed, UpstreamFailed)):
            await asked(model)
        with pytest.raises(StartFailed, match="stalled") as refused:
            await asked(model)
        assert refused.value.status == 503 and refused.value.retry_after_s is not None
        assert fakes.spawns == 2


async def test_other_models_do_not_notice_a_stalled_one(fakes: Fakes) -> None:
    async with served(fakes) as (pool, model, instance):
        other = SpawnedModel(pool, fakes.model().at("other"), kind="fake")
        stream = asyncio.ensure_future(asked(other, tokens=300, token_ms=10))
        await until(lambda: len(fakes.events("request", CHAT)) == 1, what="the other stream")
        pid = fakes.events("request", CHAT)[0]["pid"]
        await stop(fakes, instance)
        assert "t1" in json.dumps(await asked(model))
        assert "t299" in json.dumps(await stream) and fakes.events("request", CHAT)[0]["pid"] == pid
        assert fakes.spawns == 3


# -- not stalled -------------------------------------------------------------------------------------------------------


async def test_a_server_that_works_on_a_prompt_for_long_is_left_alone(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, _):
        assert "t1" in json.dumps(await asked(model, busy=1.2 * LIMIT_S))
        assert fakes.spawns == 1


async def test_a_server_whose_child_does_the_work_is_left_alone(fakes: Fakes) -> None:
    script = fakes.folder / "wrapper"
    script.write_text(f'#!/bin/sh\n"{fakes.program}" "$@"\n')
    script.chmod(0o755)
    async with open_pool(fakes.config(stall_timeout_s=LIMIT_S)) as pool:
        model = fakes.model(parallel=1).run_by(script)
        assert "t1" in json.dumps(await asked(SpawnedModel(pool, model.at("m"), kind="fake"), busy=1.2 * LIMIT_S))
        assert fakes.spawns == 1


async def test_a_server_with_a_free_slot_is_left_alone_if_it_answers_a_probe(fakes: Fakes) -> None:
    """The request that it has lost is subject to the other limits."""
    async with served(fakes) as (_, model, _):
        lost = asyncio.ensure_future(asked(model, mute=1))
        await until(lambda: len(fakes.events("done", PROBES)) == 3, what="three probes")
        assert "t1" in json.dumps(await asked(model)) and fakes.spawns == 1
        lost.cancel()
        await asyncio.wait([lost])


async def test_a_server_stopped_for_less_than_the_limit_is_left_alone(fakes: Fakes) -> None:
    async with served(fakes) as (pool, model, instance):
        await stop(fakes, instance)
        answer = asyncio.ensure_future(asked(model))
        await until(lambda: instance._watch is not None and instance._watch._first is not None, what="a closer look")
        os.kill(instance.pid, signal.SIGCONT)
        assert "t1" in json.dumps(await answer)
        await until(lambda: "stalled" not in pool.status()[0], what="the end of the suspicion")
        assert fakes.spawns == 1


async def test_a_client_that_reads_slowly_is_not_the_servers_fault(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, instance):
        async with model.open(streaming(tokens=100_000)) as response:
            await until(lambda: response._paused, what="a full buffer")
            await looked_for(instance, 1.5 * LIMIT_S)
            assert await response.piece()
        assert fakes.spawns == 1


async def test_time_in_which_the_proxy_did_not_run_is_no_silence(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, instance):
        await stop(fakes, instance)
        answer = asyncio.ensure_future(asked(model))
        await until(lambda: fakes.events("start") and instance.connections._active, what="the request")
        watch = instance._watch
        assert watch is not None
        await until(lambda: watch._silent_s > 0, what="a silent moment")
        watch._looked_at -= 3600.0  # as if the machine had been asleep since the last look
        before = watch._silent_s
        await until(lambda: watch._silent_s > before, what="the next look")
        assert watch._silent_s - before < LIMIT_S / 2
        os.kill(instance.pid, signal.SIGCONT)
        await answer
        assert fakes.spawns == 1


async def test_without_a_limit_no_server_is_watched(fakes: Fakes) -> None:
    async with open_pool(fakes.config(stall_timeout_s=0)) as pool, leased(pool, "m", fakes.model()) as instance:
        assert instance.connections.on_sweep is None


async def test_a_silent_embedding_is_watched_by_the_same_rules(fakes: Fakes) -> None:
    async with served(fakes) as (_, model, instance):
        await stop(fakes, instance)
        answer = await post_json(model, "/v1/embeddings", {"input": "a"}, slot=True)
        assert answer["data"] and fakes.spawns == 2
