"""Names of models that no model can have, as they are too long: refused before anything looks at them."""

from __future__ import annotations

import pytest

from llama_smart_proxy.backends.names import LONGEST_NAME
from llama_smart_proxy.proxy.errors import BadRequest
from tests.support.here import served_here
from tests.support.raw_client import Answer, ask, request

POSTED = [
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank"),
    *("/v1/messages/count_tokens", "/tokenize", "/completion", "/infill", "/lora-adapters"),
    *("/models", "/models/load", "/models/unload"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show", "/api/pull"),
    *("/api/copy", "/api/push", "/api/create"),
]
KINDS = {
    "a file of the hub": "hf.co/a/b:" + "a/" * 150_000,
    "a repository": "hf.co/" + "a-." * 100_000,
    "a user's": "registry.ollama.ai/" + "library/" * 40_000,
    "a little too long": "a" * (LONGEST_NAME + 1),
}


def sent(path: str, name: str) -> dict[str, object]:
    chat = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "max_tokens": 1}
    return {"model": name, "source": name, "destination": "b", "content": "x", "stream": False, **chat}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_name_over_512_characters_is_refused_in_every_api_and_not_repeated(kind: str) -> None:
    ollama = {"host": "127.0.0.1:9", "pull": "auto"}
    async with served_here({"ollama": ollama, "server_pool": {"size": 1}}) as (_, port):
        for path in POSTED:
            answer = await ask(port, request("POST", path, sent(path, KINDS[kind]), close=True))
            check(path, answer)
        deleted = await ask(port, request("DELETE", "/api/delete", sent("", KINDS[kind]), close=True))
        check("/api/delete", deleted)
        for path in ("/props?model=", "/slots?model=", "/v1/stream?conv_id=x&model="):
            short = KINDS[kind][:8000]
            check(path, await ask(port, request("GET", f"{path}{short}", close=True), method="GET"))


def check(path: str, answer: Answer) -> None:
    assert answer.status == 400, (path, answer.body[:200])
    assert len(answer.body) < 1000
    error = answer.json()["error"]
    assert isinstance(error, str if path.startswith("/api/") else dict), path


def test_what_an_error_quotes_of_a_request_is_cut() -> None:
    assert len(BadRequest("x" * 10**6).message) < 3000
