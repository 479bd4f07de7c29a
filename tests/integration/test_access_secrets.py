"""How keys are refused, and that none of them is shown, logged or sent on (A12)."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.access.peers import exposure
from llama_smart_proxy.proxy.config import ServerConfig, hash_of
from tests.support.agent_clients import write_agent
from tests.support.keyed import ADMIN, CHAT, FEW, MESSAGES, USER, keyed
from tests.support.raw_client import request

PAGE, FOREIGN = ("Origin", "http://localhost:5173"), ("Origin", "http://evil.example")
WRONG = "wrong-canary-0123456789"
TYPES = {CHAT: "authentication_error", "/v1/responses": "authentication_error", "/completion": "authentication_error"}
WHO = '''
class Who(Agent):
    """Writes down who asks."""
    command = None
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.body["who"] = ctx.user
        return None
'''
OBSERVER = """
def extend(registry):
    registry.observers.append(write)

def write(record):
    with open({file!r}, "a") as file:
        file.write(f"{{record.path}} {{record.client}}\\n")
"""


@pytest.mark.parametrize("key", ["", WRONG])
@pytest.mark.parametrize("path", [*TYPES, "/v1/messages", "/api/chat", "/api/pull"])
async def test_a_missing_or_wrong_key_is_401_in_each_api(path: str, key: str) -> None:
    async with keyed() as proxy:
        answer = await proxy.ask("POST", path, {"model": "a1"}, key=key)
        assert (answer.status, answer.header("www-authenticate")) == (401, 'Bearer realm="llama-smart-proxy"')
        body = answer.json()
        if path.startswith("/api/"):
            assert "API key" in body["error"]
        elif path == "/v1/messages":
            assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        else:
            assert (body["error"]["type"], body["error"]["code"]) == (TYPES[path], "invalid_api_key")
        assert proxy.sent(CHAT) == []


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/models/load"), ("POST", "/api/pull"), ("DELETE", "/api/delete")]
)
async def test_a_missing_scope_is_403_and_named(method: str, path: str) -> None:
    async with keyed() as proxy:
        answer = await proxy.ask(method, path, {"model": "a1"}, key=USER)
        assert (
            answer.status == 403
            and "requires the scope admin" in answer.body.decode()
            and "user" in answer.body.decode()
        )
        assert answer.header("www-authenticate") is None and proxy.sent(path) == []
    async with keyed([]) as proxy:
        answer = await proxy.ask(method, path, {"model": "a1"}, more=[("X-Forwarded-For", "::1")])
        assert answer.status == 403 and "server.allow_unauthenticated: admin" in answer.body.decode()
    async with keyed([], server={"allow_unauthenticated": "admin"}) as proxy:
        assert (await proxy.ask(method, path, {"model": "a1"}, more=[("Forwarded", "for=192.0.2.1")])).status != 403


@pytest.mark.parametrize("name", [b"Authorization: Bearer ", b"x-api-key: "])
@pytest.mark.parametrize("value", [b"\xff\xfe", "schlüssel".encode(), b"\xed\xa0\x80", b"k" * 15_000, b"a b", b"\x7f"])
async def test_any_bytes_in_place_of_a_key_are_401_or_400(
    name: bytes, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with keyed() as proxy, proxy.connected() as client:
        await client.send(
            request("GET", "/v1/models", close=True).replace(b"Host: test", b"Host: test\r\n" + name + value)
        )
        assert (await client.answer(method="GET")).status in (400, 401)
        assert "Traceback" not in caplog.text and "unhandled" not in caplog.text


async def test_any_bytes_in_place_of_a_key_are_a_user_for_agents_where_none_is_required(tmp_path: Path) -> None:
    write_agent(tmp_path, "who", WHO)
    async with keyed([], agents_dirs=[str(tmp_path)], agents=["who"]) as proxy, proxy.connected() as client:
        asked = request("POST", CHAT, {"model": "a1", "messages": MESSAGES}, close=True)
        await client.send(asked.replace(b"Host: test", b"Host: test\r\nAuthorization: Bearer \xff\xfe"))
        assert (await client.answer()).status == 200
        assert proxy.sent(CHAT)[0].json()["who"].startswith("key-")


async def test_a_wrong_key_for_a_list_of_models_is_401_in_the_api_of_the_client() -> None:
    async with keyed([{"name": "user", "key": USER, "requests_per_minute": 9}]) as proxy:
        version = ("anthropic-version", "2023-06-01")
        for path in ("/v1/models", "/v1/models/a1"):
            refused = await proxy.ask("GET", path, key=WRONG, more=[version])
            assert refused.status == 401 and refused.json()["error"]["type"] == "authentication_error"
            assert (refused.json()["type"], refused.header("request-id")) == ("error", refused.header("x-request-id"))
            listed = await proxy.ask("GET", path, key=USER, more=[version])
            assert (listed.status, listed.header("anthropic-ratelimit-requests-remaining")) == (200, "9")
            assert len([name for name, _ in listed.headers if name == "request-id"]) == 1
            assert "type" not in (await proxy.ask("GET", path, key=WRONG)).json()


async def test_refusals_are_readable_for_listed_pages_alone_and_preflights_require_no_key() -> None:
    limits = [{"name": "user", "key": USER, "requests_per_minute": 1}]
    async with keyed(limits, server={"allow_origins": ["https://chat.example"]}) as proxy:
        for origin in (PAGE, ("Origin", "https://chat.example")):
            asked = [
                ("Access-Control-Request-Method", "POST"),
                ("Access-Control-Request-Headers", "authorization,x-api-key"),
            ]
            preflight = await proxy.ask("OPTIONS", CHAT, more=[origin, *asked])
            assert preflight.status == 200
            assert preflight.header("access-control-allow-headers") == "authorization, x-api-key"
            answers = [
                await proxy.ask("POST", CHAT, {}, more=[origin]),
                await proxy.ask("POST", "/models/load", {}, key=USER, more=[origin]),
                await proxy.ask("POST", CHAT, {"model": "no-such"}, key=USER, more=[origin]),
                await proxy.ask("POST", CHAT, {"model": "no-such"}, key=USER, more=[origin]),
            ]
            assert [answer.status for answer in answers][:2] == [401, 403] and answers[3].status == 429
            for answer in (preflight, *answers):
                assert answer.header("access-control-allow-origin") == origin[1]
                assert answer.header("access-control-allow-credentials") is None
        for method, more in (("POST", []), ("OPTIONS", [("Access-Control-Request-Method", "POST")])):
            foreign = await proxy.ask(method, CHAT, key=USER, more=[FOREIGN, *more])
            assert (foreign.status, foreign.header("access-control-allow-origin")) == (403, None)


async def test_health_and_agents_show_operators_more_than_others(tmp_path: Path) -> None:
    write_agent(tmp_path, "broken", "raise RuntimeError('secret-path')")
    async with keyed(agents_dirs=[str(tmp_path)], agents=["broken"]) as proxy:
        for key in ("", USER, WRONG):
            for path in ("/health", "/v1/health"):
                answer = await proxy.ask("GET", path, key=key)
                assert (answer.status, set(answer.json())) == (200, {"status", "proxy", "upstream"})
        assert (await proxy.ask("GET", "/health", key=ADMIN)).json()["agents"]["failed"] == ["broken"]
        for key, shown in ((USER, False), (ADMIN, True)):
            assert (b"secret-path" in (await proxy.ask("GET", "/plugins", key=key)).body) is shown


async def test_a_request_is_recorded_by_the_name_of_its_key(tmp_path: Path) -> None:
    file, module = tmp_path / "records", tmp_path / "observer.py"
    module.write_text(OBSERVER.format(file=str(file)))
    async with keyed(modules=[str(module)]) as proxy:
        for key in (USER, FEW, WRONG):
            await proxy.chat(key)
        await proxy.ask("GET", "/health")
        await proxy.ask("GET", "/events", key=USER)  # refused, as that key lacks the scope
    assert file.read_text().splitlines() == [f"{CHAT} user", f"{CHAT} few", f"{CHAT} ", "/health ", "/events user"]


def ways(key: str) -> list[list[tuple[str, str]]]:
    """The headers in which a key can arrive, right and wrong."""
    return [
        [("Authorization", f"Bearer {key}")],
        [("X-Api-Key", key)],
        [("Authorization", f"Basic {key}")],
        [("Authorization", f"Bearer {key}"), ("x-api-key", "other")],
        [("Authorization", f"Bearer {key}\0")],
        [("x-api-key", f"{key}\0")],
        [("Authorization", f"Token {key}"), ("api-key", key), ("Cookie", f"session={key}")],
        [("Proxy-Authorization", f"Bearer {key}"), ("Authorization", f"bearer {key}")],
    ]


async def test_no_key_is_in_an_answer_in_the_log_or_at_a_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets, seen = [USER, ADMIN, FEW, WRONG], b""
    body: dict[str, Any] = {"model": "a1", "messages": MESSAGES}
    async with keyed() as proxy:
        for key in secrets:
            for headers in ways(key):
                for method, path in (("POST", CHAT), ("POST", "/v1/messages"), ("GET", f"/v1/models?key={key}")):
                    async with proxy.connected() as client:
                        sent = body if method == "POST" else None
                        await client.send(request(method, path, sent, headers=headers, close=True))
                        seen += await client.rest()
        for path in ("/health", "/plugins", "/props", "/running", "/v1/models", "/api/ps"):
            seen += (await proxy.ask("GET", path, key=ADMIN)).body
        assert proxy.sent(CHAT)
        logged = caplog.text + "".join(repr(record.__dict__) for record in caplog.records)
        for key in secrets:
            for shown in (key, hash_of(key), hash_of(key).removeprefix("sha256:")):
                assert (
                    shown.encode() not in seen and shown not in logged and shown.encode() not in proxy.upstream.received
                )
        assert "key-" not in logged


async def test_nothing_in_the_process_keeps_a_configured_key() -> None:
    """Neither the configuration nor what is made from it: only digests."""
    made = json.loads(json.dumps([{"name": "x", "key": "".join(["one-time", "-canary-", "0123456789"])}]))
    async with keyed(made):
        made[0]["key"] = ""
        await asyncio.sleep(0)
        gc.collect()
        kept = [
            thing
            for thing in gc.get_objects()
            if isinstance(thing, dict) and "one-time-canary-0123456789" in _texts(thing)
        ]
        assert kept == []


def _texts(mapping: dict[Any, Any]) -> list[str]:
    return [value for value in list(mapping.values()) if type(value) is str]


@pytest.mark.parametrize(("host", "refused"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_sockets_of_the_service_manager_count_as_the_configured_address_does(host: str, refused: bool) -> None:
    with socket.create_server((host, 0)) as inherited:
        for configured in ("127.0.0.1", "0.0.0.0"):
            found = exposure(ServerConfig(host=configured), [inherited])
            assert (found is not None) is refused
        assert exposure(ServerConfig(host=host, allow_unauthenticated=True), [inherited]) is None
