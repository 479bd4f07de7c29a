"""llama-server's router-mode API, and `/api/pull` and `/api/delete`: models come, are watched, and go."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import Hub, gguf, running_hub
from tests.support import raw_client
from tests.support.e2e_support import Fakes, chat, fakes, streaming
from tests.support.harness import Proxy, running_proxy, until
from tests.support.ollamas import running_ollama
from tests.support.raw_client import EventReader, RawClient, request

__all__ = ["fakes"]  # a fixture
FILE = "org/repo/m-Q4_K_M.gguf"
NAME = "hf.co/org/repo:Q4_K_M"
SHORT = "org/repo:Q4_K_M"
"""llama-server's own name for it."""
SIZE = 8_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        hub.add(FILE, gguf(SIZE))
        yield hub


@asynccontextmanager
async def proxy_with(hub: Hub, fakes: Fakes) -> AsyncIterator[Proxy]:
    env = hub.env(fakes.folder / "home")
    async with running_proxy(fakes.config({"near": fakes.model(LOAD_S=0.3)}), env=env) as proxy:
        yield proxy


class Watch(EventReader):
    """Reads the events of `GET /models/sse` as they come."""

    async def until(self, name: str, **data: object) -> Any:
        """The first event about `name` whose data has these fields."""
        while (event := await self.next())["model"] != name or not data.items() <= event["data"].items():
            pass
        return event

    async def progress(self) -> list[Any]:
        """What the first event says that tells of bytes of a download: how many of how many."""
        while (event := await self.next())["event"] != "download_progress" or not any(
            part["done"] for part in event["data"].values()
        ):
            pass
        return list(event["data"].values())


@asynccontextmanager
async def watching(proxy: Proxy) -> AsyncIterator[Watch]:
    async with raw_client.connected(proxy.port) as client:
        await client.send(request("GET", "/models/sse"))
        _, status, headers = await client.head()
        assert (status, dict(headers)["content-type"]) == (200, "text/event-stream")
        yield Watch(client)


async def names(proxy: Proxy, path: str = "/v1/models") -> list[str]:
    listed = (await raw_client.get(proxy.port, path)).json()
    return [item.get("id") or item["name"] for item in listed.get("data") or listed["models"]]


async def test_a_watcher_sees_a_model_come_and_go(hub: Hub, fakes: Fakes) -> None:
    async with proxy_with(hub, fakes) as proxy, watching(proxy) as watch:
        assert (await watch.until("near", status="unloaded"))["event"] == "model_status"
        assert (await raw_client.post(proxy.port, "/models/load", {"model": "near"})).json() == {"success": True}
        await watch.until("near", status="loaded")
        async with streaming(proxy, "near", fake={"stall_after": 2}) as stream:
            await stream.until_text()
            assert (await raw_client.post(proxy.port, "/models/unload", {"model": "near"})).json() == {"success": True}
            await watch.until("near", status="unloading")
        await watch.until("near", status="unloaded")


async def test_a_watcher_is_let_go_when_the_proxy_stops(hub: Hub, fakes: Fakes) -> None:
    config = fakes.config({"near": fakes.model()}) | {"server": {"drain_s": 600}}
    async with running_proxy(config, env=hub.env(fakes.folder / "home")) as proxy, watching(proxy) as watch:
        await watch.until("near", status="unloaded")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0


@pytest.mark.parametrize("by", ["router", "ollama"])
async def test_a_model_of_the_hub_is_downloaded_offered_used_and_deleted(by: str, hub: Hub, fakes: Fakes) -> None:
    hub.behave(FILE, hold=0.5, slow=16_000_000)  # slow enough for some progress to be told
    async with proxy_with(hub, fakes) as proxy, watching(proxy) as watch:
        if by == "router":
            asked = await raw_client.post(proxy.port, "/models", {"model": "org/repo:Q4_K_M"})
            assert asked.json() == {"success": True}
        else:
            body = json.dumps({"model": NAME}).encode()
            pulling = raw_client.connected(proxy.port)
            client = await pulling.__aenter__()
            await client.send(request("POST", "/api/pull", body))
            assert (await client.head())[1] == 200
        await until(lambda: under_way(proxy), what="the download")
        assert NAME not in await names(proxy)
        assert [part["total"] for part in await watch.progress()] == [SIZE]
        hub.behave(FILE)
        await watch.until(NAME, status="unloaded")
        for path in ("/v1/models", "/api/tags"):
            await until(lambda path=path: offered(proxy, path), what=f"the model in {path}")  # type: ignore[misc]
        for name in (NAME, SHORT, SHORT.lower()):
            assert (await chat(proxy, name)).status == 200
        if by == "router":
            gone = await raw_client.ask(proxy.port, request("DELETE", "/models?model=org/repo:Q4_K_M", close=True))
        else:
            lines = [json.loads(line) for line in await rest(client)]
            assert lines[0]["status"] and lines[-1] == {"status": "success"}
            await pulling.__aexit__(None, None, None)
            gone = await raw_client.ask(proxy.port, request("DELETE", "/api/delete", body, close=True))
        assert gone.status == 200
        await until(lambda: no_more_offered(proxy), what="the end of the model in the list")
        for name in (NAME, SHORT):
            assert (await chat(proxy, name)).status == 404


async def test_a_reload_of_the_list_finds_what_another_program_has_put_into_the_cache(hub: Hub, fakes: Fakes) -> None:
    async with proxy_with(hub, fakes) as proxy:
        assert await names(proxy) == ["near"]
        snapshot = fakes.folder / "home" / "hub" / "models--a--b" / "snapshots" / "c"
        snapshot.mkdir(parents=True)
        (snapshot / "m-Q8_0.gguf").write_bytes(gguf(1000))
        assert await names(proxy, "/models?reload=1") == ["near", "hf.co/a/b:Q8_0"]
        listed = (await raw_client.get(proxy.port, "/models")).json()["data"]
        assert listed[1]["aliases"] == ["hf.co/a/b:Q8_0", "a/b:Q8_0"]
        tags = (await raw_client.get(proxy.port, "/api/tags")).json()["models"]
        assert [item["name"] for item in tags] == ["near", "hf.co/a/b:Q8_0"], "menus show it once"


async def offered(proxy: Proxy, path: str = "/v1/models") -> bool:
    return NAME in await names(proxy, path)


async def no_more_offered(proxy: Proxy) -> bool:
    return not await offered(proxy)


async def rest(client: RawClient) -> list[bytes]:
    """The lines of an answer, to its end."""
    data = b""
    while piece := await client.chunk():
        data += piece
    return data.splitlines()


async def test_a_pull_whose_client_leaves_stops(hub: Hub, fakes: Fakes) -> None:
    hub.behave(FILE, hold=0.5, slow=16_000_000)  # slow enough for some progress to be told
    async with proxy_with(hub, fakes) as proxy:
        async with raw_client.connected(proxy.port) as client:
            await client.send(request("POST", "/api/pull", json.dumps({"model": NAME}).encode()))
            await client.head()
            await until(lambda: under_way(proxy), what="the download")
            client.leave()
        await until(lambda: none_under_way(proxy), what="the end of the download")


async def under_way(proxy: Proxy) -> bool:
    return any(item.get("completed") for item in (await proxy.health())["downloads"])


async def none_under_way(proxy: Proxy) -> bool:
    return not (await proxy.health())["downloads"]


async def test_what_is_configured_is_not_deleted_and_what_is_unknown_not_found(hub: Hub, fakes: Fakes) -> None:
    async with proxy_with(hub, fakes) as proxy:
        for method, path, body, status in (
            ("DELETE", "/models?model=near", b"", 400),
            ("DELETE", "/models?model=far", b"", 404),
            ("DELETE", "/api/delete", b'{"model":"near"}', 400),
            ("DELETE", "/api/delete", b'{"model":"far"}', 404),
            ("POST", "/models", b'{"model":"../repo"}', 400),
            ("POST", "/api/pull", b'{"model":"hf.co/../repo:x"}', 400),
            ("POST", "/models/unload", b'{"model":"far"}', 404),
        ):
            answer = await raw_client.ask(proxy.port, request(method, path, body, close=True))
            assert answer.status == status, (method, path, answer.body)
        assert await names(proxy) == ["near"]


async def test_pages_of_other_sites_change_nothing(hub: Hub, fakes: Fakes) -> None:
    async with proxy_with(hub, fakes) as proxy:
        for method, path, body in (
            ("POST", "/models", b'{"model":"org/repo:Q4_K_M"}'),
            ("DELETE", "/models?model=near", b""),
            ("POST", "/models/load", b'{"model":"near"}'),
            ("POST", "/api/pull", b'{"model":"hf.co/org/repo"}'),
        ):
            headers = (("Origin", "https://evil.example"),)
            answer = await raw_client.ask(proxy.port, request(method, path, body, headers=headers, close=True))
            assert answer.status == 403, (path, answer.body)
        assert hub.requests() == []


async def test_a_model_of_an_ollama_is_not_deleted_by_the_router_mode_api() -> None:
    async with (
        running_ollama("m") as ollama,
        running_proxy({"ollama": {"host": f"127.0.0.1:{ollama.port}"}, "llama_cpp": {"hf_cache": False}}) as proxy,
    ):
        refused = await raw_client.ask(proxy.port, request("DELETE", "/models?model=m", close=True))
        assert refused.status == 404
        listed = (await raw_client.get(proxy.port, "/api/tags")).json()["models"]
        assert [model["name"] for model in listed] == ["m:latest"]
        assert ollama.events("request", "/api/delete") == []
