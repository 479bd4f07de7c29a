"""What an Ollama is asked about its models: pulls, listings, and the files that models are made of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.e2e_support import MESSAGES
from tests.support.harness import Proxy, running_proxy
from tests.support.ollama_calls import Eager, ask, body_of, eager, lonely, refused
from tests.support.toxic import RawUpstream, plain, raw_upstream

__all__ = ["eager", "lonely"]  # fixtures
BLOB = f"/api/blobs/sha256:{'a' * 64}"
NO_PULL: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": "", "keep_alive": 0}),
    "generate, 0s": ("/api/generate", {"keep_alive": "0s"}),
    "chat": ("/api/chat", {"messages": [], "keep_alive": 0}),
    "count": ("/v1/messages/count_tokens", {"messages": MESSAGES}),
}


@pytest.mark.parametrize("name", NO_PULL)
async def test_a_model_is_not_pulled_to_be_unloaded_or_to_have_tokens_counted(eager: Eager, name: str) -> None:
    path, fields = NO_PULL[name]
    pulls = len(eager.fake.events("pull"))
    answer = await ask(eager.proxy, path, {"model": "unknown", **fields})
    assert "'unknown' not found" in refused(answer, path, 404)
    assert len(eager.fake.events("pull")) == pulls


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/api/show"])
async def test_a_model_that_might_be_on_a_dead_ollama_is_not_called_unknown(lonely: Proxy, path: str) -> None:
    assert "no Ollama host answers" in refused(await ask(lonely, path, body_of("m")), path, 502)


async def test_showing_models_does_not_have_them_listed_anew(eager: Eager) -> None:
    refused(await ask(eager.proxy, "/api/show", {"model": "absent"}), "/api/show", 404)  # any listing is over then
    before = len(eager.fake.events("request", "/api/tags"))
    for _ in range(20):
        assert (await ask(eager.proxy, "/api/show", {"model": "free"})).status == 200
    assert len(eager.fake.events("request", "/api/tags")) == before


# -- blobs -------------------------------------------------------------------------------------------------------------


async def test_a_blob_goes_to_the_ollama_that_is_configured_with_its_key_and_nowhere_else() -> None:
    async with raw_upstream(plain(b'{"models":[]}')) as other, raw_upstream() as upstream:
        there = [("Location", f"http://127.0.0.1:{other.port}/x")]
        upstream.script = plain(b"", 307, there)
        host = f"http://127.0.0.1:{upstream.port}"
        async with running_proxy({"ollama": {"host": host, "api_key": "topsecret"}}) as proxy:
            for method in ("HEAD", "POST"):
                assert (await ask(proxy, BLOB, None if method == "HEAD" else {}, method)).status == 502
                assert blob_requests(upstream)[-1].header("authorization") == "Bearer topsecret"
        assert not other.requests


def blob_requests(upstream: RawUpstream) -> list[Any]:
    return [request for request in upstream.requests if BLOB in request.line]


async def test_a_blob_for_a_dead_ollama_is_refused_in_its_form(lonely: Proxy) -> None:
    assert (await ask(lonely, BLOB, None, "HEAD")).status == 502
    assert "blob" in refused(await ask(lonely, BLOB, {}), BLOB, 502)
    lonely.check_log()
