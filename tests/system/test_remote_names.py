"""Models of a remote under the remote's name and without it: the remote is asked by its own ids."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from tests.support.e2e_support import CHAT
from tests.support.harness import Proxy, running_proxy
from tests.support.raw_client import get, post
from tests.support.toxic import Link, RawUpstream, Request, plain, raw_upstream

OFFERED = ["unsloth/Qwen3", "plain", "a+b&c=d"]
MEANT = {
    "unsloth/Qwen3": "unsloth/Qwen3",
    "unsloth/unsloth/Qwen3": "unsloth/Qwen3",
    "plain": "plain",
    "unsloth/plain": "plain",
    "unsloth/a+b&c=d": "a+b&c=d",
}
"""What a client may ask of the remote `unsloth`, and the remote's own id for it."""


@pytest.fixture(params=["as configured", "as listed"])
async def unsloth(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    """A proxy with a remote whose name its ids begin with."""
    listing = plain(json.dumps({"data": [{"id": name} for name in OFFERED]}).encode())

    async def script(link: Link, asked: Request) -> None:
        await link.send(listing if asked.line.startswith("GET /v1/models ") else plain(b"{}"))

    async with raw_upstream(script) as upstream:
        models = OFFERED if request.param == "as configured" else None
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": models}
        async with running_proxy({"remotes": {"unsloth": remote}}) as proxy:
            yield proxy, upstream


def queried(asked: Request) -> list[str]:
    """The models that the query of a request names."""
    return parse_qs(urlsplit(asked.line.split()[1]).query).get("model", [])


async def test_a_remote_is_asked_by_its_own_id(unsloth: tuple[Proxy, RawUpstream]) -> None:
    proxy, upstream = unsloth
    for name, meant in MEANT.items():
        assert (await post(proxy.port, CHAT, {"model": name})).status == 200
        assert upstream.requests[-1].json()["model"] == meant


@pytest.mark.parametrize("safe", ["/", ""])
async def test_a_remote_is_asked_by_its_own_id_when_the_model_is_in_the_url(
    unsloth: tuple[Proxy, RawUpstream], safe: str
) -> None:
    proxy, upstream = unsloth
    for name, meant in MEANT.items():
        quoted = quote(name, safe=safe)
        assert (await get(proxy.port, f"/props?model={quoted}")).status == 200
        assert upstream.requests[-1].line.startswith("GET /props?")
        assert queried(upstream.requests[-1]) == [meant]

        assert (await post(proxy.port, f"{CHAT}?model={quoted}", {})).status == 200
        assert upstream.requests[-1].json()["model"] == meant
        assert queried(upstream.requests[-1]) in ([], [meant])

        shown = await get(proxy.port, f"/v1/models/{quoted}")
        assert (shown.status, shown.json()["id"], shown.json()["owned_by"]) == (200, meant, "unsloth")


async def test_a_name_that_is_only_nearly_right_is_nobodys(unsloth: tuple[Proxy, RawUpstream]) -> None:
    proxy, _ = unsloth
    for name in ("Qwen3", "unsloth/", "unsloth", "other/plain", "unsloth/unsloth/plain"):
        answer = await post(proxy.port, CHAT, {"model": name})
        assert (answer.status, answer.error["code"]) == (404, "model_not_found"), name


BASES = {
    "": ("/v1", ""),
    "/": ("/v1", ""),
    "/v1": ("/v1", ""),
    "/v3/": ("/v3", ""),
    "/V2": ("/V2", ""),
    "/api/v1": ("/api/v1", "/api"),
    "/api/paas/v4//": ("/api/paas/v4", "/api/paas"),
    "/v1beta/openai/": ("/v1beta/openai", "/v1beta/openai"),
    "/v1-root": ("/v1-root", "/v1-root"),
    "/engines/llama.cpp/v1": ("/engines/llama.cpp/v1", "/engines/llama.cpp"),
    "/llama": ("/llama", "/llama"),
    "/compat/v1a2": ("/compat/v1a2", "/compat"),
}
"""The path of a remote's URL, where it has OpenAI's endpoints, and where the others of a llama-server."""
ASKED = {
    CHAT: "{base}/chat/completions",
    "/v1/chat/completions/": "{base}/chat/completions",
    "/v1/embeddings?x=1": "{base}/embeddings?x=1",
    "/v1/messages": "{base}/messages",
    "/messages": "{base}/messages",
    "/api/chat": "{base}/chat/completions",
    "/tokenize": "{root}/tokenize",
}


async def test_the_url_of_a_remote_is_the_base_of_every_request() -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
        "stream": False,
        "content": "",
        "input": "",
    }
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}]}
    listing = plain(json.dumps({"data": [{"id": "m"}]}).encode())

    async def script(link: Link, asked: Request) -> None:
        await link.send(listing if asked.line.startswith("GET ") else plain(json.dumps(answer).encode()))

    async with raw_upstream(script) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        remotes = {f"r{number}": {"url": url + path} for number, path in enumerate(BASES)}
        async with running_proxy({"remotes": remotes}) as proxy:
            for name, (base, root) in zip(remotes, BASES.values(), strict=True):
                for path, expected in ASKED.items():
                    assert (await post(proxy.port, path, body | {"model": f"{name}/m"})).status == 200, (base, path)
                    meant = expected.format(base=base, root=root)
                    assert upstream.requests[-1].line == f"POST {meant} HTTP/1.1", (base, path)
            listed = {request.line for request in upstream.requests if request.line.startswith("GET ")}
            assert listed == {f"GET {base}/models HTTP/1.1" for base, _ in BASES.values()}
