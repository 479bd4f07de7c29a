"""The relay's laws: what the model server said is what the client gets, byte for byte and as soon as it was said."""

from __future__ import annotations

import asyncio
import itertools
import json

import openai
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from tests.conftest import Shared
from tests.support import toxic
from tests.support.harness import Proxy
from tests.support.laws import law
from tests.support.raw_client import ask, connected, get, post, request
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
    token,
)

CHAT = "/v1/chat/completions"
STREAM = {"model": "m", "stream": True}
EVENTS = ("Content-Type", "text/event-stream")
CHUNKED = ("Transfer-Encoding", "chunked")
EXAMPLES = law(400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


async def send_in_pieces(link: Link, data: bytes, cuts: list[int]) -> None:
    for start, end in itertools.pairwise([0, *cuts, len(data)]):
        await link.send(data[start:end])
        await asyncio.sleep(0)  # a segment of its own, as a rule


# -- bytes -------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from('abä€😀\u2028\u2029\x85 \\"{}:\n'), max_size=12)
EVENT = st.one_of(
    TEXT.map(token),
    TEXT.map(lambda text: token(text).replace(b"\n\n", b"\r\n\r\n")),
    TEXT.map(lambda text: event({"timings": {"x": text}, "unknown": [1.0, None]})),
    st.just(b": keep-alive\n\n"),
    st.just(b"event: something\nid: 7\nretry: 10\ndata: {}\ndata: {}\n\n"),
)


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, bytes, list[int]]:
    """An event stream, a chunked answer that carries it, and where to cut that answer into segments."""
    body = b"".join(draw(st.lists(EVENT, max_size=8))) + DONE
    edges = sorted(draw(st.lists(st.integers(1, len(body)), max_size=6)))
    pieces = [body[start:end] for start, end in itertools.pairwise([0, *edges, len(body)])]
    wire = EVENT_HEAD + b"".join(chunk(piece) for piece in pieces if piece) + LAST_CHUNK
    cuts = sorted(draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    return body, wire, cuts


@given(cut_streams())
@EXAMPLES
async def test_stream_arrives_byte_for_byte_however_it_is_cut(
    proxy: Proxy, upstream: RawUpstream, made: tuple[bytes, bytes, list[int]]
) -> None:
    body, wire, cuts = made

    async def script(link: Link, request: Request) -> None:
        await send_in_pieces(link, wire, cuts)

    upstream.script = script
    answer = await post(proxy.port, CHAT, STREAM)
    assert (answer.status, answer.header("content-type")) == (200, "text/event-stream")
    assert answer.body == body


NO_PAGES = st.binary(max_size=300).filter(lambda body: not body.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"))
"""What opens as a web page is none of the answers that are passed on."""


@given(NO_PAGES, st.lists(st.integers(0, 400), max_size=6).map(sorted), st.booleans())
@example(b"", [], False)
@example(b"", [], True)
@example(b"x" * (1024 * 1024), [70, 500_000], False)
@example(b"x" * (1024 * 1024 + 1), [70, 500_000], False)
@example(b"x" * (3 * 1024 * 1024), [70, 1_500_000], True)
@EXAMPLES
async def test_plain_answer_arrives_byte_for_byte_however_it_is_cut(
    proxy: Proxy, upstream: RawUpstream, body: bytes, cuts: list[int], chunked: bool
) -> None:
    wire = plain(body)
    if chunked:
        start = head(200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
        wire = start + (chunk(body) if body else b"") + LAST_CHUNK

    async def script(link: Link, request: Request) -> None:
        await send_in_pieces(link, wire, [cut for cut in cuts if cut <= len(wire)])

    upstream.script = script
    answer = await post(proxy.port, CHAT, {"model": "m"})
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    assert answer.body == body


@pytest.mark.parametrize("behind", [b"\n", b"\n\n", b": bye\n\n", b": " + b"x" * 100 + b"\n\n"])
@pytest.mark.parametrize("pause", [False, True])
async def test_blank_lines_and_comments_behind_the_end_are_no_error(
    proxy: Proxy, upstream: RawUpstream, behind: bytes, pause: bool
) -> None:
    seen = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a") + DONE))
        if pause:
            await seen.wait()
        await link.send(chunk(behind) + LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, STREAM))
        await client.head()
        body = await client.chunk()
        seen.set()
        while piece := await client.chunk():
            body += piece
    assert body in (token("a") + DONE, token("a") + DONE + behind)


@pytest.mark.parametrize("status", [201, 400, 401, 404, 422, 429, 500, 503, 529])
async def test_status_and_body_of_the_model_server_pass_as_they_are(
    proxy: Proxy, upstream: RawUpstream, status: int
) -> None:
    body = b'{ "error" : {"code": 1, "message": "theirs", "type": "x"}}'
    upstream.script = plain(body, status, [("Retry-After", "7")])
    answer = await post(proxy.port, CHAT, STREAM)
    assert (answer.status, answer.body, answer.header("retry-after")) == (status, body, "7")
    assert len(upstream.requests) == 1


async def test_native_extras_survive(proxy: Proxy, upstream: RawUpstream) -> None:
    extras = {"timings": {"prompt_n": 1, "predicted_per_second": 12.5}, "id_slot": 3, "prompt_progress": {"total": 9}}
    upstream.script = toxic.stream(event(extras), token("a"), event({"choices": [], **extras}), DONE)
    answer = await post(proxy.port, CHAT, STREAM | {"return_progress": True})
    assert answer.body == event(extras) + token("a") + event({"choices": [], **extras}) + DONE
    upstream.script = plain(json.dumps(extras).encode())
    assert (await post(proxy.port, "/completion", {"model": "m", "id_slot": 3})).json() == extras


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/responses", "/v1/messages", "/completion", "/infill"],
)
async def test_every_endpoint_goes_to_its_own_path(proxy: Proxy, upstream: RawUpstream, path: str, slash: str) -> None:
    upstream.script = plain(b'{"x":1}')
    answer = await post(proxy.port, f"{path}{slash}?a=%20b&c", {"model": "m"})
    assert (answer.status, answer.body) == (200, b'{"x":1}')
    assert upstream.requests[0].line == f"POST {path}?a=%20b&c HTTP/1.1"


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("behind", [b"", b"0123456789", plain(b"other")])
async def test_bodiless_answer_reaches_the_client_at_once(
    proxy: Proxy, upstream: RawUpstream, status: int, behind: bytes
) -> None:
    upstream.script = head(status, [("Content-Length", "10"), ("X-Mine", "1")]) + behind
    async with connected(proxy.port) as client:
        for _ in range(3):
            await client.send(request("POST", CHAT, {"model": "m"}))
            answer = await client.answer()
            assert (answer.status, answer.body, answer.header("x-mine")) == (status, b"", "1")
            assert answer.header("transfer-encoding") is None
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/completion"])
async def test_each_event_arrives_before_the_next_is_sent(proxy: Proxy, upstream: RawUpstream, path: str) -> None:
    steps = asyncio.Semaphore(0)

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        for number in range(50):
            await steps.acquire()
            await link.send(chunk(token(str(number))))
        await link.send(LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", path, STREAM))
        steps.release()
        await client.head()
        for number in range(50):
            assert await client.chunk() == token(str(number))
            steps.release()


async def test_headers_wait_for_the_first_byte(proxy: Proxy, upstream: RawUpstream) -> None:
    go_on = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        await go_on.wait()
        await link.send(chunk(DONE) + LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, STREAM))
        waiting = asyncio.create_task(client.head())
        await get(proxy.port, "/health")
        assert not waiting.done()
        go_on.set()
        assert (await waiting)[1] == 200


# -- clients of all kinds ----------------------------------------------------------------------------------------------


async def test_http_1_0_client_gets_an_unchunked_body(proxy: Proxy, upstream: RawUpstream) -> None:
    for connection in ([], [("Connection", "keep-alive")]):
        upstream.script = toxic.stream(token("a"), DONE)
        answer = await ask(proxy.port, request("POST", CHAT, STREAM, version="HTTP/1.0", headers=connection))
        assert (answer.status, answer.body) == (200, token("a") + DONE)
        assert answer.header("transfer-encoding") is None
        for size in (10, 2**21):
            upstream.script = plain(b"x" * size)
            answer = await ask(
                proxy.port, request("POST", CHAT, {"model": "m"}, version="HTTP/1.0", headers=connection)
            )
            assert (answer.status, answer.body) == (200, b"x" * size)
            assert answer.header("transfer-encoding") is None


async def test_connection_serves_many_requests_of_all_kinds(proxy: Proxy, upstream: RawUpstream) -> None:
    async with connected(proxy.port) as client:
        for size in (2, 2**21, 0):
            upstream.script = toxic.stream(token("a"), DONE)
            await client.send(request("POST", CHAT, STREAM))
            assert (await client.answer()).body == token("a") + DONE
            upstream.script = plain(b"x" * size)
            await client.send(request("POST", CHAT, {"model": "m"}))
            assert (await client.answer()).body == b"x" * size
            await client.send(request("POST", CHAT, {"model": "nosuch"}))
            assert (await client.answer()).status == 404


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.stream(token(request.json()["user"]), DONE))

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(b"".join(request("POST", CHAT, STREAM | {"user": str(number)}) for number in range(20)))
        for number in range(20):
            assert (await client.answer()).body == token(str(number)) + DONE


async def test_pipelined_requests_of_all_kinds_are_answered_in_order(proxy: Proxy, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        body = request.json()
        await link.send(toxic.stream(DONE) if body["stream"] else plain(b"x" * body["size"]))

    def whole(size: int) -> bytes:
        return request("POST", CHAT, {"model": "m", "stream": False, "size": size})

    health, unknown = request("GET", "/health"), request("POST", CHAT, {"model": "nosuch"})
    stream = request("POST", CHAT, STREAM)
    kinds = {health: "healthy", unknown: "not found", stream: "[DONE]", whole(5): "xxxxx", whole(2**21): "xxxxx"}
    upstream.script = script
    order = [one for pair in itertools.product(kinds, repeat=2) for one in pair]
    async with connected(proxy.port) as client:
        await client.send(b"".join(order))
        for number, one in enumerate(order):
            assert kinds[one].encode() in (await client.answer()).body, f"answer {number} is out of order"


async def test_official_client_streams(shared: Shared, upstream: RawUpstream) -> None:
    upstream.script = toxic.stream(token("a"), token("b"), DONE)
    async with openai.AsyncOpenAI(base_url=f"{shared.proxy.url}/v1", api_key="k", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert [item.choices[0].delta.content async for item in stream] == ["a", "b"]


# -- what HTTP says ----------------------------------------------------------------------------------------------------

NO_BODY = {
    "204": ("POST", CHAT, head(204, [EVENTS])),
    "304": ("POST", CHAT, head(304, [EVENTS])),
    "204, chunked": ("POST", CHAT, head(204, [EVENTS, CHUNKED])),
    "HEAD": ("HEAD", "/slots?model=m", head(200, [EVENTS])),
    "HEAD, chunked": ("HEAD", "/slots?model=m", head(200, [EVENTS, CHUNKED])),
}


@pytest.mark.parametrize("name", NO_BODY)
async def test_an_answer_that_can_have_no_body_has_none(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    method, path, script = NO_BODY[name]
    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request(method, path, STREAM if method == "POST" else None))
        answer = await client.answer(method=method)
        assert answer.status == int(script.split()[1])
        assert answer.header("transfer-encoding") is None
        upstream.script = plain(b'{"next": 1}')
        await client.send(request("POST", CHAT, {"model": "m"}))
        assert (await client.answer()).json() == {"next": 1}, "the next answer follows at once"


TRAILERS = b"0\r\nX-Evil: 1\r\nContent-Type: text/html\r\nLocation: http://evil\r\n\r\n"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_trailers_do_not_become_headers(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    body = token("a") + DONE
    upstream.script = head(200, [("Content-Type", kind), CHUNKED]) + chunk(body) + TRAILERS
    answer = await post(proxy.port, CHAT, STREAM if kind == "text/event-stream" else {"model": "m"})
    assert answer.body == body
    assert [value for name, value in answer.headers if name == "content-type"] == [kind]
    assert answer.header("x-evil") is None and answer.header("location") is None


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, {"POST"}), ("DELETE", "/props", {"GET", "HEAD", "POST"}), ("POST", "/health", {"GET", "HEAD"})],
)
async def test_405_says_what_is_allowed(proxy: Proxy, method: str, path: str, allowed: set[str]) -> None:
    async with connected(proxy.port) as client:
        await client.send(request(method, path, {"model": "m"}))
        answer = await client.answer()
    assert answer.status == 405
    assert {word.strip() for word in (answer.header("allow") or "").split(",")} == allowed
