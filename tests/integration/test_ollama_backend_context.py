"""`num_ctx`: one policy per model, so that clients that differ do not have it loaded anew in turns."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from llama_smart_proxy.backends.ollama.hosts import LOADED_STALE_S, Hosts
from tests.support import raw_client
from tests.support.harness import until
from tests.support.ollamas import FakeOllama, ask, asked_of, chat, opened, running_ollama, sized, unwatched

ABSURD = 10**9


async def use(upstream: Hosts, asked: int | None, model: str = "m") -> int | None:
    """One request of a client that asks for so much; what was sent for it."""
    await upstream.find(model)
    backend = upstream.model(model)
    sent = sized(backend, asked)
    assert (await ask(backend, chat(model, num_ctx=sent)))[0] == 200
    return sent


def loads(fake: FakeOllama) -> list[int]:
    """The context sizes the model was loaded with, in turn."""
    events = fake.events("load") + fake.events("reload")
    return [event["ctx"] for event in sorted(events, key=lambda event: float(event["time"]))]


async def tried(upstream: Hosts, asked: int | None) -> tuple[int | None, int]:
    """What is sent for a client that asks for so much, and the status of the answer."""
    await upstream.find("m")
    backend = upstream.model("m")
    sent = sized(backend, asked)
    return sent, (await ask(backend, chat("m", num_ctx=sent)))[0]


@pytest.mark.parametrize("absent_ctx_counts", [False, True])
@pytest.mark.parametrize("one", [512, 2048, None])
@pytest.mark.parametrize("other", [8192, None])
async def test_two_clients_in_turns_cause_one_reload_at_most(
    one: int | None, other: int | None, absent_ctx_counts: bool
) -> None:
    async with running_ollama("m", absent_ctx_counts=absent_ctx_counts) as fake, opened(fake.port) as upstream:
        for _ in range(10):
            await use(upstream, one)
            await use(upstream, other)
        assert len(fake.events("load")) == 1
        assert len(fake.events("reload")) <= 1
        assert len(fake.events("request", "/api/chat")) == 20


async def test_clients_at_the_same_time_are_sent_the_largest_size_asked_so_far() -> None:
    async with running_ollama("m", load_s=0.1) as fake, opened(fake.port) as upstream:
        sizes = (512, 1024, 4096, 1024, 512, 2048, 4096, 512)
        assert await asyncio.gather(*(use(upstream, size) for size in sizes)) == [512, 1024] + [4096] * 6
        assert await use(upstream, 512) == 4096
        before = len(loads(fake))
        assert before <= 5  # whatever the order in which they arrive
        await asyncio.gather(*(use(upstream, size) for size in sizes))
        assert len(loads(fake)) == before


async def test_a_size_only_grows() -> None:
    async with running_ollama("m") as fake, opened(fake.port) as upstream:
        await unwatched(upstream)
        sent = [await use(upstream, asked) for asked in (512, 2048, 512, 4096, 2048, 8192, 512)]
        assert sent == [512, 2048, 2048, 4096, 4096, 8192, 8192]
        assert loads(fake) == [512, 2048, 4096, 8192]


@pytest.mark.parametrize(("absent_ctx_counts", "sizes"), [(True, [64, 4096]), (False, [64])])
async def test_a_size_below_ollamas_own_is_not_sent_for_a_client_that_asked_for_none(
    absent_ctx_counts: bool, sizes: list[int]
) -> None:
    async with running_ollama("m", absent_ctx_counts=absent_ctx_counts) as fake, opened(fake.port) as upstream:
        assert [await use(upstream, asked) for asked in (64, None, 64, None)][:2] == [64, None]
        later = [4096, 4096] if absent_ctx_counts else [None, 64]
        assert [await use(upstream, asked) for asked in (None, 64)] == later
        assert loads(fake) == sizes, "no reloads in turns"


async def test_a_size_above_ollamas_own_is_kept_for_clients_that_ask_for_none() -> None:
    async with running_ollama("m", "n", absent_ctx_counts=True) as fake, opened(fake.port) as upstream:
        sent = [await use(upstream, asked) for asked in (None, 512, None, 8192, None, 0, -1, 512)]
        assert sent == [None, 4096, 4096, 8192, 8192, 8192, 8192, 8192]
        assert loads(fake) == [4096, 8192]
        assert [await use(upstream, asked, "n") for asked in (8192, None)] == [8192, 8192], "known from the other model"
        assert [await use(upstream, asked, "n") for asked in (2048, 0)] == [8192, 8192]


async def test_a_pinned_size_is_always_sent() -> None:
    async with (
        running_ollama("m") as fake,
        opened(fake.port, configured={"M:latest": {"ctx": 1024, "aliases": ["fast"]}}) as upstream,
    ):
        assert [await use(upstream, asked) for asked in (None, 512, 8192)] == [1024, 1024, 1024]
        assert loads(fake) == [1024]


async def test_what_somebody_else_loaded_is_not_loaded_anew_for_less() -> None:
    async with running_ollama("m") as fake:
        async with opened(fake.port) as other:
            await use(other, 8192)
        async with opened(fake.port) as upstream:
            await upstream.listed()
            await until(lambda: upstream.has_loaded("m"), what="the loaded model")
            assert await use(upstream, 2048) == 8192
            assert await use(upstream, None) is None, "Ollama's own size is not known"
            assert loads(fake) == [8192]


async def test_a_size_that_ollama_cut_down_is_asked_for_as_before() -> None:
    async with running_ollama("m", train_ctx=2048) as fake, opened(fake.port) as upstream:
        await use(upstream, 8192)
        upstream.hosts[0].changed()
        await until(lambda: [item["context_length"] for item in upstream.loaded()] == [2048], what="the size")
        assert await use(upstream, 4096) == 8192
        assert loads(fake) == [8192]


async def test_a_size_that_nobody_asked_for_is_left_to_ollama() -> None:
    async with running_ollama("m", train_ctx=2048) as fake, opened(fake.port) as upstream:
        await use(upstream, None)
        upstream.hosts[0].changed()
        await until(lambda: upstream.has_loaded("m"), what="the loaded model")
        assert await use(upstream, None) is None
        assert loads(fake) == [4096]


async def test_a_size_is_forgotten_when_the_model_was_unloaded() -> None:
    async with running_ollama("m") as fake, opened(fake.port) as upstream:
        assert await use(upstream, 8192) == 8192
        upstream.hosts[0].changed()
        await until(lambda: upstream.has_loaded("m"), what="the loaded model")
        await fake.set(unload="m")
        upstream.hosts[0].changed()
        await until(lambda: not upstream.loaded(), what="the news that it is gone")
        assert await use(upstream, 512) == 512
        assert loads(fake) == [8192, 512]
        assert LOADED_STALE_S < 60  # looked after also when nobody asks: an unloaded model is soon noticed


async def test_a_size_is_not_forgotten_while_the_model_is_loading() -> None:
    async with running_ollama("m", load_s=2.5) as fake, opened(fake.port) as upstream:
        first = asyncio.ensure_future(use(upstream, 8192))
        await until(lambda: fake.events("load"), what="the load")
        await upstream.hosts[0].refresh_loaded(0)
        assert not upstream.has_loaded("m")
        assert sized(upstream.model("m"), 512) == 8192
        assert await first == 8192


async def test_each_model_has_a_size_of_its_own() -> None:
    async with running_ollama("m", "n") as fake, opened(fake.port) as upstream:
        assert [await use(upstream, 8192, "m"), await use(upstream, 512, "n"), await use(upstream, 64, "M")] == [
            8192,
            512,
            8192,
        ]
        assert len(fake.events("reload")) == 0


async def test_a_size_that_ollama_refuses_is_nobody_elses() -> None:
    async with running_ollama("m", train_ctx=2048) as fake, opened(fake.port) as upstream:
        await tried(upstream, 2048)
        for _ in range(3):
            await fake.set(error=[500, "model requires more system memory"])
            assert await tried(upstream, ABSURD) == (ABSURD, 500), "it is passed on as it was asked"
            await fake.set(error=None)
            assert await tried(upstream, None) == (None, 200)
            assert await tried(upstream, 512) == (2048, 200)


async def test_a_size_that_ollama_refuses_is_not_kept_for_a_model_without_one() -> None:
    async with running_ollama("m", error=[500, "too large"]) as fake, opened(fake.port) as upstream:
        await unwatched(upstream)
        assert await tried(upstream, ABSURD) == (ABSURD, 500)
        await fake.set(error=None)
        assert await tried(upstream, None) == (None, 200)


async def test_clients_share_a_size_that_is_being_tried_only_until_it_has_failed_once() -> None:
    async with (
        running_ollama("m", delay_s=1.5, train_ctx=256, error=[500, "too large"]) as fake,
        opened(fake.port) as upstream,
    ):
        for expected in (ABSURD, 512):
            seen = asked_of(fake)
            trying = asyncio.ensure_future(tried(upstream, ABSURD))
            await until(lambda seen=seen: asked_of(fake) > seen, what="the request")  # type: ignore[misc]
            assert sized(upstream.model("m"), 512) == expected
            assert await trying == (ABSURD, 500)


async def test_a_size_whose_client_left_before_the_answer_counts_if_the_model_is_loaded_with_it() -> None:
    async with running_ollama("m", delay_s=30) as fake, opened(fake.port) as upstream:
        asking = asyncio.ensure_future(tried(upstream, 8192))

        async def loaded() -> bool:
            return bool((await raw_client.get(fake.port, "/api/ps")).json()["models"])

        await until(loaded, what="the load")
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await upstream.refresh_loaded()
        assert sized(upstream.model("m"), 512) == 8192
