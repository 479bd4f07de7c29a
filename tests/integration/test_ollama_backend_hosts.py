"""Ollama hosts that fail: which of them a request goes to next, and how often it is sent."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from llama_smart_proxy.backends.http.connection import UNREACHABLE
from llama_smart_proxy.proxy.errors import UpstreamFailed
from tests.support.harness import free_port
from tests.support.ollamas import ask, asked_of, black_hole, chat, opened, running_ollama


async def test_a_request_that_a_host_was_silent_about_is_not_sent_to_the_next_one() -> None:
    async with (
        running_ollama("m", delay_s=30) as silent,
        running_ollama("m", delay_s=30) as other,
        opened(silent.port, other.port, first_byte_timeout_s=0.5) as upstream,
    ):
        await upstream.find("m")
        with pytest.raises(UpstreamFailed) as caught:
            await ask(upstream.model("m"), chat("m"))
        assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
        assert asked_of(silent, other) == [1, 0]


async def test_two_tries_with_two_hosts_that_break_off_are_two_requests() -> None:
    async with (
        running_ollama("m", die_after=0) as first,
        running_ollama("m", die_after=0) as second,
        opened(first.port, second.port) as upstream,
    ):
        await upstream.find("m")
        for expected in ([1, 0], [1, 1]):
            with pytest.raises(UpstreamFailed) as caught:
                await ask(upstream.model("m"), chat("m"))
            assert (caught.value.status, caught.value.code) == (502, "upstream_disconnected")
            assert asked_of(first, second) == expected


@pytest.mark.parametrize(("how", "status"), [("refuses", 502), ("is silent", 504), ("has no name", 502)])
async def test_hosts_to_which_nothing_was_sent_are_passed_over(how: str, status: int) -> None:
    async with AsyncExitStack() as stack:
        hole = stack.enter_context(black_hole())
        fake = await stack.enter_async_context(running_ollama("m"))
        aways = {"refuses": f"127.0.0.1:{free_port()}", "is silent": f"127.0.0.1:{hole}", "has no name": "a" * 64}
        hosts = [aways[how], f"127.0.0.1:{fake.port}"]
        upstream = await stack.enter_async_context(opened(host=hosts, connect_timeout_s=1.0))
        await upstream.listed()
        upstream.hosts[0].tags = dict(upstream.hosts[1].tags)  # as if it had been there until now
        with pytest.raises(UpstreamFailed) as caught:
            await ask(upstream.hosts[0], chat("m"))
        assert (caught.value.status, caught.value.code) == (status, UNREACHABLE)
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200
