"""Ollama hosts as one backend: what they have, under which names, and which of them answers a request."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import orjson
import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.host import LISTING_TIMEOUT_S, TAGS_FRESH_S
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.proxy.errors import ModelNotFound, UpstreamFailed
from tests.support.harness import PATIENCE_S, free_port, until
from tests.support.ollamas import FakeOllama, ask, black_hole, chat, opened, patient, running_ollama
from tests.support.toxic import Link, Request, plain, raw_upstream

LATE_S = 600.0
"""What no list may wait for."""


async def answering(upstream: Hosts, *fakes: FakeOllama, model: str, requests: int) -> list[int]:
    """How many of so many requests at one time each of the fakes gets."""
    before = [len(fake.events("request", "/api/chat")) for fake in fakes]
    await asyncio.gather(*(ask(upstream.model(model), chat(model)) for _ in range(requests)))
    return [len(fake.events("request", "/api/chat")) - old for fake, old in zip(fakes, before, strict=True)]


async def load(fake: FakeOllama, model: str) -> None:
    """Have the model loaded by somebody else than us."""
    async with opened(fake.port) as other:
        assert (await ask(other.model(model), chat(model)))[0] == 200


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("m", "m:latest"),
        ("M:1B-q4_K", "m:1b-Q4_k"),
        ("hf.co/Org/Repo", "hf.co/org/repo:latest"),
        ("library/m", "registry.ollama.ai/library/m:latest"),
        ("box:5000/me/m", "box:5000/me/m:latest"),
    ],
)
def test_names_of_one_model_are_known_as_such(one: str, other: str) -> None:
    assert key_of(one) == key_of(other)


@pytest.mark.parametrize(("one", "other"), [("m", "m:1b"), ("me/m", "m"), ("hf.co/a/m", "a/m"), ("m", "m2")])
def test_names_of_two_models_are_told_apart(one: str, other: str) -> None:
    assert key_of(one) != key_of(other)


async def test_a_model_is_found_in_any_case_and_with_or_without_latest() -> None:
    async with running_ollama("Plain", "tagged:1B") as fake, opened(fake.port) as upstream:
        for name in ("Plain", "plain:LATEST", "PLAIN"):
            assert await upstream.find(name) == "Plain:latest"
        assert await upstream.find("TAGGED:1b") == "tagged:1B"
        assert [await upstream.find(name) for name in ("tagged", "Plain:1b", "plain2", "", "../Plain")] == [None] * 5


@pytest.mark.parametrize("name", ["../x", "a/../b", "/x", "a\0b", "a b", "a\nb", "a" * 256, "", "ä"])
async def test_what_cannot_be_a_name_never_reaches_a_host(name: str) -> None:
    async with running_ollama("m") as fake, opened(fake.port) as upstream:
        await upstream.listed()
        before = len(fake.events("request", "/api/tags"))
        assert await upstream.find(name) is None
        assert not upstream.may_pull(name)
        with pytest.raises(ModelNotFound):
            await ask(upstream.model(name), chat(name))
        assert fake.events("request", "/api/pull") == fake.events("request", "/api/chat") == []
        assert len(fake.events("request", "/api/tags")) == before


# -- lists -------------------------------------------------------------------------------------------------------------


async def test_items_of_all_hosts_are_merged_and_kept_whole() -> None:
    async with (
        running_ollama("both", "one") as first,
        running_ollama("two", "both") as second,
        opened(first.port, second.port) as upstream,
    ):
        await upstream.listed()
        assert upstream.models == ("both:latest", "one:latest", "two:latest")
        items = upstream.items()
        assert [item["name"] for item in items] == [item["model"] for item in items] == list(upstream.models)
        whole = {"name", "model", "modified_at", "size", "digest", "details"}
        assert all(item.keys() == whole and len(item["details"]) == 6 for item in items)
        await until(lambda: upstream.version == "0.12.6", what="the version")


async def test_what_is_loaded_is_merged_and_looked_up_again_while_it_is_asked_for() -> None:
    async with (
        running_ollama("a", "b") as first,
        running_ollama("b") as second,
        opened(first.port, second.port) as upstream,
    ):
        await upstream.find("a")
        assert upstream.loaded() == []
        await load(first, "a")
        await until(lambda: len(upstream.loaded()) == 1, what="the loaded model")
        await load(second, "b")
        await upstream.refresh_loaded()
        assert [(item["name"], item["context_length"]) for item in upstream.loaded()] == [
            ("a:latest", 4096),
            ("b:latest", 4096),
        ]
        assert {"expires_at", "size_vram", "model"} < upstream.loaded()[0].keys()
        assert [(host["models"], host["loaded"]) for host in upstream.status()] == [
            (2, ["a:latest"]),
            (1, ["b:latest"]),
        ]


async def test_a_model_that_a_host_gains_is_found_at_the_first_request_and_listings_are_rare_all_the_same() -> None:
    async with running_ollama("old") as fake, opened(fake.port, pull="never") as upstream:
        assert await upstream.find("old") == "old:latest"
        await fake.set(models=["old", "new"])

        async def found() -> bool:
            return await upstream.find("new") is not None

        await until(found, what="the new model")
        assert len(fake.events("request", "/api/tags")) <= 2  # although it was asked for every few milliseconds
        assert TAGS_FRESH_S >= 300


async def test_a_fixed_list_of_models_is_all_that_is_offered() -> None:
    async with (
        running_ollama("a", "B:1b", "c", "d") as fake,
        opened(fake.port, models=["a", "b:1B", "gone"], configured={"c": {}}) as upstream,
    ):
        await upstream.listed()
        assert [item["name"] for item in upstream.items()] == ["a:latest", "B:1b", "c:latest"]
        assert upstream.models == ("a:latest", "B:1b", "c:latest", "gone")
        assert [await upstream.find(name) for name in ("a", "GONE", "d")] == ["a:latest", "gone", None]
        assert [upstream.may_pull(name) for name in ("gone", "c", "d")] == [True, True, False]
        await load(fake, "d")
        await load(fake, "a")
        upstream.hosts[0].changed()
        await until(upstream.loaded, what="the loaded model")
        assert [item["name"] for item in upstream.loaded()] == ["a:latest"]
        with pytest.raises(ModelNotFound):
            await ask(upstream.model("d"), chat("d"))


async def test_a_host_that_is_none_says_so_and_offers_nothing() -> None:
    async with running_ollama("m") as fake, opened(fake.port, host=[f"{fake.url}/elsewhere"]) as upstream:
        await upstream.listed()
        assert upstream.models == ()
        assert upstream.status()[0]["error"] == "GET /api/tags answered 404"


# -- hosts that do not answer ------------------------------------------------------------------------------------------


async def test_dead_and_silent_hosts_neither_delay_a_list_nor_hide_others() -> None:
    async with running_ollama("m") as fake, running_ollama("x", hang=["*"]) as mute, AsyncExitStack() as stack:
        hole = stack.enter_context(black_hole())
        slow: dict[str, Any] = {
            "connect_timeout_s": LATE_S,
            "first_byte_timeout_s": LATE_S,
            "listing_timeout_s": LISTING_TIMEOUT_S,
        }
        upstream = await stack.enter_async_context(opened(hole, free_port(), mute.port, fake.port, **slow))
        async with asyncio.timeout(PATIENCE_S):
            await upstream.listed()
        patient(upstream, LATE_S)  # from now on who waits for the silent ones is seen to do so
        async with asyncio.timeout(PATIENCE_S):
            assert upstream.models == ("m:latest",)
            assert [item["name"] for item in upstream.items()] == ["m:latest"]
            assert upstream.loaded() == []
            await upstream.listed()
            assert await upstream.find("m") == "m:latest"
        assert (await ask(upstream.model("m"), chat("m")))[0] == 200
        errors = [host.get("error", "") for host in upstream.status()]
        assert "did not answer within 2 s" in errors[0] and "did not answer within 2 s" in errors[2]
        assert "Connect call failed" in errors[1] or "refused" in errors[1]
        assert errors[3] == ""


async def test_a_silent_host_delays_the_answer_that_a_model_is_unknown_by_two_seconds_at_most() -> None:
    with black_hole() as hole:
        slow: dict[str, Any] = {"connect_timeout_s": LATE_S, "listing_timeout_s": LISTING_TIMEOUT_S}
        async with running_ollama("m") as fake, opened(fake.port, hole, pull="never", **slow) as upstream:
            async with asyncio.timeout(PATIENCE_S):
                assert await upstream.find("unknown") is None
        assert LISTING_TIMEOUT_S == 2.0


async def test_without_any_host_that_answers_a_model_is_not_unknown_but_out_of_reach() -> None:
    for pull in ("auto", "never"):
        async with opened(free_port(), free_port(), pull=pull) as upstream:
            assert await upstream.find("m") is None
            with pytest.raises(UpstreamFailed, match="cannot connect"):
                await ask(upstream.model("m"), chat("m"))


async def test_a_host_that_comes_back_is_noticed_and_kept_its_place_meanwhile() -> None:
    port = free_port()
    async with opened(port) as upstream:
        async with running_ollama("m", port=port) as fake:
            await upstream.listed()
            await until(lambda: upstream.models, what="the models")
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
            await upstream.hosts[0].refresh_loaded(0)
            assert upstream.has_loaded("M")
            await fake.kill()
            with pytest.raises(UpstreamFailed):
                await ask(upstream.model("m"), chat("m"))
            assert (upstream.models, upstream.loaded()) == (("m:latest",), [])
            assert "error" in upstream.status()[0]
        async with running_ollama("m", "n", port=port):
            await until(lambda: upstream.items() and "error" not in upstream.status()[0], what="the recovery")
            assert await upstream.find("n") == "n:latest"
            assert (await ask(upstream.model("n"), chat("n")))[0] == 200


# -- which host --------------------------------------------------------------------------------------------------------


async def test_a_model_is_asked_from_the_host_that_has_it_loaded() -> None:
    async with running_ollama("m") as idle, running_ollama("m") as warm:
        await load(warm, "m")
        async with opened(idle.port, warm.port) as upstream:
            await upstream.find("m")
            assert await answering(upstream, idle, warm, model="m", requests=6) == [0, 6]
            assert (await upstream.host_for("m")).url == warm.url
        assert idle.events("load") == []


async def test_a_model_that_is_loaded_nowhere_is_loaded_once_however_many_ask() -> None:
    async with (
        running_ollama("m", load_s=0.3) as first,
        running_ollama("m", load_s=0.3) as second,
        opened(first.port, second.port) as upstream,
    ):
        await upstream.find("m")
        assert sorted(await answering(upstream, first, second, model="m", requests=8)) == [0, 8]
        assert len(first.events("load") + second.events("load")) == 1


async def test_requests_for_a_model_that_all_have_loaded_go_to_the_least_busy_host() -> None:
    async with running_ollama("m", delay_s=0.2) as first, running_ollama("m", delay_s=0.2) as second:
        await load(first, "m")
        await load(second, "m")
        async with opened(first.port, second.port) as upstream:
            await upstream.find("m")
            assert await answering(upstream, first, second, model="m", requests=6) == [3, 3]
            assert [host["in_flight"] for host in upstream.status()] == [0, 0]


async def test_a_model_is_loaded_by_the_host_that_does_not_answer_somebody_else() -> None:
    async with (
        running_ollama("m", "other", thinking="hm", token_s=30) as busy,
        running_ollama("m") as idle,
        opened(busy.port, idle.port) as upstream,
    ):
        await upstream.find("m")
        async with upstream.model("other").open(chat("other", stream=True)) as stream:
            assert [host["in_flight"] for host in upstream.status()] == [1, 0]
            assert await answering(upstream, busy, idle, model="m", requests=2) == [0, 2]
            assert stream.status == 200


async def test_a_host_that_cannot_be_reached_is_passed_over() -> None:
    async with running_ollama("m") as first, running_ollama("m") as second:
        await load(first, "m")
        async with opened(first.port, second.port) as upstream:
            assert (await upstream.host_for("m")).url == first.url
            await first.kill()
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
            assert len(second.events("request", "/api/chat")) == 1
            assert (await upstream.host_for("m")).url == second.url


async def test_a_host_that_breaks_off_is_not_replaced_in_mid_request_but_a_second_try_meets_another_one() -> None:
    async with running_ollama("m", die_after=0) as first, running_ollama("m") as second:
        async with opened(first.port, second.port) as upstream:
            await upstream.find("m")
            for expected in ([1, 0], [0, 1]):
                before = [len(fake.events("request", "/api/chat")) for fake in (first, second)]
                with suppress(UpstreamFailed):
                    await ask(upstream.model("m"), chat("m"))
                after = [len(fake.events("request", "/api/chat")) for fake in (first, second)]
                assert [new - old for old, new in zip(before, after, strict=True)] == expected
        await first.set(die_after=2)
        async with opened(first.port, second.port) as upstream:
            await upstream.find("m")
            with pytest.raises(UpstreamFailed):
                async with upstream.model("m").open(chat("m", stream=True)) as response:
                    await response.read(2**20)


async def test_a_model_deleted_behind_our_back_is_asked_from_the_next_host() -> None:
    async with running_ollama("m") as first, running_ollama("m") as second:
        await load(first, "m")
        async with opened(first.port, second.port) as upstream:
            assert (await upstream.host_for("m")).url == first.url
            await first.set(models=[])
            assert (await ask(upstream.model("m"), chat("m")))[0] == 200
            assert len(second.events("request", "/api/chat")) == 1


async def test_an_answer_counts_also_if_its_model_was_deleted_meanwhile() -> None:
    hosts: list[Hosts] = []
    models = [{"name": "m", "model": "m"}]

    async def script(link: Link, request: Request) -> None:
        if "/api/chat" in request.line:
            models.clear()
            await hosts[0].hosts[0].refresh_tags(0)
        lists = {"/api/tags": {"models": models}, "/api/ps": {"models": []}, "/api/version": {"version": "0.13.0"}}
        await link.send(plain(orjson.dumps(lists.get(request.line.split()[1], {"done": True}))))

    async with raw_upstream(script) as server, opened(server.port) as upstream:
        hosts.append(upstream)
        assert await ask(upstream.model("m"), chat("m")) == (200, {"done": True})
        assert [request.line for request in server.requests].count("POST /api/chat HTTP/1.1") == 1


async def test_answers_pass_as_they_are_also_refusals() -> None:
    async with running_ollama("m", error=[400, "no tools"]) as fake, opened(fake.port) as upstream:
        assert await ask(upstream.model("m"), chat("m")) == (400, {"error": "no tools"})
        async with upstream.model("m").open(UpstreamRequest("POST", "/api/nothing", b"{}")) as response:
            assert (response.status, await response.read(100)) == (404, b"404 page not found")


async def test_the_key_is_sent_to_every_host_with_every_request() -> None:
    async with (
        running_ollama("m") as first,
        running_ollama("m") as second,
        opened(first.port, second.port, api_key="k") as upstream,
    ):
        await ask(upstream.model("m"), chat("m"))
        await upstream.listed()
        requests = first.events("request") + second.events("request")
        assert {event["path"] for event in requests} > {"/api/chat", "/api/tags"}
        assert {event["headers"].get("authorization") for event in requests} == {"Bearer k"}


async def test_a_client_that_leaves_frees_the_host_at_once() -> None:
    async with running_ollama("m", delay_s=30) as fake, opened(fake.port) as upstream:
        asking = asyncio.ensure_future(ask(upstream.model("m"), chat("m")))
        await until(lambda: fake.events("request", "/api/chat"), what="the request")
        assert upstream.status()[0]["in_flight"] == 1
        asking.cancel()
        await until(lambda: fake.events("closed", "/api/chat"), what="the end of the connection")
        await fake.set(delay_s=0, thinking="hm", token_s=30)
        async with upstream.model("m").open(chat("m", stream=True)) as response:
            assert response.status == 200  # and leaves in mid-stream
        await until(lambda: len(fake.events("closed", "/api/chat")) == 2, what="the end of the other connection")
        assert upstream.status()[0]["in_flight"] == 0
        assert asking.cancelled()


async def test_what_concerns_no_model_yet_goes_to_the_first_host_that_answers() -> None:
    async with running_ollama() as fake, opened(free_port(), fake.port) as upstream:
        await upstream.listed()
        host = await upstream.host_for(None)
        assert host.url == fake.url
        assert (await ask(host, UpstreamRequest("POST", "/api/create", b'{"model": "new", "stream": false}')))[0] == 200
        host.changed()
        assert await upstream.find("new") == "new:latest"
        assert (await upstream.host_for("new")).url == fake.url
        assert (await upstream.host_for("newer")).url == fake.url
