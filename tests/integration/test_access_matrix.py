"""Who may use which endpoint: every route of the real table, with every kind of key in every header (A2, A4)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from llama_smart_proxy.proxy.api.dispatcher import Dispatcher
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, hash_of
from llama_smart_proxy.proxy.http.origins import READING, Pages
from llama_smart_proxy.proxy.http.scopes import Scope
from llama_smart_proxy.proxy.http.server import FrontServer
from tests.support.raw_client import RawClient, connected, request

USER, ADMIN, WRONG = "user-key-0123456789", "admin-key-0123456789", "wrong-key-0123456789"
Keys = list[dict[str, Any]]
KEYS: Keys = [{"name": "user", "key": USER}, {"name": "root", "hash": hash_of(ADMIN), "scopes": ["inference", "admin"]}]
OPEN = {("GET", "/"), ("GET", "/health"), ("GET", "/v1/health")}
"""What requires no key."""
OPERATORS = (
    *("/admin", "/logs", "/upstream", "/events", "/tools", "/mcp", "/metrics", "/models/load"),
    *("/models/unload", "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs"),
)
"""What everything at and below requires scope admin."""
OF_OPERATORS = {("POST", "/models"), ("DELETE", "/models"), ("POST", "/props"), ("POST", "/lora-adapters")}
SAMPLES = ("m", "1", f"sha256:{'0' * 64}")
"""Values for the parameters of paths."""
Table = list[tuple[str, str, Scope, Pages]]


def real_table() -> Table:
    return list(App(Config()).generation.dispatcher.table())


def concrete(path: str) -> str:
    """The path with values for its parameters."""

    def value(found: re.Match[str]) -> str:
        return next(sample for sample in SAMPLES if re.fullmatch(found[1] or "[^/]+", sample))

    return re.sub(r"\{\w+(?::([^{}]+(?:\{[\d,]+\})?))?\}", value, path)


@asynccontextmanager
async def decisions(keys: Keys) -> AsyncIterator[tuple[Table, RawClient]]:
    """The real table, and a connection to a server with these keys that answers 204 to whoever may use a route."""
    app = App(Config.model_validate({"server": {"api_keys": keys}}))
    table, deciding = list(app.generation.dispatcher.table()), Dispatcher(app.proxy)

    async def reached(http: web.BaseRequest) -> web.Response:
        return web.Response(status=204)

    for method, path, scope, pages in table:
        deciding.add([method], path, reached, scope, pages=pages)
    limits = {"head_timeout_s": 60.0, "keepalive_timeout_s": 60.0, "send_stall_s": 60.0}
    front = FrontServer(deciding, **limits, dialect_of=deciding.dialect_of)
    listener = await asyncio.get_running_loop().create_server(front, "127.0.0.1", 0)
    try:
        async with connected(listener.sockets[0].getsockname()[1]) as client:
            yield table, client
    finally:
        listener.close()
        await front.shutdown(1.0)
        await app.close()


async def status(client: RawClient, method: str, path: str, *headers: tuple[str, str]) -> int:
    await client.send(request(method, path, headers=headers))
    return (await client.answer(method=method)).status


def forms(key: str) -> Iterator[list[tuple[str, str]]]:
    """The headers in which clients send a key."""
    yield [("Authorization", f"Bearer {key}")]
    yield [("authorization", f"bearer  {key}")]
    yield [("x-api-key", key)]
    yield [("X-Api-Key", key), ("Authorization", f"Bearer {key}")]
    yield [("Authorization", "Basic dTpw"), ("x-api-key", key)]


def not_keys(key: str) -> Iterator[list[tuple[str, str]]]:
    """What is no key, although a right one is in it."""
    yield []
    yield [("Authorization", f"Basic {key}")]
    yield [("Authorization", key)]
    yield [("Authorization", f"Bearer {key}x")]
    yield [("Authorization", f"Bearer {hash_of(key)}")]
    yield [("Cookie", f"api_key={key}")]
    yield [("Authorization", f"Bearer {key}"), ("x-api-key", WRONG)]
    yield [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {WRONG}")]
    yield [("x-api-key", key), ("x-api-key", WRONG)]
    yield [("Authorization", f"Bearer {USER}"), ("x-api-key", ADMIN)]


async def test_every_form_of_a_key_gets_the_same_decision_at_every_route() -> None:
    async with decisions(KEYS) as (table, client):
        for method, path, scope, _ in table:
            at, public = concrete(path), scope is Scope.PUBLIC
            for headers in forms(USER):
                expected = 403 if scope is Scope.ADMIN else 204
                assert await status(client, method, at, *headers) == expected, (method, path, headers)
            for headers in forms(ADMIN):
                assert await status(client, method, at, *headers) == 204, (method, path, headers)
            for headers in (*forms(WRONG), *not_keys(ADMIN)):
                assert await status(client, method, at, *headers) == (204 if public else 401), (method, path, headers)
            for query in (f"?api_key={ADMIN}", f"?key={ADMIN}&access_token={ADMIN}"):
                assert await status(client, method, f"{at}{query}") == (204 if public else 401), (method, path, query)


async def test_a_preflight_requires_no_key_at_any_route() -> None:
    asked = [("Origin", "http://localhost:5173"), ("Access-Control-Request-Headers", "authorization, x-api-key")]
    async with decisions(KEYS) as (table, client):
        for method, path, _, _ in table:
            headers = [*asked, ("Access-Control-Request-Method", method)]
            assert await status(client, "OPTIONS", concrete(path), *headers) == 200, (method, path)


async def test_without_keys_a_reverse_proxys_client_is_no_operator() -> None:
    forwarded = [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1"), ("X-Real-IP", "127.0.0.1")]
    async with decisions([]) as (table, client):
        for method, path, scope, _ in table:
            assert await status(client, method, concrete(path)) == 204, (method, path)
            expected = 403 if scope is Scope.ADMIN else 204
            for header in forwarded:
                assert await status(client, method, concrete(path), header) == expected, (method, path)


def test_nothing_is_public_but_the_root_the_health_and_their_heads() -> None:
    found = {(method, path) for method, path, scope, _ in real_table() if scope is Scope.PUBLIC}
    assert found == OPEN | {("HEAD", path) for _, path in OPEN}


def test_what_changes_or_shows_the_work_of_others_is_for_operators() -> None:
    for method, path, scope, _ in real_table():
        below = any(path == prefix or path.startswith(f"{prefix}/") for prefix in OPERATORS)
        acts = method not in READING and path.startswith(("/slots/", "/running"))
        if below or acts or (method, path) in OF_OPERATORS:
            assert scope is Scope.ADMIN, f"{method} {path}"
    assert {(method, path) for method, path, scope, _ in real_table() if scope is Scope.ADMIN} >= OF_OPERATORS


def test_a_route_without_a_scope_cannot_be_added() -> None:
    async def handler(http: web.BaseRequest) -> web.Response:
        return web.Response()

    app = App(Config())
    with pytest.raises(TypeError, match="scope"):
        app.generation.dispatcher.add(["GET"], "/new", handler)  # type: ignore[call-arg]
    assert all(isinstance(scope, Scope) for _, _, scope, _ in app.generation.dispatcher.table())
