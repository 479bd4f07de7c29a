"""Streams that already have their headers when the model's server answers: whatever it answers, and whoever leaves.

A second is 50 ms here. The server is silent until the client has had a sign of life.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.base import Feature
from llama_smart_proxy.backends.openai import RemoteModel
from llama_smart_proxy.proxy.stream import waiting
from tests.support import raw_client, toxic
from tests.support.agent_clients import WAYS, Said, Way, write_agent
from tests.support.harness import until
from tests.support.here import served_here
from tests.support.toxic import DONE, Link, RawUpstream, Request, raw_upstream

RELAYED, TRANSLATED = (
    next(way for way in WAYS if way.stream and way.path == path) for path in ("/v1/chat/completions", "/api/chat")
)
both = pytest.mark.parametrize("way", [RELAYED, TRANSLATED], ids=["relayed", "translated"])
SIGN = b": waiting\n\n"
WHOLE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
ROLE = toxic.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]})
END = toxic.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + DONE
STREAM = toxic.stream(ROLE, toxic.token("Hel"), toxic.token("lo"), END)
REFUSAL = json.dumps({"error": {"message": "too many", "type": "rate_limit_error", "code": 429}}).encode()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LOOK_S", 0.05), ("SIGN_S", 0.1), ("SLACK_S", 0.01)):
        monkeypatch.setattr(waiting, name, seconds)


class Slow:
    """A server that sends one of `answers` for each request, once `go` is set; without any left, it hangs up."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.go = asyncio.Event()

    async def __call__(self, link: Link, request: Request) -> None:
        await self.go.wait()
        if self.answers:
            await link.send(self.answers.pop(0))
        if not self.answers:
            link.close()


@asynccontextmanager
async def proxied(
    script: Callable[[Link, Request], Awaitable[None]], **settings: Any
) -> AsyncIterator[tuple[int, RawUpstream]]:
    async with raw_upstream(script) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with served_here({"remotes": {"up": remote}, **settings}) as (_, port):
            yield port, upstream


async def answered(way: Way, server: Slow) -> tuple[Said, RawUpstream]:
    """What a client gets that has had a sign of life before the server's answer."""
    async with proxied(server) as (port, upstream), raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", way.path, way.body("hi")))
        _, status, _ = await client.head()
        data, intact = await client.chunk(), True
        assert status == 200
        server.go.set()
        try:
            while piece := await client.chunk():
                data += piece
        except (raw_client.BrokenAnswer, ConnectionError):
            intact = False
    return way.read_stream(data.replace(SIGN, b""), intact), upstream


@both
@pytest.mark.parametrize(
    ("answer", "text", "error"),
    [
        (STREAM, "Hello", None),
        (toxic.plain(json.dumps(WHOLE).encode()), "Hello", None),
        (toxic.plain(REFUSAL, 429), "", "too many"),
        (toxic.plain(REFUSAL), "", "too many"),
        (toxic.plain(b"<html>no</html>", 502), "", "<html>no</html>"),
        (toxic.plain(b"null"), "", "the model server"),
        (toxic.plain(b" " * 1_100_000), "", "the model server"),
        (toxic.EVENT_HEAD + toxic.chunk(ROLE + toxic.token("Hel")), "Hel", "the model server"),
    ],
    ids=["stream", "whole", "refusal", "error 200", "page", "null", "large", "cut"],
)
async def test_any_answer_after_a_sign_of_life_has_the_form_of_a_stream(
    way: Way, answer: bytes, text: str, error: str | None
) -> None:
    said, _ = await answered(way, Slow(answer))
    assert said.text.removesuffix(f"\n\n**Error:** {said.error}") == text
    assert said.error == error if error is None else error in (said.error or "")


@both
@pytest.mark.parametrize("begun", [b"", toxic.EVENT_HEAD, toxic.EVENT_HEAD + toxic.chunk(b": ping\n\n")])
async def test_signs_of_life_are_no_answer_so_a_request_whose_server_hangs_up_is_sent_again(
    way: Way, begun: bytes
) -> None:
    class Flaky(Slow):
        async def __call__(self, link: Link, request: Request) -> None:
            if len(self.answers) == 2:
                await self.go.wait()
                await link.send(self.answers.pop(0))
                link.reset()
            else:
                await super().__call__(link, request)

    said, upstream = await answered(way, Flaky(begun, STREAM))
    assert (said.text, said.error) == ("Hello", None) and len(upstream.requests) == 2


async def test_an_announcement_is_passed_on_and_ends_no_wait() -> None:
    token = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.EVENT_HEAD + toxic.chunk(ROLE))
        await token.wait()
        await link.send(toxic.chunk(toxic.token("Hi") + END) + toxic.LAST_CHUNK)

    async with proxied(script) as (port, _), raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", RELAYED.path, RELAYED.body("hi")))
        await client.head()
        assert [await client.chunk() for _ in range(3)] == [ROLE, SIGN, SIGN]
        token.set()
        rest = b""
        while piece := await client.chunk():
            rest += piece
    assert rest.replace(SIGN, b"") == toxic.token("Hi") + END


@both
async def test_a_client_of_http_1_0_gets_signs_of_life_without_chunks(way: Way) -> None:
    server = Slow(STREAM)
    async with proxied(server) as (port, _), raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", way.path, way.body("hi"), version="HTTP/1.0"))
        _, status, headers = await client.head()
        assert status == 200 and "transfer-encoding" not in dict(headers)
        data = await client.some()
        server.go.set()
        data += await client.rest()
    assert way.read_stream(data.replace(SIGN, b""), True).text == "Hello"


@both
async def test_a_client_that_leaves_while_it_waits_is_looked_at_no_more_and_frees_the_server(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone: list[waiting.Waits] = []
    init = waiting.Waits.__init__

    def remember(waits: waiting.Waits, *args: Any) -> None:
        init(waits, *args)
        everyone.append(waits)

    monkeypatch.setattr(waiting.Waits, "__init__", remember)
    async with proxied(Slow(STREAM)) as (port, upstream):
        async with raw_client.connected(port) as client:
            await client.send(raw_client.request("POST", way.path, way.body("hi")))
            await client.head()
            await client.chunk()
            client.leave()
        await until(lambda: upstream.open_links == 0, what="the end of the request to the server")
        await until(lambda: not everyone[0].count, what="the end of the wait")


@both
async def test_without_early_headers_a_slow_failure_has_its_status(way: Way) -> None:
    server = Slow(toxic.plain(REFUSAL, 429))
    async with raw_upstream(server) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        settings = {"remotes": {"up": remote}, "server": {"early_headers": False}}
        async with served_here(settings) as (_, port), raw_client.connected(port) as client:
            await client.send(raw_client.request("POST", way.path, way.body("hi")))
            await until(lambda: bool(upstream.requests), what="the request")
            await asyncio.sleep(0.2)  # four times what is waited for otherwise
            server.go.set()
            assert (await client.head())[1] == 429


async def test_an_error_without_a_line_end_is_passed_on_where_reports_are_taken_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RemoteModel, "features", frozenset({Feature.PROGRESS}))
    report = toxic.event({"prompt_progress": {"total": 4, "processed": 1}})

    async def script(link: Link, request: Request) -> None:
        assert request.json()["return_progress"]
        await link.send(toxic.EVENT_HEAD + toxic.chunk(report + b"data: " + REFUSAL) + toxic.LAST_CHUNK)

    headers = [("X-OpenWebUI-Chat-Id", "6f5e")]
    async with proxied(script) as (port, _), raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", RELAYED.path, RELAYED.body("hi"), headers=headers))
        assert (await client.head())[1] == 200
        data = b""
        while piece := await client.chunk():
            data += piece
    assert RELAYED.read_stream(data, True).error == "too many" and b"prompt_progress" not in data


OBSTINATE = """
class Obstinate(Agent):
    async def on_request(self, request, ctx):
        request.stream = False

    async def on_chunk(self, chunk, ctx):
        return chunk
"""


@both
async def test_a_client_with_headers_gets_a_stream_whatever_an_agent_sets(way: Way, tmp_path: Path) -> None:
    write_agent(tmp_path, "obstinate", OBSTINATE)
    server, settings = Slow(STREAM), {"agents": ["obstinate"], "agents_dirs": [str(tmp_path)]}
    async with proxied(server, **settings) as (port, _), raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", way.path, way.body("hi", agents=["obstinate"])))
        await client.head()
        data = await client.chunk()
        server.go.set()
        while piece := await client.chunk():
            data += piece
    assert way.read_stream(data.replace(SIGN, b""), True).text == "Hello"
