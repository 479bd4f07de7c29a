"""Which requests are refused before they have any effect: for another host's name, and of foreign web pages."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support import toxic
from tests.support.e2e_support import Fakes, fakes
from tests.support.here import served_here
from tests.support.raw_client import Answer, ask, post, request
from tests.support.toxic import RawUpstream, raw_upstream

__all__ = ["fakes"]  # a fixture
CHAT = "/v1/chat/completions"
PAGE, FOREIGN = ("Origin", "http://localhost:5173"), ("Origin", "http://evil.example")
CROSS_SITE, SAME_SITE = ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-site")
STARTING = ["/props?model=a", "/slots?model=a", "/lora-adapters?model=a", "/metrics?model=a", "/v1/stream?conv_id=x"]


@pytest.fixture
async def upstream() -> AsyncIterator[RawUpstream]:
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        yield upstream


@pytest.fixture
async def port(upstream: RawUpstream) -> AsyncIterator[int]:
    """Of a proxy whose model `m` is at the upstream."""
    remotes = {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
    async with served_here({"server": {"allow_hosts": "chat.example"}, "remotes": remotes}) as (_, port):
        yield port


async def named(port: int, host: str, method: str, path: str, *more: tuple[str, str]) -> Answer:
    """The answer to a request for the proxy by the name `host`."""
    data = request(method, path, {"model": "m"} if method == "POST" else None, headers=more, close=True)
    return await ask(port, data.replace(b"Host: test", f"Host: {host}".encode()), method=method)


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", CHAT), ("POST", "/api/chat")])
@pytest.mark.parametrize("host", ["evil.example", "EVIL.example.", "127.0.0.1.nip.io:11555", "xn--80ak6aa92e.com"])
async def test_another_hosts_name_is_refused_in_the_clients_api(
    port: int, upstream: RawUpstream, host: str, method: str, path: str
) -> None:
    answer = await named(port, host, method, path, ("X-Forwarded-Host", "localhost"), ("Forwarded", "host=localhost"))
    assert (answer.status, "server.allow_hosts" in answer.body.decode()) == (403, True)
    error = answer.json()["error"]
    assert isinstance(error, str if path.startswith("/api/") else dict)
    assert upstream.requests == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE", "PUT"])
async def test_no_route_answers_to_another_hosts_name(port: int, method: str) -> None:
    preflight = [PAGE, ("Access-Control-Request-Method", "GET")]
    for path in ("/", "/health", "/v1/models", "/props?model=m", "/tools", "/models/sse", "/nothing"):
        for headers in ([], preflight if method == "OPTIONS" else [PAGE]):
            assert (await named(port, "evil.example", method, path, *headers)).status == 403, path


@pytest.mark.parametrize(
    "host",
    ["localhost:11555", "127.0.0.1", "[::1]:11555", "llama-smart-proxy:11555", "host.docker.internal", "chat.example"],
)
async def test_the_names_that_documented_set_ups_use_are_served(port: int, host: str) -> None:
    assert (await named(port, host, "GET", "/health")).status == 200
    assert (await named(port, host, "POST", CHAT)).status == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"GET /health HTTP/1.0\r\n", 200),
        (b"GET /health HTTP/1.0\r\nHost: evil.example\r\n", 403),
        (b"GET /health HTTP/1.1\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost@evil.example\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example@localhost\r\n", 400),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n", 400),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: evil.example\r\n", 400),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n", 400),
    ],
)
async def test_no_form_of_a_request_gets_by_with_another_hosts_name(port: int, lines: bytes, status: int) -> None:
    assert (await ask(port, lines + b"Connection: close\r\n\r\n", method="GET")).status == status


@pytest.mark.parametrize("header", [FOREIGN, ("Origin", "null"), CROSS_SITE, SAME_SITE], ids=": ".join)
async def test_no_foreign_page_loads_or_evicts_a_model(fakes: Fakes, header: tuple[str, str]) -> None:
    models = {"a": fakes.model(), "b": fakes.model(), "tooled": fakes.model(fields={"args": ["--tools", "all"]})}
    async with served_here(fakes.config(models, size=1, keep_alive=-1)) as (_, port):
        assert (await post(port, "/tokenize", {"model": "b", "content": "x"})).status == 200
        loads = len(fakes.events("start"))
        for path in (*STARTING, "/props?model=a&autoload=true", "/tools", "/mcp?model=tooled", "/slots/?model=a"):
            for method in ("GET", "HEAD"):
                answer = await ask(port, request(method, path, headers=[header], close=True), method=method)
                assert answer.status == 403, path
        assert len(fakes.events("start")) == loads


@pytest.mark.parametrize(
    "headers", [[PAGE, CROSS_SITE], [("Sec-Fetch-Site", "none")], [("Sec-Fetch-Site", "same-origin")], []]
)
async def test_pages_here_and_users_are_served(port: int, headers: list[tuple[str, str]]) -> None:
    for path in STARTING[:4]:
        asked = request("GET", path.replace("=a", "=m"), headers=headers, close=True)
        assert (await ask(port, asked, method="GET")).status == 200, path


@pytest.mark.parametrize("header", [CROSS_SITE, SAME_SITE, FOREIGN], ids=": ".join)
async def test_a_link_to_what_only_informs_works_from_anywhere(port: int, header: tuple[str, str]) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/models/m", "/api/tags", "/api/ps", "/plugins"):
        asked = request("GET", path, headers=[header], close=True)
        assert (await ask(port, asked, method="GET")).status == 200, path
    posted = await ask(port, request("POST", CHAT, {"model": "m"}, headers=[CROSS_SITE], close=True))
    assert (posted.status, posted.error["code"]) == (403, "forbidden_origin")
