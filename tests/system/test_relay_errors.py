"""What a client is told when the model server fails: a status before the first byte, after it one error in-stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

import openai
import pytest

from tests.conftest import Shared
from tests.support import toxic
from tests.support.harness import Proxy
from tests.support.raw_client import Answer, BrokenAnswer, ask, connected, post, request
from tests.support.toxic import (
    DONE,
    EVENT_HEAD,
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    chunk,
    cut_short,
    event,
    head,
    plain,
    token,
)

CHAT = "/v1/chat/completions"
STREAM = {"model": "m", "stream": True}
DIED = "upstream_disconnected"
INCOMPLETE = "upstream_incomplete"


def named(kind: str, **more: object) -> bytes:
    return b"event: " + kind.encode() + b"\n" + event({"type": kind, **more})


@dataclass(frozen=True)
class Api:
    """A streaming endpoint: its events, the last of them the proper end, and its own words for an error."""

    path: str
    events: list[bytes]
    error: Callable[[bytes], dict[str, object]]
    """The error object in the one error event; fails when that is not of the right shape."""
    ending: bytes = b""


def data_of(frame: bytes, start: bytes) -> dict[str, object]:
    assert frame.startswith(start) and frame.endswith(b"\n\n") and frame.count(b"\n\n") == 1, frame
    value = json.loads(frame[len(start) : -2])
    assert isinstance(value, dict)
    return value


def openai_error(frame: bytes) -> dict[str, object]:
    (error,) = data_of(frame, b"data: ").values()
    assert isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    return error


def responses_error(frame: bytes) -> dict[str, object]:
    error = data_of(frame, b"event: error\ndata: ")
    assert set(error) == {"type", "message", "param", "code", "error"} and error["type"] == "error"
    return error


def anthropic_error(frame: bytes) -> dict[str, object]:
    whole = data_of(frame, b"event: error\ndata: ")
    assert set(whole) == {"type", "error"} and whole["type"] == "error"
    error = whole["error"]
    assert isinstance(error, dict) and set(error) == {"type", "message"} and error["type"] == "api_error"
    return error


NATIVE_EVENTS = [event({"content": text, "stop": False}) for text in "ab"] + [event({"content": "", "stop": True})]
APIS = {
    "chat": Api(CHAT, [token("a"), token("b"), DONE], openai_error, DONE),
    "completions": Api("/v1/completions", [event({"choices": [{"text": "a"}]}), DONE], openai_error, DONE),
    "native": Api("/completion", NATIVE_EVENTS, openai_error),
    "responses": Api(
        "/v1/responses",
        [named("response.created"), named("response.output_text.delta", delta="a"), named("response.completed")],
        responses_error,
    ),
    "messages": Api(
        "/v1/messages",
        [named("message_start"), named("content_block_delta", delta={"text": "a"}), named("message_stop")],
        anthropic_error,
    ),
}
every_api = pytest.mark.parametrize("api", [pytest.param(api, id=name) for name, api in APIS.items()])


def check_failed(api: Api, body: bytes, before: bytes, code: str) -> None:
    """`body` must be `before`, one error event with `code`, and what this API's clients wait for at the end."""
    assert body.startswith(before) and body.endswith(api.ending), body
    frame = body[len(before) : len(body) - len(api.ending)]
    error = api.error(frame)
    assert error["message"]
    assert error.get("code", code) == code
    assert b"finish_reason" not in frame and b"stop" not in frame


# -- in mid-stream -----------------------------------------------------------------------------------------------------


@every_api
@pytest.mark.parametrize("ending", ["reset", "close"])
async def test_server_that_dies_after_n_events_is_told_in_the_stream(
    proxy: Proxy, upstream: RawUpstream, api: Api, ending: str
) -> None:
    for count in range(1, len(api.events)):
        got_it = asyncio.Event()

        async def script(link: Link, request: Request, count: int = count, got_it: asyncio.Event = got_it) -> None:
            await link.send(EVENT_HEAD + b"".join(chunk(item) for item in api.events[:count]))
            await got_it.wait()
            getattr(link, ending)()

        upstream.script = script
        async with connected(proxy.port) as client:
            await client.send(request("POST", api.path, STREAM))
            assert (await client.head())[1] == 200
            body = await client.chunk()
            got_it.set()
            while piece := await client.chunk():
                body += piece
            check_failed(api, body, b"".join(api.events[:count]), DIED)
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200, "the connection is as good as before"
        assert len(upstream.requests) == count, "after the first byte nothing is sent twice"


async def test_http_1_0_client_is_told_too(proxy: Proxy, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        link.close()

    upstream.script = script
    answer = await ask(proxy.port, request("POST", CHAT, STREAM, version="HTTP/1.0"))
    check_failed(APIS["chat"], answer.body, token("a"), DIED)


async def test_official_client_raises_when_the_server_dies(shared: Shared, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")) + chunk(token("b")))
        link.close()

    upstream.script = script
    async with openai.AsyncOpenAI(base_url=f"{shared.proxy.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        texts = []
        with pytest.raises(openai.APIError, match="model server"):
            async for item in stream:
                texts.append(item.choices[0].delta.content)
        assert texts == ["a", "b"]


# -- before the first byte ---------------------------------------------------------------------------------------------

EARLY: dict[str, tuple[bytes, str]] = {
    "reset at once": (b"", "reset"),
    "closed at once": (b"", "close"),
    "half a head": (head(200)[:-2], "close"),
    "an informational answer": (head(100), "close"),
    "stream: headers, then reset": (EVENT_HEAD, "reset"),
    "stream: headers, then closed": (EVENT_HEAD, "close"),
    "plain: headers, then reset": (plain(b"0123456789")[:-10], "reset"),
    "plain: half a body, then closed": (plain(b"0123456789")[:-5], "close"),
    "not HTTP": (b"garbage\r\n\r\n", "close"),
}
GOOD = {True: toxic.stream(token("a"), DONE), False: plain(b'{"a":1}')}


async def warm_up(proxy: Proxy, upstream: RawUpstream) -> None:
    """Leave one idle connection to `upstream` in the proxy."""
    upstream.script = plain(b"{}")
    assert (await post(proxy.port, CHAT, {"model": "m"})).status == 200
    upstream.requests.clear()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("early", EARLY)
async def test_death_before_the_first_byte_is_retried_once(
    proxy: Proxy, upstream: RawUpstream, early: str, warm: bool, streaming: bool
) -> None:
    said, ending = EARLY[early]
    if warm:
        await warm_up(proxy, upstream)
    deaths = 1

    async def script(link: Link, request: Request) -> None:
        if len(upstream.requests) > deaths:
            return await link.send(GOOD[streaming])
        await link.send(said)
        getattr(link, ending)()

    upstream.script = script
    body = {"model": "m", "stream": streaming}
    answer = await post(proxy.port, CHAT, body)
    assert answer.status == 200
    assert answer.body == (token("a") + DONE if streaming else b'{"a":1}')
    assert len(upstream.requests) == 2
    assert upstream.requests[0] == upstream.requests[1]

    upstream.requests.clear()
    deaths = 1000
    answer = await post(proxy.port, CHAT, body)
    assert (answer.status, answer.error["code"]) == (502, DIED)
    assert answer.error["type"] == "server_error"
    assert len(upstream.requests) == 2


async def test_nobody_listening_is_a_502(shared: Shared) -> None:
    answer = await post(shared.proxy.port, CHAT, {"model": "m"})
    assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")


# -- cut anywhere ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["close", "reset"])
@every_api
async def test_stream_cut_anywhere_is_never_a_silent_success(
    proxy: Proxy, upstream: RawUpstream, api: Api, ending: str
) -> None:
    """At every single byte. What arrives of a frame that was cut is not passed on."""
    whole = b"".join(api.events)
    wire = EVENT_HEAD + b"".join(chunk(item) for item in api.events) + LAST_CHUNK
    boundaries = [b"".join(api.events[:count]) for count in range(len(api.events))]
    async with connected(proxy.port) as client:
        for cut in range(len(wire)):
            upstream.script = cut_short(wire[:cut], ending)
            await client.send(request("POST", api.path, STREAM))
            answer = await client.answer()
            if answer.status != 200:
                assert answer.status == 502 and answer.json()["error"]["message"]
            elif answer.body != whole:
                before = max((edge for edge in boundaries if answer.body.startswith(edge)), key=len)
                check_failed(api, answer.body, before, DIED)


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_plain_answer_cut_anywhere_is_a_502(
    proxy: Proxy, upstream: RawUpstream, framing: str, ending: str
) -> None:
    wire = plain(b'{"a":"0123456789"}')
    if framing == "chunks":
        wire = head(200, [("Transfer-Encoding", "chunked")]) + chunk(b'{"a":"0123') + chunk(b'456789"}') + LAST_CHUNK
    async with connected(proxy.port) as client:
        for cut in range(len(wire)):
            upstream.script = cut_short(wire[:cut], ending)
            await client.send(request("POST", CHAT, {"model": "m"}))
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (502, DIED)


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_large_answer_cut_short_is_a_broken_answer(
    proxy: Proxy, upstream: RawUpstream, version: str, ending: str
) -> None:
    passed_on = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(plain(b"x" * (4 * 2**20))[: 3 * 2**20])
        await passed_on.wait()  # a reset overtakes what the proxy has not read, and before the first byte it is a 502
        getattr(link, ending)()

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, {"model": "m"}, version=version))
        assert (await client.head())[1] == 200
        passed_on.set()
        with pytest.raises((BrokenAnswer, ConnectionError)):  # HTTP/1.0 has no mark for the end of a body but a reset
            await client.exactly(4 * 2**20)


# -- errors of the model server, and answers without a proper end ------------------------------------------------------

THEIRS = {
    "chat": event({"error": {"message": "theirs", "type": "server_error", "code": 500}}),
    "completions": event({"error": {"message": "theirs", "type": "server_error", "code": 500}}),
    "native": event({"error": {"message": "theirs", "type": "server_error", "code": 500}}),
    "responses": named("error", message="theirs", code=None, param=None),
    "messages": named("error", error={"type": "overloaded_error", "message": "theirs"}),
}


async def answer_of(proxy: Proxy, upstream: RawUpstream, api: Api, *pieces: bytes, ending: str = "") -> Answer:
    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.stream(*pieces) if not ending else toxic.stream(*pieces)[: -len(LAST_CHUNK)])
        if ending:
            getattr(link, ending)()

    upstream.script = script
    answer = await post(proxy.port, api.path, STREAM)
    assert answer.status == 200
    return answer


@pytest.mark.parametrize("ending", ["", "close"])
@pytest.mark.parametrize("name", APIS)
async def test_error_of_the_model_server_is_forwarded_once(
    proxy: Proxy, upstream: RawUpstream, name: str, ending: str
) -> None:
    api, theirs = APIS[name], THEIRS[name]
    for pieces in ([api.events[0] + theirs], [api.events[0], theirs], [theirs]):
        answer = await answer_of(proxy, upstream, api, *pieces, ending=ending)
        assert answer.body == b"".join(pieces) + api.ending
        if api.ending and not ending:
            answer = await answer_of(proxy, upstream, api, *pieces, api.ending)
            assert answer.body == b"".join(pieces) + api.ending


async def test_official_client_raises_an_error_of_the_model_server(shared: Shared, upstream: RawUpstream) -> None:
    upstream.script = toxic.stream(token("a"), THEIRS["chat"])
    async with openai.AsyncOpenAI(base_url=f"{shared.proxy.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        with pytest.raises(openai.APIError, match="theirs"):
            async for _ in stream:
                pass


@every_api
async def test_unknown_events_pass_as_they_are(proxy: Proxy, upstream: RawUpstream, api: Api) -> None:
    unknown = [b"event: surprise\ndata: {}\n\n", b"id: 3\nretry: 5\n\n", b": comment\n\n", b"data\n\n"]
    pieces = [*unknown, *api.events]
    assert (await answer_of(proxy, upstream, api, *pieces)).body == b"".join(pieces)


@every_api
async def test_proper_framing_without_a_proper_end_is_incomplete(proxy: Proxy, upstream: RawUpstream, api: Api) -> None:
    for count in range(len(api.events)):
        before = b"".join(api.events[:count])
        for rest in (b"", b"data: {"):
            answer = await answer_of(proxy, upstream, api, *filter(None, [*api.events[:count], rest]))
            check_failed(api, answer.body, before, INCOMPLETE)


@pytest.mark.parametrize("name", ["chat", "native"])
async def test_words_of_an_answer_are_not_its_end(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    api = APIS[name]
    for filling in range(80):  # wherever the mark of the end falls
        for mark in ("data: [DONE]", '"stop":true', "\ndata: [DONE]", "event: message_stop"):
            said = token(mark + "x" * filling) if name == "chat" else event({"content": mark + "x" * filling})
            answer = await answer_of(proxy, upstream, api, said)
            check_failed(api, answer.body, said, INCOMPLETE)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
async def test_the_end_is_known_with_any_line_ends(proxy: Proxy, upstream: RawUpstream, end: str) -> None:
    api = APIS["chat"]
    pieces = [piece.replace(b"\n", end.encode()) for piece in (token("a"), token("b"), DONE)]
    for cut in (pieces, [b"".join(pieces)]):
        assert (await answer_of(proxy, upstream, api, *cut)).body == b"".join(pieces)


async def test_the_last_blank_line_may_be_spared(proxy: Proxy, upstream: RawUpstream) -> None:
    for done in (b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\n\n"):
        answer = await answer_of(proxy, upstream, APIS["chat"], token("a"), done)
        assert answer.body == token("a") + done
