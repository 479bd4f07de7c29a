"""A server that redirects is an error to every client: not followed, as a key would go elsewhere, and not passed on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import Answer, ask, get, request
from tests.support.toxic import Link, RawUpstream, Request, plain, raw_upstream

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES, "input": "hi", "max_tokens": 9}
TAGS = plain(orjson.dumps({"models": [{"name": "o:latest", "model": "o:latest"}]}))
DIGEST = "sha256:" + "0" * 64
ROADS: dict[str, tuple[str, str, dict[str, Any] | bytes | None]] = {
    **{
        f"{path}, {model}{', streamed' * streamed}": ("POST", path, {**CHAT, "model": model, "stream": streamed})
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat")
        for model in ("m", "o", "agent")
        for streamed in (False, True)
    },
    **{f"{path}, {model}": ("POST", path, {"input": "hi", "prompt": "hi", "model": model})
       for path in ("/v1/embeddings", "/v1/completions", "/api/embed") for model in ("m", "o")},
    "counting": ("POST", "/v1/messages/count_tokens", {**CHAT, "model": "m"}),
    "rerank": ("POST", "/v1/rerank", {"query": "hi", "documents": ["a"], "model": "m"}),
    "properties": ("GET", "/props?model=m", None),
    "HEAD": ("HEAD", "/slots?model=m", None),
    "show": ("POST", "/api/show", {"model": "o"}),
    "pull": ("POST", "/api/pull", {"model": "o", "stream": False}),
    "copy": ("POST", "/api/copy", {"source": "o", "destination": "p"}),
    "account": ("POST", "/api/me", None),
    "blob": ("POST", f"/api/blobs/{DIGEST}", b"{}"),
    "look for a blob": ("HEAD", f"/api/blobs/{DIGEST}", None),
}  # fmt: skip


@pytest.fixture
async def elsewhere() -> AsyncIterator[RawUpstream]:
    async with raw_upstream(plain(b'{"followed":true}')) as upstream:
        yield upstream


async def answered(proxy: Proxy, road: str) -> Answer:
    method, path, body = ROADS[road]
    key = [("Authorization", "Bearer client-key")]
    return await ask(proxy.port, request(method, path, body, headers=key, close=True), method=method)


@pytest.mark.parametrize("status", [301, 307])
async def test_no_road_follows_a_redirect_or_passes_it_on(elsewhere: RawUpstream, status: int) -> None:
    location = f"http://127.0.0.1:{elsewhere.port}/v1/chat/completions?key=secret"

    async def script(link: Link, asked: Request) -> None:
        lists = {"/api/tags": TAGS, "/api/ps": plain(b'{"models":[]}'), "/api/version": plain(b'{"version":"1"}')}
        listed = lists.get(asked.line.split()[1])
        await link.send(listed or plain(b"", status, [("Location", location)]))

    async with raw_upstream(script) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        config = {
            "remotes": {"up": {"url": url, "models": ["m"], "api_key": "server-key", "responses": True}},
            "ollama": {"host": url},
            "models": {"agent": {"model": "m", "agents": ["think"]}},
        }
        async with running_proxy(config) as proxy:
            for road, (method, _, _) in ROADS.items():
                answer = await answered(proxy, road)
                assert answer.status == 502 and answer.header("location") is None, (road, answer)
                if method != "HEAD":
                    error = answer.json()["error"]
                    message = error if isinstance(error, str) else error["message"]
                    assert f"redirects to http://127.0.0.1:{elsewhere.port}/v1" in message, (road, answer)
                    assert "secret" not in message
            assert elsewhere.links == []


async def test_a_redirected_list_of_models_is_an_error_of_its_remote(elsewhere: RawUpstream) -> None:
    location = f"http://127.0.0.1:{elsewhere.port}/v1/models"
    async with raw_upstream(plain(b"", 302, [("Location", location)])) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        async with running_proxy({"remotes": {"up": {"url": url}}, "ollama": {"host": url}}) as proxy:

            async def told() -> bool:
                await get(proxy.port, "/api/tags")  # a busy machine may have been too slow for the first lists
                owners = ("remote up", f"ollama {url}")
                return all(f"{owner}: the model server redirects to {location}:" in proxy.log for owner in owners)

            await until(told, what="the error of both servers")
            assert elsewhere.links == []
