"""Ollama hosts: what went wrong once, and must not again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.http.connection import UNREACHABLE
from llama_smart_proxy.backends.ollama import hosts as ollama
from llama_smart_proxy.backends.ollama.host import PULL_FAILED
from llama_smart_proxy.backends.ollama.hosts import REFUSAL_KEPT_S, Hosts
from llama_smart_proxy.backends.weights.downloads import Downloads, Progress
from llama_smart_proxy.backends.weights.hub import download_name
from llama_smart_proxy.proxy.config import OllamaConfig
from llama_smart_proxy.proxy.errors import ModelNotFound, UpstreamFailed
from tests.support import raw_client
from tests.support.config_files import load, model, problems
from tests.support.harness import free_port, until
from tests.support.ollamas import FakeOllama, ask, black_hole, chat, opened, running_ollama, sized, unwatched

ABSURD = 10**9


async def use(upstream: Hosts, asked: int | None) -> tuple[int | None, int]:
    """What is sent for a client that asks for so much, and the status of the answer."""
    await upstream.find("m")
    backend = upstream.model("m")
    sent = sized(backend, asked)
    return sent, (await ask(backend, chat("m", num_ctx=sent)))[0]


def asked_of(*fakes: FakeOllama) -> list[int]:
    """How many chats each of them was sent."""
    return [len(fake.events("request", "/api/chat")) for fake in fakes]


# -- context sizes -----------------------------------------------------------------------------------------------------


async def test_a_size_that_ollama_refuses_is_nobody_elses() -> None:
    async with running_ollama("m", train_ctx=2048) as fake, opened(fake.port) as upstream:
        await use(upstream, 2048)
        for _ in range(3):
            await fake.set(error=[500, "model requires more system memory"])
            assert await use(upstream, ABSURD) == (ABSURD, 500), "it is passed on as it was asked"
            await fake.set(error=None)
            assert await use(upstream, None) == (2048, 200)
            assert await use(upstream, 512) == (2048, 200)


async def test_a_size_that_ollama_refuses_is_not_kept_for_a_model_without_one() -> None:
    async with running_ollama("m", error=[500, "too large"]) as fake, opened(fake.port) as upstream:
        await unwatched(upstream)
        assert await use(upstream, ABSURD) == (ABSURD, 500)
        await fake.set(error=None)
        assert await use(upstream, None) == (None, 200)


async def test_clients_share_a_size_that_is_being_tried_only_until_it_has_failed_once() -> None:
    async with (
        running_ollama("m", delay_s=1.5, train_ctx=256, error=[500, "too large"]) as fake,
        opened(fake.port) as upstream,
    ):
        for expected in (ABSURD, 512):
            seen = asked_of(fake)
            trying = asyncio.ensure_future(use(upstream, ABSURD))
            await until(lambda seen=seen: asked_of(fake) > seen, what="the request")  # type: ignore[misc]
            assert sized(upstream.model("m"), 512) == expected
            assert await trying == (ABSURD, 500)


async def test_a_size_whose_client_left_before_the_answer_counts_if_the_model_is_loaded_with_it() -> None:
    async with running_ollama("m", delay_s=30) as fake, opened(fake.port) as upstream:
        asking = asyncio.ensure_future(use(upstream, 8192))

        async def loaded() -> bool:
            return bool((await raw_client.get(fake.port, "/api/ps")).json()["models"])

        await until(loaded, what="the load")
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        await upstream.looked_up()
        assert sized(upstream.model("m"), None) == 8192


# -- pulls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("write /blobs/x: no space left on device", UpstreamFailed),
        ("dial tcp: lookup registry.example: no such host", UpstreamFailed),
        ("max retries exceeded: EOF", UpstreamFailed),
        ("pull model manifest: file does not exist", ModelNotFound),
        ("pull model manifest: 404: not found", ModelNotFound),
        ("repository does not exist or may require authorization", ModelNotFound),
    ],
)
async def test_a_pull_fails_as_not_found_only_if_ollama_says_that_of_the_model(
    words: str, error: type[UpstreamFailed | ModelNotFound]
) -> None:
    async with running_ollama(pull_error=words) as fake, opened(fake.port) as upstream:
        with pytest.raises(error) as caught:
            await ask(upstream.model("m"), chat("m"))
        told = (404, "model_not_found") if error is ModelNotFound else (502, PULL_FAILED)
        assert (caught.value.status, caught.value.code) == told
        assert words in caught.value.message and "'m'" in caught.value.message


async def test_a_pull_that_one_host_has_no_room_for_is_done_by_the_next_or_fails_in_its_words() -> None:
    async with (
        running_ollama(pull_error="no space left on device") as full,
        running_ollama() as roomy,
        running_ollama(pull_dies=True) as dying,
    ):
        async with opened(full.port, roomy.port) as upstream:
            await upstream.listed()
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
        async with opened(full.port, dying.port, free_port()) as upstream:
            await upstream.listed()
            with pytest.raises(UpstreamFailed, match="no space left"):
                await ask(upstream.model("m"), chat("m"))


@pytest.mark.parametrize("manners", [{"registry": []}, {"pull_error": "no space left on device"}])
async def test_ollama_is_not_asked_again_at_once_for_a_pull_that_it_gave_up(
    manners: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ollama, "REFUSAL_KEPT_S", 600.0)
    async with running_ollama(**manners) as fake, opened(fake.port) as upstream:
        told = {await failure(upstream, name) for name in ("m", "M:latest", "m")}
        assert len(told) == 1 and len(fake.events("pull")) == 1
        await failure(upstream, "other")
        assert len(fake.events("pull")) == 2, "other models are another matter"
        with pytest.raises((UpstreamFailed, ModelNotFound)):
            await upstream.pull("m").wait()
        assert len(fake.events("pull")) == 3, "who asks for just that has it tried"
        await fake.set(registry=None, pull_error=None)
        await upstream.pull("m").wait()
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200
        assert REFUSAL_KEPT_S <= 30


async def failure(upstream: Hosts, name: str) -> str:
    with pytest.raises((UpstreamFailed, ModelNotFound)) as caught:
        await ask(upstream.model(name), chat(name))
    return str(caught.value)


async def test_a_pull_that_broke_off_may_be_tried_again_at_once() -> None:
    async with running_ollama(pull_dies=True) as fake, opened(fake.port) as upstream:
        await failure(upstream, "m")
        await fake.set(pull_dies=False)
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200


@asynccontextmanager
async def downloading(fake: FakeOllama) -> AsyncIterator[tuple[Hosts, Downloads]]:
    """Hosts whose downloads are shared with others."""
    downloads = Downloads()
    upstream = Hosts(OllamaConfig.model_validate({"host": [fake.url]}), downloads, {})
    try:
        yield upstream, downloads
    finally:
        await downloads.close()
        await upstream.close()


async def test_a_pull_and_a_download_from_the_hub_are_two_even_of_one_name() -> None:
    name = download_name("org/repo", "q4_k_m")
    async with running_ollama(pull_step_s=0.2) as fake, downloading(fake) as (upstream, downloads):
        done = asyncio.Event()

        async def download(tell: Callable[[Progress], None]) -> None:
            await done.wait()

        from_hub = downloads.join(name, download)
        pull = upstream.pull(name)
        assert pull is not from_hub and upstream.pull(name.upper()) is pull
        assert sorted(item["model"] for item in downloads.status()) == [name, f"ollama {name}"]
        await pull.wait()
        assert len(fake.events("pull")) == 1 and not from_hub.ended
        done.set()
        await from_hub.wait()


# -- which host, and how often -----------------------------------------------------------------------------------------


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


# -- configuration -----------------------------------------------------------------------------------------------------

WITHOUT_EFFECT: dict[str, Any] = {
    "args": ["-ngl", "1"],
    "env": {"A": "b"},
    "parallel": 2,
    "keep_alive": "10m",
    "preload": True,
    "pinned": True,
}


def test_every_setting_that_ollama_would_not_get_is_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, model(backend="ollama", aliases=["x"], ctx=1024, **WITHOUT_EFFECT)) == [
        f"config.yaml: models.m.{field}: has no effect on a model of backend ollama; leave it out"
        for field in WITHOUT_EFFECT
    ]


def test_settings_at_their_defaults_and_those_of_llama_cpp_are_none(tmp_path: Path) -> None:
    load(tmp_path, model(backend="ollama", preload=False, args=[], keep_alive=None))
    load(tmp_path, model(path="a.gguf", **WITHOUT_EFFECT))
