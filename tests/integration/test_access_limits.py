"""Limits of API keys: what is counted, when it is released, and what clients get to know of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from tests.support import toxic
from tests.support.harness import until
from tests.support.keyed import CHAT, MESSAGES, USER, Keyed, answering, keyed
from tests.support.raw_client import request
from tests.support.toxic import Link, Request

PATHS = (CHAT, "/v1/messages", "/v1/responses", "/api/chat")
BODY: dict[str, Any] = {"model": "a1", "messages": MESSAGES, "max_tokens": 9, "input": "x", "stream": False}
PAGE = ("Origin", "http://localhost:5173")
TITLE = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n- x"
)


def limited(**limits: int) -> list[dict[str, object]]:
    return [{"name": "user", "key": USER, **limits}]


class Gated:
    """A server that answers chats once its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, link: Link, asked: Request) -> None:
        if asked.body:
            await self.gate.wait()
        await answering(link, asked)


def is_refusal(path: str, body: Any) -> bool:
    """Whether it is the error of a reached limit in the API of `path`."""
    if path.startswith("/api/"):
        return isinstance(body["error"], str) and "limit of" in body["error"]
    if path == "/v1/messages":
        return (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")
    return (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("path", PATHS)
async def test_a_reached_limit_is_429_in_each_api_with_its_headers(path: str) -> None:
    prefix = "anthropic-ratelimit-requests-{}" if path == "/v1/messages" else "x-ratelimit-{}-requests"
    async with keyed(limited(requests_per_minute=2)) as proxy:
        answers = [await proxy.ask("POST", path, BODY, key=USER, more=[PAGE]) for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert [answer.header(prefix.format("remaining")) for answer in answers] == ["1", "0", "0"]
        assert all(answer.header(prefix.format("limit")) == "2" for answer in answers)
        assert int(answers[-1].header("retry-after") or 0) >= 1 and is_refusal(path, answers[-1].json())
        for answer in answers:
            assert answer.header("access-control-allow-origin") == PAGE[1]
            assert prefix.format("reset") in (answer.header("access-control-expose-headers") or "")


async def test_a_stream_has_the_headers_too_and_an_unlimited_key_none() -> None:
    async with keyed([*limited(requests_per_minute=9, tokens_per_minute=99), "other-key-0123456789"]) as proxy:
        answer = await proxy.chat(USER, stream=True)
        assert (answer.status, answer.header("x-ratelimit-remaining-tokens")) == (200, "99")
        assert not [name for name, _ in (await proxy.chat("other-key-0123456789")).headers if "ratelimit" in name]


async def test_what_only_reads_is_not_counted_and_background_prompts_are() -> None:
    async with keyed(limited(requests_per_minute=2)) as proxy:
        for path in ("/v1/models", "/api/tags", "/health", "/v1/models"):
            answer = await proxy.ask("GET", path, key=USER)
            assert (answer.status, answer.header("x-ratelimit-remaining-requests")) == (200, "2")
        assert (await proxy.chat(USER, text=TITLE)).status == 200
        assert (await proxy.chat(USER)).status == 200
        assert (await proxy.chat(USER, text=TITLE)).status == 429


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat"])
async def test_tokens_of_prompt_and_answer_are_taken_when_they_are_known(path: str, stream: bool) -> None:
    async with keyed(limited(tokens_per_minute=50)) as proxy:
        statuses = [(await proxy.ask("POST", path, BODY | {"stream": stream}, key=USER)).status for _ in range(3)]
        assert statuses == [200, 200, 429]
        left = await proxy.ask("GET", "/v1/models", key=USER)
        assert left.header("x-ratelimit-remaining-tokens") == "0"


async def test_a_stream_that_its_client_leaves_is_not_free() -> None:
    async def endless(link: Link, asked: Request) -> None:
        if not asked.body:
            return await answering(link, asked)
        await link.send(toxic.EVENT_HEAD + toxic.chunk(toxic.token("Hi")))
        await link.gone()

    async with keyed(limited(tokens_per_minute=50), script=endless) as proxy:

        async def left() -> int:
            return int((await proxy.ask("GET", "/v1/models", key=USER)).header("x-ratelimit-remaining-tokens") or -1)

        while (before := await left()) > 0:
            async with proxy.connected() as client:
                await client.send(request("POST", CHAT, BODY | {"stream": True}, headers=[("x-api-key", USER)]))
                assert (await client.head())[1] == 200 and await client.chunk()
            await until(partial(_is_less, left, before))
        assert (await proxy.chat(USER)).status == 429


async def test_a_prompt_of_unknown_length_whose_client_leaves_is_not_free() -> None:
    """With a chunked body there is no Content-Length."""
    body = json.dumps({**BODY, "messages": [{"role": "user", "content": "x" * 40_000}]}).encode()
    chunked = b"Transfer-Encoding: chunked"
    async with keyed(limited(tokens_per_minute=5000), script=Gated()) as proxy:
        async with proxy.connected() as client:
            head = request("POST", CHAT, b"", headers=[("x-api-key", USER)]).replace(b"Content-Length: 0", chunked)
            assert chunked in head
            await client.send(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            await until(lambda: proxy.sent(CHAT))
        app = proxy.app
        assert app is not None
        await until(lambda: not app.proxy.running.requests)
        assert (await proxy.chat(USER)).status == 429


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/props?model=a1", "/slots?model=a1", "/lora-adapters?model=a1"])
async def test_what_only_reads_counts_if_it_can_load_a_model(path: str, method: str) -> None:
    async with keyed(limited(requests_per_minute=2)) as proxy:
        statuses = [(await proxy.ask(method, path, key=USER)).status for _ in range(3)]
        assert 429 not in statuses[:2] and statuses[2] == 429
        assert (await proxy.ask(method, "/v1/models", key=USER)).status == 200


async def _is_less(left: Callable[[], Awaitable[int]], before: int) -> bool:
    return await left() < before


async def test_requests_beyond_those_at_one_time_are_refused_until_one_has_ended() -> None:
    upstream = Gated()
    async with keyed(limited(concurrent=2), script=upstream) as proxy:
        running = [asyncio.ensure_future(proxy.chat(USER)) for _ in range(2)]
        await until(lambda: len(proxy.sent(CHAT)) == 2)
        refused = await proxy.chat(USER)
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert (await proxy.ask("GET", "/v1/models", key=USER)).status == 200
        upstream.gate.set()
        assert [(await answer).status for answer in running] == [200, 200]
        assert (await proxy.chat(USER)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_leaves_takes_no_place_any_more(path: str, stream: bool) -> None:
    upstream = Gated()
    async with keyed(limited(concurrent=1), script=upstream) as proxy:
        for _ in range(3):
            async with proxy.connected() as client:
                await client.send(request("POST", path, BODY | {"stream": stream}, headers=[("x-api-key", USER)]))
                await until(lambda: any(asked.body for asked in proxy.upstream.requests))
                assert (await proxy.chat(USER)).status == 429
            await until_free(proxy)
            proxy.upstream.requests.clear()


@pytest.mark.parametrize(
    ("path", "answer"), [(CHAT, b"[]\n"), ("/v1/responses", b'{"response": null}'), ("/v1/messages", b"5\n")]
)
async def test_an_answer_of_any_form_is_sent_on_and_ends_its_request(path: str, answer: bytes) -> None:
    async def odd(link: Link, asked: Request) -> None:
        await link.send(toxic.plain(answer))

    async with keyed(limited(concurrent=1, tokens_per_minute=1000), script=odd) as proxy:
        app = proxy.app
        assert app is not None
        assert [(await proxy.ask("POST", path, BODY, key=USER)).status != 500 for _ in range(2)] == [True, True]
        await proxy.reload()
        await until(lambda: not app.ending, what="the end of the earlier configuration")


async def until_free(proxy: Keyed) -> None:
    """Wait until the key's only place is free; an invalid request takes it only for a moment."""

    async def is_free() -> bool:
        return (await proxy.ask("POST", "/v1/chat/completions", {"model": 1}, key=USER)).status == 400

    await until(is_free)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, {"model": "no-such", "messages": MESSAGES}),
        ("POST", CHAT, {"model": ["a1"], "messages": MESSAGES}),
        ("POST", "/models/load", {"model": "a1"}),
        ("POST", "/nowhere", {}),
        ("PUT", CHAT, {}),
        ("POST", "/v1/audio/transcriptions", {}),
    ],
)
async def test_a_request_that_fails_takes_no_place_any_more(method: str, path: str, body: dict[str, Any]) -> None:
    async with keyed(limited(concurrent=1)) as proxy:
        for _ in range(3):
            assert (await proxy.ask(method, path, body, key=USER)).status in (400, 403, 404, 405)
        assert (await proxy.chat(USER)).status == 200
