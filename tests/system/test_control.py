"""What operators see and change by HTTP: `/running`, `/events`, `/logs`, `/admin/models`, `/upstream`."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import Fakes
from tests.support.harness import Proxy, running_proxy, session_proxy, until
from tests.support.raw_client import RawClient, connected, request
from tests.support.stages import Stage


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    return Fakes(tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def own(fakes: Fakes) -> Iterator[Proxy]:
    """A proxy with `a`, `org/b:x` and `broken`, of which two have a place."""
    models = {
        "a": fakes.model(fields={"parallel": 2, "title": "The A"}),
        "org/b:x": fakes.model(fields={"args": ["--temp", "0", "--hf-token", "sesame"]}),
        "broken": fakes.model(EXIT=3),
    }
    with session_proxy(fakes.config(models, size=2, keep_alive=600)) as proxy:
        yield proxy


async def chat(proxy: Proxy, model: str, **fake: Any) -> raw_client.Answer:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "fake": fake}
    return await raw_client.post(proxy.port, "/v1/chat/completions", body)


async def post(proxy: Proxy, path: str) -> raw_client.Answer:
    return await raw_client.ask(proxy.port, request("POST", path, b"", close=True))


async def running(proxy: Proxy) -> dict[str, dict[str, Any]]:
    answer = (await raw_client.get(proxy.port, "/running")).json()["running"]
    return {entry["model"]: entry for entry in answer}


@asynccontextmanager
async def streaming(proxy: Proxy, path: str, *headers: tuple[str, str]) -> AsyncIterator[RawClient]:
    """A client that has the head of an answer in chunks."""
    async with connected(proxy.port) as client:
        await client.send(request("GET", path, headers=headers))
        _, status, _ = await client.head()
        assert status == 200
        yield client


async def read_until(client: RawClient, mark: bytes) -> bytes:
    """The body up to `mark` and a little more."""
    found = b""
    while mark not in found:
        piece = await client.chunk()
        assert piece, f"the body ends without {mark!r}: {found!r}"
        found += piece
    return found


# -- load, unload, running ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["org/b:x", "org%2Fb%3Ax", "ORG/B:X"])
async def test_a_model_is_loaded_and_unloaded_by_any_spelling_of_its_path(own: Proxy, path: str) -> None:
    answer = await post(own, f"/admin/models/{path}/load")
    assert (answer.status, answer.json()) == (200, {"success": True, "model": "org/b:x", "state": "loaded"})
    entry = (await running(own))["org/b:x"]
    assert entry["state"] == "ready" and entry["slots"]["busy"] == 0 and entry["pid"] and entry["rss_bytes"]
    assert entry["helper"] is False
    assert "--temp 0 --hf-token '***'" in entry["cmd"] and entry["proxy"].endswith(f":{entry['port']}")
    assert 0 < entry["expires_in_s"] <= 600 and entry["ttl"] in range(1, 601)
    answer = await post(own, f"/admin/models/{path}/unload")
    assert (answer.status, answer.json()["state"]) == (200, "unloaded")
    assert "org/b:x" not in await running(own)


async def test_a_load_is_not_waited_for_on_request(own: Proxy) -> None:
    assert (await post(own, "/admin/models/a/load?wait=0")).json()["state"] in ("loading", "loaded")
    assert (await post(own, "/admin/models/a/load")).json()["state"] == "loaded"


async def test_a_busy_model_completes_its_answers_before_it_is_unloaded(own: Proxy, tmp_path: Path) -> None:
    await post(own, "/admin/models/a/load")
    gate = tmp_path / "gate"
    asking = asyncio.ensure_future(chat(own, "a", last_at=str(gate)))

    async def busy() -> bool:
        return bool((await running(own))["a"]["slots"]["busy"] == 1)

    await until(busy, what="the chat")
    assert (await post(own, "/admin/models/a/unload")).json()["state"] == "unloading"
    assert (await running(own))["a"]["state"] == "unloading"
    gate.touch()
    assert (await asking).status == 200
    await until(lambda: gone(own, "a"), what="the unloaded model")


@pytest.mark.parametrize(("path", "status"), [("none", 404), ("broken", 503), (f"{'x' * 600}", 404)])
async def test_a_load_that_fails_says_why(own: Proxy, path: str, status: int) -> None:
    answer = await post(own, f"/admin/models/{path}/load")
    assert answer.status == status and answer.error["message"]


async def test_what_runs_is_listed_with_its_slots_and_its_queue_and_a_failure_with_its_reason(
    own: Proxy, tmp_path: Path
) -> None:
    await post(own, "/admin/models/broken/load")
    gate = tmp_path / "gate"
    asking = [asyncio.ensure_future(chat(own, "a", last_at=str(gate))) for _ in range(3)]

    async def queued() -> bool:
        entry = (await running(own)).get("a", {})
        return entry.get("slots") == {"busy": 2, "total": 2} and entry["queue"] == 1

    await until(queued, what="the queue")
    listed = await running(own)
    assert listed["a"]["name"] == "The A" and listed["a"]["backend"] == "llama.cpp" and listed["a"]["idle_s"] is None
    assert listed["broken"]["state"] == "failed" and "exited with code 3" in listed["broken"]["error"]
    gate.touch()
    assert [(await task).status for task in asking] == [200] * 3


async def test_a_model_that_an_ollama_has_loaded_is_listed_and_one_that_it_has_not_is_not(stage: Stage) -> None:
    await post(stage.proxy, "/admin/models/distant/load")
    entry = (await running(stage.proxy))["distant:latest"]
    assert entry["state"] == "ready" and entry["backend"] == "ollama" and entry["slots"] is None
    assert (await post(stage.proxy, "/admin/models/distant/unload")).status == 200
    await until(lambda: gone(stage.proxy, "distant:latest"))


async def gone(proxy: Proxy, model: str) -> bool:
    return model not in await running(proxy)


# -- events ------------------------------------------------------------------------------------------------------------


async def test_events_begin_with_how_things_are_and_go_on_with_what_happens(own: Proxy) -> None:
    await post(own, "/admin/models/a/load")
    async with streaming(own, "/events") as client:
        first = await read_until(client, b'"name":"a"')
        assert b"event: model\r\n" in first or b"event: load_time\r\n" in first
        await post(own, "/admin/models/a/unload")
        seen = await read_until(client, b'{"name":"a","state":"unloaded"}')
        event = next(line for line in seen.splitlines() if b'"unloaded"' in line).removeprefix(b"data: ")
        assert json.loads(event)["state"] == "unloaded"


# -- logs --------------------------------------------------------------------------------------------------------------


async def test_the_last_lines_of_a_server_are_sent_as_text(own: Proxy) -> None:
    await post(own, "/admin/models/a/load")
    whole = await raw_client.get(own.port, "/logs/a")
    assert whole.status == 200 and (whole.header("content-type") or "").startswith("text/plain")
    assert whole.body.endswith(b"\n") and whole.body.count(b"\n") >= 1
    last = await raw_client.get(own.port, "/logs/a?lines=1")
    assert last.body == whole.body.splitlines(keepends=True)[-1]
    assert (await raw_client.get(own.port, "/logs/a?lines=0")).body == b""


async def test_a_log_outlives_its_process(own: Proxy) -> None:
    await post(own, "/admin/models/broken/load")
    assert b"about to end" in (await raw_client.get(own.port, "/logs/broken")).body


async def test_a_followed_log_goes_on_with_the_next_process(own: Proxy) -> None:
    await post(own, "/admin/models/a/unload")
    async with streaming(own, "/logs/a?follow=1&lines=0") as client:
        await post(own, "/admin/models/a/load")
        await read_until(client, b"\n")
        await post(own, "/admin/models/a/unload")
        await post(own, "/admin/models/a/load")
        assert await read_until(client, b"--- the next process of this model ---\n")


@pytest.mark.parametrize("path", ["/logs/a?follow=1", "/events"])
async def test_one_who_has_left_is_served_no_longer(own: Proxy, path: str) -> None:
    async def watching() -> list[str]:
        requests = (await raw_client.get(own.port, "/running")).json()["requests"]
        return [request["state"] for request in requests if request["path"] == path.partition("?")[0]]

    async def left() -> bool:
        return not await watching()

    async with streaming(own, path) as client:
        assert await watching() == ["streaming"]
        client.leave()
        await until(left, what="the end of the request")


@pytest.mark.parametrize(("path", "status"), [("/logs/none", 404), ("/logs/a?lines=x", 400), ("/logs/a?lines=-1", 400)])
async def test_a_log_that_cannot_be_sent_is_an_error_that_says_why(own: Proxy, path: str, status: int) -> None:
    answer = await raw_client.get(own.port, path)
    assert answer.status == status and answer.error["message"]


# -- a model's own server ----------------------------------------------------------------------------------------------


async def test_any_request_reaches_the_models_own_server_without_the_clients_credentials(
    own: Proxy, fakes: Fakes
) -> None:
    headers = [("Authorization", "Bearer mine"), ("X-Own", "kept"), ("Cookie", "s=1"), ("Accept", "text/x")]
    targets = {"a/any/th%2Fing?x=1&api_key=k": "/any/th%2Fing?x=1", "org/b:x/own": "/own", "org%2Fb:x/own/?": "/own/"}
    for path, target in targets.items():
        for method, body in (("PUT", b"{1}"), ("GET", None), ("DELETE", None), ("PATCH", b"")):
            sent = request(method, f"/upstream/{path}", body, headers=headers, close=True)
            assert (await raw_client.ask(own.port, sent, method=method)).json()["path"] == target.partition("?")[0]
            event = [event for event in fakes.events("request") if event["path"].startswith(("/any", "/own"))][-1]
            assert (event["method"], event["path"], event["body"]) == (method, target, (body or b"").decode())
            assert event["headers"]["x-own"] == "kept" and event["headers"]["accept"] == "text/x"
            assert "mine" not in event["headers"]["authorization"] and "cookie" not in event["headers"]


async def test_an_answer_of_it_comes_in_the_pieces_that_it_sends(own: Proxy, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    fake = {"tokens": 3, "last_at": str(gate)}
    body = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "stream": True, "fake": fake}
    async with connected(own.port) as client:
        await client.send(request("POST", "/upstream/a/v1/chat/completions", body))
        _, status, headers = await client.head()
        assert status == 200 and dict(headers)["content-type"].startswith("text/event-stream")
        first = await read_until(client, b"t1")
        assert b"t2" not in first
        gate.touch()
        assert b"[DONE]" in await read_until(client, b"[DONE]")


async def test_head_and_large_bodies_pass(own: Proxy, fakes: Fakes) -> None:
    head = await raw_client.ask(own.port, request("HEAD", "/upstream/a/own", close=True), method="HEAD")
    assert head.status == 200 and head.body == b"" and int(head.header("content-length") or 0) > 0
    large = b"x" * (3 * 2**20)
    answer = await raw_client.ask(own.port, request("PUT", "/upstream/a/own", large, close=True))
    assert answer.json()["echo"] == large.decode()


async def test_its_errors_come_as_they_are(own: Proxy) -> None:
    body = {"model": "a", "messages": [], "fake": {"refuse": [418, "no coffee"]}}
    answer = await raw_client.post(own.port, "/upstream/a/v1/chat/completions", body)
    assert answer.status == 418 and b"no coffee" in answer.body


async def test_an_answer_that_breaks_off_ends_for_the_client_too(own: Proxy) -> None:
    body = {"model": "a", "messages": [], "stream": True, "fake": {"tokens": 9, "cut_at": [2, 3], "cut_by": "close"}}
    with pytest.raises((raw_client.BrokenAnswer, ConnectionError)):
        await raw_client.post(own.port, "/upstream/a/v1/chat/completions", body)


@pytest.mark.parametrize(
    ("path", "location"), [("a", "./a/"), ("a?x=1", "./a/?x=1"), ("org/b:x", "./b:x/"), ("org%2Fb:x", "./org%2Fb:x/")]
)
async def test_the_name_alone_leads_to_the_folder_that_relative_links_require(
    own: Proxy, path: str, location: str
) -> None:
    answer = await raw_client.get(own.port, f"/upstream/{path}")
    assert (answer.status, answer.header("location")) == (301, location)
    sent = request("POST", f"/upstream/{path}", b"", close=True)
    assert (await raw_client.ask(own.port, sent)).status == 308


@pytest.mark.parametrize(
    "path", ["a/../x", "a/%2e%2e/x", "a/%252e%252e/x", "a/x%2f..%2fy", "a/..%5cx", "a/x%00", "a/%0d%0aX:y", "a/..;/x"]
)
async def test_a_path_cannot_leave_the_servers_root(own: Proxy, path: str) -> None:
    answer = await raw_client.get(own.port, f"/upstream/{path}")
    assert answer.status in (400, 404)


async def test_a_protocol_upgrade_is_refused_clearly(own: Proxy) -> None:
    upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Key", "x")]
    answer = await raw_client.ask(own.port, request("GET", "/upstream/a/ws", headers=upgrade), method="GET")
    assert answer.status == 400 and "upgrades are not supported" in answer.error["message"]


@pytest.mark.parametrize("path", ["/logs/distant", "/upstream/distant/api/tags"])
async def test_servers_that_are_not_the_proxys_are_named_as_such(stage: Stage, path: str) -> None:
    answer = await raw_client.get(stage.proxy.port, path)
    assert answer.status == 501 and "a server of its own" in answer.error["message"]


async def test_an_unknown_model_has_no_server(own: Proxy) -> None:
    assert (await raw_client.get(own.port, "/upstream/none/x")).status == 404


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_shutdown_waits_for_no_one_who_watches(fakes: Fakes) -> None:
    config = fakes.config({"a": fakes.model()}) | {"server": {"drain_s": 600}}
    async with running_proxy(config) as proxy:
        await post(proxy, "/admin/models/a/load")
        async with streaming(proxy, "/events") as events, streaming(proxy, "/logs/a?follow=1") as log:
            await read_until(events, b"loaded")
            proxy.send(signal.SIGTERM)
            assert await proxy.ended() == 0
            for client in (events, log):
                while await client.chunk():
                    pass
