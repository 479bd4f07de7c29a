"""Web pages: those of this machine and of configured origins may ask from a browser, and others may not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.support import toxic
from tests.support.here import served_here
from tests.support.raw_client import Answer, ask, request
from tests.support.toxic import RawUpstream, raw_upstream

CHAT = "/v1/chat/completions"
PAGE, CONFIGURED, FOREIGN = "http://localhost:5173", "https://chat.example", "http://evil.example"
SENT_BY_CLIENTS = (
    *("authorization", "content-type", "x-api-key", "anthropic-version", "anthropic-beta", "x-request-id"),
    *("anthropic-dangerous-direct-browser-access", "openai-organization", "x-agents", "x-requested-with", "user-agent"),
    *("x-stainless-arch", "x-stainless-lang", "x-stainless-os", "x-stainless-package-version", "x-stainless-runtime"),
    *("x-stainless-retry-count", "x-stainless-timeout", "x-stainless-helper-method", "http-referer", "x-title"),
)


@dataclass
class Served:
    """The proxy in this process; model `m` is at the upstream. `exchange` sends one request for a page of `origin`."""

    port: int
    upstream: RawUpstream

    async def exchange(self, origin: str, method: str = "POST", path: str = CHAT, **headers: str) -> Answer:
        named = [("Origin", origin), *((name.replace("_", "-"), value) for name, value in headers.items())]
        sent = {"model": "m"} if method == "POST" else None
        return await ask(self.port, request(method, path, sent, headers=named, close=True), method=method)

    async def preflight(self, origin: str, path: str = CHAT, method: str = "POST", **headers: str) -> Answer:
        asking = {"Access_Control_Request_Method": method, **headers}
        return await self.exchange(origin, "OPTIONS", path, **asking)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        remotes = {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
        async with served_here({"server": {"allow_origins": CONFIGURED}, "remotes": remotes}) as (_, port):
            yield Served(port, upstream)


def values(answer: Answer, name: str) -> set[str]:
    """The items of all headers called `name`, in lower case."""
    return {
        item.strip().lower()
        for key, value in answer.headers
        if key == name
        for item in value.split(",")
        if item.strip()
    }


def allowed(answer: Answer) -> list[tuple[str, str]]:
    return [(name, value) for name, value in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", [PAGE, CONFIGURED, "tauri://localhost"])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat", "/v1/models/m", "/no/such/path"])
async def test_a_preflight_allows_the_headers_that_clients_really_send(served: Served, origin: str, path: str) -> None:
    answer = await served.preflight(origin, path, Access_Control_Request_Headers=",".join(SENT_BY_CLIENTS))
    assert (answer.status, answer.body) == (200, b"")
    assert answer.header("access-control-allow-origin") == origin
    assert values(answer, "access-control-allow-headers") == set(SENT_BY_CLIENTS)
    assert {"get", "post", "delete"} <= values(answer, "access-control-allow-methods")
    asked = {"access-control-request-method", "access-control-request-headers"}
    assert values(answer, "vary") == {"origin", *asked}
    assert answer.header("access-control-max-age") and answer.header("access-control-allow-private-network") is None
    assert served.upstream.requests == []


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("", set()),
        ("X-A", {"x-a"}),
        (" x-a ,x-b,, x-c", {"x-a", "x-b", "x-c"}),
        ("x-a, x b, x:c, (x), \u00fc, x-d", {"x-a", "x-d"}),
        ("!#$%&'*+.^_`|~-", {"!#$%&'*+.^_`|~-"}),
        ("*", {"*"}),
    ],
)
async def test_only_names_of_headers_are_allowed(served: Served, asked: str, given: set[str]) -> None:
    answer = await served.preflight(PAGE, Access_Control_Request_Headers=asked)
    assert answer.status == 200 and values(answer, "access-control-allow-headers") == given


@pytest.mark.parametrize(
    ("method", "also"), [("DELETE", set()), ("PUT", {"put"}), ("PATCH", {"patch"}), ("a b", set())]
)
async def test_a_preflight_allows_the_method_that_is_asked_for(served: Served, method: str, also: set[str]) -> None:
    answer = await served.preflight(PAGE, method=method)
    assert values(answer, "access-control-allow-methods") == {"get", "post", "delete", *also}


async def test_a_public_page_that_is_configured_may_reach_a_private_network(served: Served) -> None:
    for origin, status, allowed in ((CONFIGURED, 200, "true"), (FOREIGN, 403, None)):
        answer = await served.preflight(origin, Access_Control_Request_Private_Network="true")
        assert (answer.status, answer.header("access-control-allow-private-network")) == (status, allowed)


@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://localhost.evil.example", "http://localhost, http://x"])
async def test_others_get_403_and_no_header_that_allows_anything(served: Served, origin: str) -> None:
    for answer in (await served.preflight(origin), await served.exchange(origin)):
        assert (answer.status, answer.error["code"]) == (403, "forbidden_origin")
        assert "server.allow_origins" in answer.error["message"]
        assert allowed(answer) == [] and values(answer, "vary") == {"origin"}
    listed = await served.exchange(origin, "GET", "/v1/models")
    assert listed.status == 200 and allowed(listed) == [] and values(listed, "vary") == {"origin"}
    assert served.upstream.requests == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", CHAT, 200),
        ("GET", "/v1/models", 200),
        ("GET", "/api/tags", 200),
        ("GET", "/health", 200),
        ("HEAD", "/", 200),
        ("GET", "/nothing", 404),
        ("PUT", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("POST", "/v1/messages", 404),
        ("POST", "/api/nothing", 404),
    ],
)
async def test_every_answer_may_be_read_by_the_page_errors_too(
    served: Served, method: str, path: str, status: int
) -> None:
    if path == "/v1/messages":
        served.upstream.script = toxic.plain(b'{"error":{"message":"no"}}', status=404)
    answer = await served.exchange(PAGE, method, path)
    assert answer.status == status
    assert answer.header("access-control-allow-origin") == PAGE and values(answer, "vary") == {"origin"}
    assert {"x-request-id", "request-id", "retry-after"} <= values(answer, "access-control-expose-headers")


async def test_a_stream_may_be_read_by_the_page_and_the_headers_of_its_server_do_not_double_ours(
    served: Served,
) -> None:
    theirs = [("Access-Control-Allow-Origin", "*"), ("Access-Control-Allow-Credentials", "true"), ("Vary", "X-Thing")]
    start = toxic.head(200, [*theirs, ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
    served.upstream.script = start + toxic.chunk(toxic.DONE) + toxic.LAST_CHUNK
    body = {"model": "m", "stream": True}
    answer = await ask(served.port, request("POST", CHAT, body, headers=[("Origin", PAGE)], close=True))
    assert [value for name, value in answer.headers if name == "access-control-allow-origin"] == [PAGE]
    assert answer.header("access-control-allow-credentials") is None
    assert values(answer, "vary") == {"origin", "x-thing"}


async def test_a_head_that_is_refused_may_be_read_by_the_page(served: Served) -> None:
    many = {f"X_{number}": "a" * 9000 for number in range(9)}
    answer = await served.exchange(PAGE, "GET", "/v1/models", **many)
    assert answer.status == 431 and answer.header("access-control-allow-origin") == PAGE


async def test_without_an_origin_there_is_nothing_of_it(served: Served) -> None:
    for method in ("POST", "OPTIONS"):
        headers = [("Access-Control-Request-Method", "POST")]
        body = {"model": "m"} if method == "POST" else None
        answer = await ask(served.port, request(method, CHAT, body, headers=headers, close=True))
        assert answer.status == (200 if method == "POST" else 405)
        assert allowed(answer) == [] and answer.header("vary") is None
