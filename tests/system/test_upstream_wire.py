"""What odd servers send over the wire arrives at every client as what it means: relayed, with an agent, translated."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from tests.support.harness import Proxy, running_proxy
from tests.support.raw_client import Answer, connected, post, request
from tests.support.toxic import (
    DONE,
    EVENT_HEAD,
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    chunk,
    event,
    head,
    plain,
    stream,
    token,
)

CHAT = "/v1/chat/completions"
CHUNKED = ("Transfer-Encoding", "chunked")
MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = {"model": "m", "messages": MESSAGES, "max_tokens": 9}
FINISH = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
WHOLE = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi there"}, "finish_reason": "stop"}]}
ANSWER = token("Hi") + token(" there") + FINISH
CLIENTS = {"relayed": CHAT, "with an agent": CHAT, "Ollama": "/api/chat"}


def typed(kind: str, body: bytes, *headers: tuple[str, str]) -> bytes:
    return head(200, [("Content-Type", kind), CHUNKED, *headers]) + chunk(body) + LAST_CHUNK


def packed(data: bytes, bits: int) -> bytes:
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(data) + packer.flush()


GZIP = ("Content-Encoding", "gzip")
SCRIPTS = {
    "no end mark": stream(ANSWER),
    "no end mark, several events after the last one": stream(ANSWER, event({"choices": []}), event({"choices": []})),
    "no end mark, no last blank line": stream(ANSWER.rstrip(b"\n")),
    "blanks round the end mark": stream(ANSWER, b"data:   [DONE]  \n\n"),
    "a byte order mark": stream(b"\xef\xbb\xbf" + ANSWER, DONE),
    "a content type in capitals": typed("TEXT/Event-Stream; Charset=UTF-8", ANSWER + DONE),
    "a wrong content type": typed("text/plain", ANSWER + DONE),
    "no content type": head(200, [CHUNKED]) + chunk(ANSWER + DONE) + LAST_CHUNK,
    "a whole completion": plain(orjson.dumps(WHOLE)),
    "a whole completion in a list": plain(b"[" + orjson.dumps(WHOLE) + b"]"),
    "lines of JSON": typed("application/x-ndjson", ANSWER.replace(b"data: ", b"").replace(b"\n\n", b"\n")),
    "a status of creation": stream(ANSWER, DONE).replace(b" 200 ", b" 201 ", 1),
    "carriage returns, no end mark": stream(ANSWER.replace(b"\n", b"\r")),
    "a whole completion as a stream": typed("text/event-stream", orjson.dumps(WHOLE)),
    "gzip": typed("text/event-stream", gzip.compress(ANSWER + DONE), GZIP),
    "gzip, an event a member": typed("text/event-stream", gzip.compress(ANSWER) + gzip.compress(DONE), GZIP),
    "deflate": typed("text/event-stream", packed(ANSWER + DONE, 15), ("Content-Encoding", "deflate")),
}


@asynccontextmanager
async def with_agent(upstream: RawUpstream) -> AsyncIterator[Proxy]:
    remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
    async with running_proxy({"remotes": {"up": remote}, "agents": ["think"]}) as proxy:
        yield proxy


async def asked(proxy: Proxy, client: str) -> Answer:
    return await post(proxy.port, CLIENTS[client], ASKED | {"stream": True})


def text_of(answer: Answer, client: str) -> str:
    """The text of a stream, whose end must be there."""
    lines = [line.removeprefix(b"data:").strip() for line in answer.body.splitlines()]
    found = [orjson.loads(line) for line in lines if line.startswith(b"{")]
    assert answer.status in (200, 201) and not any("error" in value for value in found), answer.body
    if client == "Ollama":
        assert [value["done"] for value in found] == [False] * (len(found) - 1) + [True]
        return "".join(value["message"]["content"] for value in found)
    assert lines.count(b"[DONE]") == 1 and answer.body.startswith(b"data: {")
    choices = [choice for value in found for choice in value["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("name", SCRIPTS)
async def test_every_client_gets_the_answer_that_is_meant(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    upstream.script = SCRIPTS[name]
    async with with_agent(upstream) as agents:
        for client in CLIENTS:
            answer = await asked(agents if client == "with an agent" else proxy, client)
            assert text_of(answer, client) == "Hi there", client
            kind = "application/x-ndjson" if client == "Ollama" else "text/event-stream"
            assert (answer.header("content-type") or "").lower().startswith(kind)
            assert answer.header("content-encoding") is None


@pytest.mark.parametrize("name", ["no end mark", "carriage returns, no end mark", "lines of JSON", "gzip"])
async def test_a_stream_that_was_not_requested_becomes_a_whole_answer(
    proxy: Proxy, upstream: RawUpstream, name: str
) -> None:
    upstream.script = SCRIPTS[name]
    async with with_agent(upstream) as agents:
        for client, path in CLIENTS.items():
            asked_of = agents if client == "with an agent" else proxy
            answer = await post(asked_of.port, path, ASKED | {"stream": False})
            assert (answer.status, answer.header("content-type")) == (200, "application/json"), client
            message = answer.json()["message"] if client == "Ollama" else answer.json()["choices"][0]["message"]
            assert message["content"] == "Hi there"


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (plain(b'{"error":{"message":"quota exceeded","code":429}}'), 429, "quota exceeded"),
        (typed("text/event-stream", b'{"error":{"message":"busy","code":503}}'), 503, "busy"),
        (stream(event({"error": {"message": "too many requests", "code": "429"}})), 429, "too many requests"),
        (plain(b'{"detail":"who are you"}'), 502, "who are you"),
        (typed("text/html", b"<html>Log in</html>"), 502, "a web page instead of a completion"),
        (typed("text/event-stream", b"<html>Log in</html>"), 502, "a web page instead of a completion"),
        (plain(b'"a text"'), 502, "the model server"),
        (head(307, [("Location", "/login"), ("Content-Length", "0")]), 502, "redirects to /login"),
        (plain(b'[{"error":{"message":"no such key","code":400}}]', 400), 400, "no such key"),
        (plain(b'{"detail":"who are you"}', 401), 401, "who are you"),
        (plain(b'\xef\xbb\xbf{"error":{"message":"it broke \xff"}}', 500), 500, "it broke \ufffd"),
        (
            typed("text/event-stream", event({"error": {"message": "bad key"}})).replace(b" 200 ", b" 401 "),
            401,
            "bad key",
        ),
        (typed("text/event-stream", b"x" * 40, ("Content-Encoding", "br")), 502, "compressed with 'br'"),
        (typed("text/event-stream", b"x" * 40, GZIP), 502, "cannot be decompressed"),
    ],
)
async def test_every_client_gets_the_error_that_is_meant(
    proxy: Proxy, upstream: RawUpstream, script: bytes, status: int, message: str
) -> None:
    upstream.script = script
    async with with_agent(upstream) as agents:
        for client in CLIENTS:
            if client == "relayed" and b"data:" in script and b" 200 " in script:
                continue  # an error event is relayed as it is
            answer = await asked(agents if client == "with an agent" else proxy, client)
            error = answer.json()["error"]
            assert (answer.status, message in str(error)) == (status, True), (client, answer.body)
            assert isinstance(error, str) == (client == "Ollama")


async def test_an_error_behind_blank_lines_in_place_of_a_stream_is_told(proxy: Proxy, upstream: RawUpstream) -> None:
    gate = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(b"\r\n"))
        await gate.wait()
        await link.send(chunk(b'{"error":{"message":"quota exceeded","code":429}}') + LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, ASKED | {"stream": True}))
        assert (await client.head())[1] == 200
        gate.set()
        body = b""
        while piece := await client.chunk():
            body += piece
        assert (
            b"quota exceeded" in body and body.endswith(b"data: [DONE]\n\n") and b"before it was complete" not in body
        )


@pytest.mark.parametrize(
    "timings", ["x", 1, [], [1], True, {"prompt_n": "x", "predicted_ms": None, "prompt_ms": 1e300}]
)
async def test_counts_that_are_none_do_not_fail_an_answer(proxy: Proxy, upstream: RawUpstream, timings: object) -> None:
    last = event({"choices": [], "timings": timings, "usage": timings})
    upstream.script = stream(token("Hi"), FINISH, last, DONE)
    async with with_agent(upstream) as agents:
        for asked_of in (proxy, agents):
            for streamed in (True, False):
                answer = await post(asked_of.port, "/api/chat", ASKED | {"stream": streamed})
                assert answer.status == 200 and b"error" not in answer.body, (streamed, answer)
                assert orjson.loads(answer.body.splitlines()[-1])["done"] is True


async def test_a_small_answer_that_decompresses_to_a_large_one_is_an_error(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = typed("text/event-stream", gzip.compress(b"\0" * 2**26), GZIP)
    async with with_agent(upstream) as agents:
        for client in CLIENTS:
            answer = await asked(agents if client == "with an agent" else proxy, client)
            assert b'"error"' in answer.body and len(answer.body) < 2**24, client


@pytest.mark.parametrize(
    ("client", "streamed"),
    [("relayed", True), *((client, streamed) for client in ("with an agent", "Ollama") for streamed in (True, False))],
)
async def test_the_end_of_the_answer_is_not_that_of_the_connection(
    proxy: Proxy, upstream: RawUpstream, client: str, streamed: bool
) -> None:
    """The server sends the end mark and keeps the connection open until the client has everything."""
    received = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(ANSWER) + chunk(DONE))
        await received.wait()
        await link.send(LAST_CHUNK)

    upstream.script = script
    async with with_agent(upstream) as agents:
        asked_of = agents if client == "with an agent" else proxy
        answer = await post(asked_of.port, CLIENTS[client], ASKED | {"stream": streamed})
        assert answer.status == 200
        received.set()


async def test_a_connection_whose_end_comes_later_is_used_again(proxy: Proxy, upstream: RawUpstream) -> None:
    received = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(ANSWER) + chunk(DONE))
        if not received.is_set():
            await received.wait()
        await link.send(LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, ASKED | {"stream": True}))
        await client.answer()
        received.set()
        await asyncio.sleep(0)
        for _ in range(3):
            await client.send(request("POST", CHAT, ASKED | {"stream": True}))
            await client.answer()
    assert len(upstream.requests) == 4
    assert len(upstream.links) < 4


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"error":{"message":"quota exceeded","code":429}}', 429, "quota exceeded"),
        (b'\n{\n "error": "it broke"\n}', 502, "it broke"),
        (b"<!DOCTYPE html><html>Log in</html>", 502, "a web page instead of a completion"),
    ],
)
async def test_a_relayed_answer_that_is_an_error_has_its_status(
    proxy: Proxy, upstream: RawUpstream, body: bytes, status: int, message: str
) -> None:
    upstream.script = plain(body)
    answer = await post(proxy.port, CHAT, ASKED)
    assert (answer.status, message in answer.json()["error"]["message"]) == (status, True)
    upstream.script = plain(b'{\n "error": null, "choices": []}')
    assert (await post(proxy.port, CHAT, ASKED)).status == 200


TOO_LONG = "request (932 tokens) exceeds the available context size (64 tokens), try increasing it"
"""Source: llama.cpp tools/server/server-context.cpp, b11434."""


def refusal(status: int, message: str, **fields: object) -> bytes:
    return plain(orjson.dumps({"error": {"code": status, "message": message, **fields}}), status)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        (
            "/v1/messages",
            {"type": "invalid_request_error", "message": "prompt is too long: 932 tokens > 64 maximum"},
        ),
        (
            CHAT,
            {
                "message": TOO_LONG,
                "type": "invalid_request_error",
                "param": None,
                "code": "context_length_exceeded",
                "n_prompt_tokens": 932,
                "n_ctx": 64,
            },
        ),
        ("/api/chat", "the input length exceeds the context length"),
    ],
)
async def test_a_prompt_over_the_context_has_the_message_that_clients_match(
    proxy: Proxy, upstream: RawUpstream, path: str, error: object, streamed: bool
) -> None:
    upstream.script = refusal(400, TOO_LONG, type="exceed_context_size_error", n_prompt_tokens=932, n_ctx=64)
    answer = await post(proxy.port, path, ASKED | {"stream": streamed})
    assert (answer.status, answer.json()["error"]) == (400, error)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (501, "api_error"),
        (503, "overloaded_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_every_error_of_an_anthropic_endpoint_has_anthropics_form(
    proxy: Proxy, upstream: RawUpstream, path: str, status: int, kind: str
) -> None:
    for script in (refusal(status, "no", type="server_error"), plain(b"<html>no</html>", status), plain(b"no", status)):
        upstream.script = script
        answer = await post(proxy.port, path, ASKED)
        assert answer.status == status
        body = answer.json()
        assert (body["type"], body["error"]["type"]) == ("error", kind) and "no" in body["error"]["message"]


async def test_an_error_in_anthropics_form_passes_as_it_is(proxy: Proxy, upstream: RawUpstream) -> None:
    body = b'{"type": "error", "error": {"type": "billing_error", "message": "no"}, "request_id": "r"}'
    upstream.script = plain(body, 402)
    assert (await post(proxy.port, "/v1/messages", ASKED)).body == body
