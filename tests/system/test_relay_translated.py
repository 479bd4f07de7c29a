"""Answers in another dialect than the server's: what is folded has a limit, and errors are told for what they are."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT
from tests.support.e2e_support import MESSAGES
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import Answer, BrokenAnswer, connected, post, request
from tests.support.stages import Stage
from tests.support.toxic import (
    DONE,
    EVENT_HEAD,
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    Script,
    chunk,
    event,
    head,
    plain,
    raw_upstream,
    stream,
    token,
)

MIB = 2**20
ASKED = {"model": "m", "messages": MESSAGES, "prompt": "hi", "max_tokens": 8, "stream": False}
"""A body that is good for every endpoint that generates."""
LINES = head(200, [("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")])


def calling(arguments: str) -> bytes:
    """A line of Ollama's `/api/chat` with a tool call."""
    call = f'{{"function":{{"name":"set_todo","arguments":{arguments}}}}}'
    message = f'{{"role":"assistant","content":"","tool_calls":[{call}]}}'
    return f'{{"model":"m","created_at":"x","message":{message},"done":false}}\n'.encode()


@asynccontextmanager
async def ollama_proxy(script: Script) -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    """A proxy in front of an Ollama that lists `m` and answers everything else by `script`."""
    item = b'{"name":"m:latest","model":"m:latest","size":1,"digest":"0","modified_at":"2026-01-01T00:00:00Z"}'

    async def serve(link: Link, request: Request) -> None:
        if request.line.split()[1] in ("/api/tags", "/api/ps", "/api/version"):
            await link.send(plain(b'{"version":"0.13.0","models":[%b]}' % item))
        else:
            await (link.send(script) if isinstance(script, bytes) else script(link, request))

    async with raw_upstream(serve) as upstream:
        config = {"backend": "ollama", "ollama": {"host": f"http://127.0.0.1:{upstream.port}"}}
        async with running_proxy(config) as proxy:
            yield proxy, upstream


@pytest.mark.parametrize("arguments", ['{"done":true}', '{"status":"success"}'])
async def test_an_answer_that_breaks_off_behind_a_call_about_being_done_is_broken(
    arguments: str,
) -> None:
    said = calling(arguments)
    async with ollama_proxy(LINES + chunk(said) + LAST_CHUNK) as (proxy, _), connected(proxy.port) as client:
        await client.send(request("POST", "/api/chat", ASKED | {"stream": True}))
        assert (await client.head())[1] == 200
        assert await client.chunk() == said
        assert (await client.chunk()).startswith(b'{"error":"')
        with pytest.raises(BrokenAnswer):
            await client.chunk()


@pytest.mark.parametrize("inputs", [["a", "", "ccc"], ["", "", "x"], ["", ""], [""]])
async def test_there_is_a_vector_for_each_input_in_its_place(
    proxy: Proxy, upstream: RawUpstream, inputs: list[str]
) -> None:
    """Each is told apart by its length."""

    async def script(link: Link, request: Request) -> None:
        got = request.json()["input"]
        data = [
            {"object": "embedding", "index": place, "embedding": [float(len(text))]} for place, text in enumerate(got)
        ]
        await link.send(plain(json.dumps({"data": data[::-1], "usage": {"prompt_tokens": 3}}).encode()))

    upstream.script = script
    answer = await post(proxy.port, "/api/embed", {"model": "m", "input": inputs})
    assert answer.json()["embeddings"] == [[len(text)] for text in inputs]
    assert upstream.requests[-1].json()["input"] == inputs


async def test_an_answer_without_end_is_refused_at_a_limit(proxy: Proxy, upstream: RawUpstream) -> None:
    piece = chunk(token("x" * MIB))
    sent = 0

    async def script(link: Link, request: Request) -> None:
        nonlocal sent
        await link.send(EVENT_HEAD)
        while sent < 2 * ANSWER_LIMIT:
            await link.send(piece)
            sent += len(piece)
        await link.send(chunk(DONE) + LAST_CHUNK)

    upstream.script = script
    answer = await post(proxy.port, "/api/chat", ASKED)
    assert (answer.status, list(answer.json())) == (502, ["error"])
    assert "64 MiB" in answer.json()["error"]
    await until(lambda: upstream.open_links == 0, what="the closing of the connection")
    assert sent < ANSWER_LIMIT + 16 * MIB
    assert len(upstream.requests) == 1, "it would be no shorter the second time"


def words_of(answer: Answer) -> str:
    """The words of an error, in whatever form."""
    error = answer.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize("index", [20_000_000, -1])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_a_tool_call_with_an_absurd_number_is_one_call(
    proxy: Proxy, upstream: RawUpstream, path: str, index: int
) -> None:
    call = {"index": index, "id": "x", "function": {"name": "f", "arguments": "{}"}}
    choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
    upstream.script = stream(event({"choices": [choice]}), DONE)
    before = proxy.peak_rss_bytes()
    answer = await post(proxy.port, path, ASKED)
    assert answer.status == 200
    calls = answer.json()["message"]["tool_calls"] if path == "/api/chat" else answer.json()["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["f"]
    assert proxy.peak_rss_bytes() - before < 64 * MIB
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_a_server_that_told_an_error_is_not_asked_again(proxy: Proxy, upstream: RawUpstream, path: str) -> None:
    error = {"error": {"code": 500, "message": "out of memory", "type": "server_error"}}
    upstream.script = stream(token("abc"), event(error))
    answer = await post(proxy.port, path, ASKED)
    assert (answer.status, "out of memory" in words_of(answer)) == (500, True)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
async def test_an_ollama_that_told_an_error_is_not_asked_again(stage: Stage, path: str) -> None:
    await stage.distant.set(error_after=2)
    seen = len(stage.distant.events("request"))
    answer = await post(stage.proxy.port, path, ASKED | {"model": "distant"})
    assert (answer.status, "unexpected EOF" in words_of(answer)) == (502, True)
    generating = [item["path"] for item in stage.distant.events("request")[seen:]]
    assert len([path for path in generating if path in ("/api/chat", "/api/generate")]) == 1


async def test_a_server_that_broke_off_is_asked_again(proxy: Proxy, upstream: RawUpstream) -> None:
    """Nobody has told an error then."""

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("abc")))
        link.close()

    upstream.script = script
    assert (await post(proxy.port, "/api/chat", ASKED)).status == 502
    assert len(upstream.requests) == 2
