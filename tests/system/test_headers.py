"""Which headers cross the proxy, seen at the far end of a real one."""

from __future__ import annotations

import pytest

from tests.support import toxic
from tests.support.harness import Proxy
from tests.support.raw_client import Answer, ask, post, request
from tests.support.toxic import RawUpstream, Request, own_proxy

CHAT = "/v1/chat/completions"
BODY = {"model": "m"}
CANARY = "canary-5f2d"

NEVER_UPSTREAM = [
    ("Connection", "X-Named, keep-alive, X-Named-Too"),
    ("X-Named", CANARY),
    ("X-Named-Too", CANARY),
    ("Keep-Alive", f"timeout=5, {CANARY}"),
    ("Proxy-Authorization", CANARY),
    ("Proxy-Authenticate", CANARY),
    ("Proxy-Connection", CANARY),
    ("TE", f"trailers, {CANARY}"),
    ("Trailer", CANARY),
    ("Authorization", f"Bearer {CANARY}"),
    ("X-Api-Key", CANARY),
    ("Cookie", f"session={CANARY}"),
    ("Cookie2", CANARY),
    ("Origin", f"app://{CANARY}"),
    ("Referer", f"http://{CANARY}"),
    ("Forwarded", f"for={CANARY}"),
    ("X-Real-IP", CANARY),
    ("X-Forwarded-For", CANARY),
    ("X-Forwarded-Host", CANARY),
    ("X-Forwarded-Proto", CANARY),
    ("X-Forwarded-Anything", CANARY),
    ("Accept-Encoding", f"gzip, {CANARY}"),
    ("Range", f"bytes=0-9, {CANARY}"),
    ("If-Range", CANARY),
    ("X-Conversation-Id", CANARY),
    ("Sec-Fetch-Site", CANARY),
    ("Access-Control-Request-Method", CANARY),
]
NEVER_DOWNSTREAM = [
    ("Connection", "X-Named"),
    ("Connection", "X-Named-Too"),
    ("X-Named", CANARY),
    ("X-Named-Too", CANARY),
    ("Keep-Alive", f"timeout=5, max={CANARY}"),
    ("Proxy-Authenticate", CANARY),
    ("Proxy-Connection", CANARY),
    ("Trailer", CANARY),
    ("Set-Cookie", f"session={CANARY}"),
    ("Set-Cookie", f"more={CANARY}"),
    ("Set-Cookie2", CANARY),
    ("Alt-Svc", CANARY),
    ("Strict-Transport-Security", CANARY),
    ("WWW-Authenticate", CANARY),
    ("Server", CANARY),
    ("Access-Control-Allow-Origin", CANARY),
    ("Access-Control-Allow-Credentials", CANARY),
]
EXTRAS = [
    ("X-Request-Cost", "12"),
    ("OpenAI-Processing-Ms", "17"),
    ("X-Ratelimit-Remaining", "3"),
    ("X-Twice", "one"),
    ("X-Twice", "two"),
    ("Cache-Control", "no-store"),
    ("Vary", "X-Thing"),
]


async def ask_with(proxy: Proxy, upstream: RawUpstream, headers: list[tuple[str, str]]) -> Request:
    upstream.script = toxic.plain(b"{}")
    answer = await ask(proxy.port, request("POST", CHAT, BODY, headers=headers))
    assert answer.status == 200, answer
    return upstream.requests[-1]


@pytest.mark.parametrize("case", [str.title, str.upper, str.lower])
async def test_what_is_not_for_the_model_server_does_not_reach_it(
    proxy: Proxy, upstream: RawUpstream, case: type[str]
) -> None:
    seen = await ask_with(proxy, upstream, [(case(name), value) for name, value in NEVER_UPSTREAM])
    assert CANARY.encode() not in upstream.received
    names = [name for name, _ in seen.headers]
    assert sorted(names) == ["accept-encoding", "content-length", "content-type", "host", "via"]
    assert seen.header("host") == f"127.0.0.1:{upstream.port}"
    assert seen.header("accept-encoding") == "identity"


async def test_every_connection_header_counts(proxy: Proxy, upstream: RawUpstream) -> None:
    headers = [("Connection", "keep-alive"), ("Connection", "X-Named"), ("X-Named", CANARY)]
    seen = await ask_with(proxy, upstream, headers)
    assert seen.header("x-named") is None


async def test_all_other_request_headers_reach_the_model_server(proxy: Proxy, upstream: RawUpstream) -> None:
    mine = [
        ("X-Session-Id", "abc"),
        ("anthropic-version", "2023-06-01"),
        ("OpenAI-Organization", "org"),
        ("User-Agent", "tester/1"),
        ("Accept", "text/event-stream"),
        ("X-Twice", "one"),
        ("X-Twice", "two"),
        ("X-Empty", ""),
    ]
    seen = await ask_with(proxy, upstream, mine)
    for name, value in mine:
        assert (name.lower(), value) in seen.headers


async def test_header_bytes_are_the_same_on_both_sides(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}", headers=[("X-Name", "Jos\u00e9 \U0001f600")])
    answer = await ask(proxy.port, request("POST", CHAT, BODY, headers=[("X-Name", "Jos\u00e9 \U0001f600")]))
    wanted = "Jos\u00e9 \U0001f600".encode()
    assert b"X-Name: " + wanted + b"\r\n" in upstream.received
    assert str(answer.header("x-name")).encode("latin-1") == wanted


async def test_latin_1_header_of_the_model_server_is_no_error(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}").replace(b"Content-Length", b"X-Name: Jos\xe9\r\nContent-Length")
    assert (await post(proxy.port, CHAT, BODY)).status == 200


async def answer_with(proxy: Proxy, upstream: RawUpstream, headers: list[tuple[str, str]], kind: str) -> Answer:
    if kind == "stream":
        start = toxic.head(200, [*headers, ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
        upstream.script = start + toxic.chunk(toxic.DONE) + toxic.LAST_CHUNK
    else:
        body = b"x" * (2 * 2**20 if kind == "large" else 10)
        upstream.script = toxic.plain(body, headers=headers)
    answer = await post(proxy.port, CHAT, BODY)
    assert answer.status == 200
    return answer


@pytest.mark.parametrize("kind", ["plain", "stream", "large"])
async def test_what_is_not_for_the_client_does_not_reach_it(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    answer = await answer_with(proxy, upstream, NEVER_DOWNSTREAM, kind)
    assert CANARY not in str(answer.headers)
    assert "aiohttp" not in str(answer.headers)


@pytest.mark.parametrize("kind", ["plain", "stream", "large"])
async def test_unknown_response_headers_survive(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    answer = await answer_with(proxy, upstream, EXTRAS, kind)
    for name, value in EXTRAS:
        assert (name.lower(), value) in answer.headers


async def test_each_answer_has_one_request_id_and_one_of_each_framing_header(
    proxy: Proxy, upstream: RawUpstream
) -> None:
    for kind in ("plain", "stream", "large"):
        answer = await answer_with(proxy, upstream, [("X-Request-Id", "theirs")], kind)
        names = [name for name, _ in answer.headers]
        assert names.count("x-request-id") == names.count("date") == names.count("content-type") == 1
        assert names.count("content-length") + names.count("transfer-encoding") == 1


async def test_the_way_a_request_came_is_told_on_so_that_circles_are_noticed() -> None:
    async with own_proxy() as (proxy, upstream):
        seen = await ask_with(proxy, upstream, [("Via", "1.1 somebody")])
        ours, theirs = [value for name, value in seen.headers if name == "via"]
        assert theirs == "1.1 somebody" and ours.startswith("1.1 llama-smart-proxy-")
        again = await ask(proxy.port, request("POST", CHAT, BODY, headers=[("Via", f"1.1 other, {ours}")]))
        assert (again.status, again.error["code"]) == (508, "loop_detected")
        assert len(upstream.requests) == 1


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:8080", 200),
        ("app://-", 200),
        ("vscode-webview://abc", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://127.0.0.1.evil.example:80", 403),
        ("http://evil.example/@localhost", 403),
        ("null", 403),
    ],
)
async def test_only_pages_of_this_machine_may_ask(origin: str, status: int) -> None:
    async with own_proxy(toxic.plain(b"{}")) as (proxy, upstream):
        answer = await ask(proxy.port, request("POST", CHAT, BODY, headers=[("Origin", origin)]))
        assert answer.status == status
        assert len(upstream.requests) == (status == 200)
