"""Models that no Ollama has yet: pulled once for all who wait, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.ollama import hosts as ollama
from llama_smart_proxy.backends.ollama.host import PULL_FAILED
from llama_smart_proxy.backends.ollama.hosts import REFUSAL_KEPT_S, Hosts
from llama_smart_proxy.backends.ollama.provider import Ollama
from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.backends.weights.hub import download_name
from llama_smart_proxy.proxy.config import OllamaConfig
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError, UpstreamFailed
from tests.support.harness import free_port, until
from tests.support.ollamas import FakeOllama, ask, chat, opened, running_ollama


async def test_a_missing_model_is_pulled_once_for_all_who_ask_for_it() -> None:
    async with running_ollama("other", pull_step_s=0.1) as fake, opened(fake.port) as upstream:
        assert await upstream.find("m") is None
        assert upstream.may_pull("m")
        spellings = ("m", "M", "m:latest", "library/m", "M:LATEST")
        answers = await asyncio.gather(
            *(ask(upstream.model(spellings[n % 5]), chat("m", num_ctx=512)) for n in range(50))
        )
        assert {status for status, _ in answers} == {200}
        assert len(fake.events("pull")) == len(fake.events("request", "/api/pull")) == 1
        assert len(fake.events("request", "/api/chat")) == 50
        assert await upstream.find("m") == "m:latest"


async def test_a_model_is_pulled_by_the_least_busy_host_that_answers() -> None:
    async with (
        running_ollama("busy", thinking="hm", token_s=30) as first,
        running_ollama("free") as second,
        opened(free_port(), first.port, second.port) as upstream,
    ):
        await upstream.listed()
        async with upstream.model("busy").open(chat("busy", stream=True)):
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
        assert (len(first.events("pull")), len(second.events("pull"))) == (0, 1)


async def test_never_means_that_a_missing_model_is_not_found() -> None:
    async with running_ollama("other") as fake, opened(fake.port, pull="never") as upstream:
        assert not upstream.may_pull("m")
        with pytest.raises(ModelNotFound, match="model 'm' not found"):
            await ask(upstream.model("m"), chat("m"))
        assert fake.events("pull") == []
        await upstream.pull("m").wait()  # who asks for just that may have it
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200


async def test_a_request_that_must_not_have_a_model_pulled_does_not() -> None:
    async with running_ollama() as fake, opened(fake.port, configured={"m": {}}) as upstream:
        provider = Ollama(upstream)
        for found in (provider.known("m", pull=False), await provider.find("m", pull=False)):
            assert found is not None, "it is configured"
            with pytest.raises(ModelNotFound):
                await ask(found, chat("m"))
        assert await provider.find("other", pull=False) is None
        assert fake.events("pull") == []
        for name in ("m", "other"):
            pulled = await provider.find(name, pull=True)
            assert pulled is not None and (await ask(pulled, chat(name)))[0] == 200
        assert len(fake.events("pull")) == 2


async def test_a_model_that_the_registry_does_not_have_is_not_found_in_the_words_of_ollama() -> None:
    async with running_ollama(registry=["real"]) as fake, opened(fake.port) as upstream:
        with pytest.raises(ModelNotFound, match="'m' not found: pull model manifest: file does not exist"):
            await ask(upstream.model("m"), chat("m"))
        assert len(fake.events("pull")) == 1
        assert fake.events("request", "/api/chat") == []


async def test_all_who_wait_for_a_pull_that_fails_are_told_why() -> None:
    async with running_ollama(pull_error="no space left on device", pull_step_s=0.1) as fake:
        async with opened(fake.port) as upstream:
            asking = (ask(upstream.model("m"), chat("m")) for _ in range(10))
            failures = await asyncio.gather(*asking, return_exceptions=True)
        assert {getattr(failure, "code", failure) for failure in failures} == {PULL_FAILED}
        assert all("no space left on device" in str(failure) for failure in failures)
        assert len(fake.events("pull")) == 1


async def test_a_pull_that_a_host_breaks_off_is_taken_over_by_the_next_one() -> None:
    async with running_ollama(pull_dies=True) as first, running_ollama() as second:
        async with opened(first.port, second.port) as upstream:
            await upstream.listed()
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
        assert (len(first.events("pull")), len(second.events("pull"))) == (1, 1)
        async with opened(first.port) as upstream:
            with pytest.raises(UpstreamFailed, match="reset"):
                await ask(upstream.model("m"), chat("m"))


async def watch(download: Download, into: list[Progress]) -> None:
    async for progress in download.watch():
        into.append(progress)


async def test_progress_is_seen_by_all_who_watch_and_ends_with_the_pull() -> None:
    async with running_ollama(pull_steps=5, pull_step_s=0.25) as fake, opened(fake.port) as upstream:
        seen: list[list[Progress]] = [[], []]
        await asyncio.gather(*(watch(upstream.pull("m"), lines) for lines in seen))
        for lines in seen:
            amounts = [line["completed"] for line in lines if "completed" in line]
            assert amounts == sorted(amounts) and len(set(amounts)) > 1
            assert {line["total"] for line in lines if "total" in line} == {1000}
        assert len(fake.events("pull")) == 1
        assert upstream.models == ("m:latest",)


async def test_a_pull_may_be_silent_for_longer_than_an_answer() -> None:
    async with (
        running_ollama(pull_step_s=2.0, pull_steps=1) as fake,
        opened(fake.port, idle_timeout_s=1.0, first_byte_timeout_s=60) as upstream,
    ):
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200


async def test_a_pull_outlives_a_client_that_asked_for_an_answer_but_not_the_only_one_that_watched_it() -> None:
    async with running_ollama(pull_step_s=0.3) as fake, opened(fake.port) as upstream:
        asking = asyncio.ensure_future(ask(upstream.model("m"), chat("m")))
        await until(lambda: fake.events("pull"), what="the pull")
        asking.cancel()
        await until(lambda: fake.events("done", "/api/pull"), what="the end of the pull")
        await until(lambda: upstream.models == ("m:latest",), what="the model")
        await fake.set(pull_step_s=600)
        watching = asyncio.ensure_future(watch(upstream.pull("other"), []))
        await until(lambda: len(fake.events("pull")) == 2, what="the other pull")
        watching.cancel()
        await until(lambda: fake.events("closed", "/api/pull"), what="the end of the connection")
        assert upstream.models == ("m:latest",)
        assert asking.cancelled()


async def test_a_model_that_is_there_is_pulled_anew_by_a_host_that_has_it() -> None:
    async with running_ollama() as first, running_ollama("m") as second, opened(first.port, second.port) as upstream:
        await upstream.listed()
        await upstream.pull("m").wait()
        assert (len(first.events("pull")), len(second.events("pull"))) == (0, 1)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/..", "m\0", "a b", "m\r\nX: y", "a" * 256, ""])
async def test_what_cannot_be_a_name_is_never_pulled(name: str) -> None:
    async with running_ollama() as fake, opened(fake.port) as upstream:
        with pytest.raises(BadRequest, match="invalid model name"):
            upstream.pull(name)
        with pytest.raises(ModelNotFound):
            await ask(upstream.model(name), chat(name))
        assert fake.events("request", "/api/pull") == []


NO_PROGRESS = {
    "cut short": {"lines": ['{"status":"pulling manifest"}']},
    "no JSON": {"lines": ['{"status":"pulling manifest"}', "oops"]},
    "no object": {"lines": ["[1]"]},
    "empty": {"body": ""},
    "not found": {"status": 404, "headers": {"Content-Type": "text/plain"}, "body": "404 page not found"},
    "endless": {"lines": ["x" * 3_000_000]},
}


@pytest.mark.parametrize("answer", NO_PROGRESS)
async def test_an_answer_to_a_pull_that_does_not_tell_of_success_is_a_failure(answer: str, tmp_path: Path) -> None:
    await fails_with(UpstreamFailed, NO_PROGRESS[answer], tmp_path)


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_an_error_is_one_whatever_its_status(status: int, tmp_path: Path) -> None:
    await fails_with(UpstreamFailed, {"status": status, "body": {"error": "why not"}}, tmp_path, "why not")


async def fails_with(error: type[ProxyError], response: object, folder: Path, words: str = "") -> None:
    """A pull that Ollama answers so fails with that error."""
    request = {"path": "/api/pull", "body": {"stream": True}}
    (folder / "pull.json").write_text(json.dumps({"name": "pull", "request": request, "response": response}))
    async with running_ollama(golden=folder) as fake, opened(fake.port) as upstream:
        with pytest.raises(error, match=words or None):
            await upstream.pull("m").wait()
        assert len(fake.events("request", "/api/pull")) == 1


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
