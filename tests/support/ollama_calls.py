"""The Ollama API by hand: bodies that are good for every endpoint, its errors, and proxies over Ollamas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES
from tests.support.harness import Proxy, free_port, session_proxy
from tests.support.ollamas import FakeOllama, running_ollama
from tests.support.raw_client import Answer
from tests.support.stages import running

ASKING = ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"]
ABOUT = ["/api/show", "/api/pull", "/api/create", "/api/copy", "/api/push", "/api/delete"]
V1 = ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings"]
both_backends = pytest.mark.parametrize("model", ["local", "distant"], ids=["llama.cpp", "ollama"])


def body_of(model: object, **fields: Any) -> dict[str, Any]:
    """A body that is good for every endpoint."""
    own = {"model": model, "messages": MESSAGES, "prompt": "hi", "input": "hi", "stream": False, "max_tokens": 4}
    return own | {"source": model, "destination": "x", **fields}


async def ask(proxy: Proxy, path: str, body: dict[str, Any] | None, method: str = "") -> Answer:
    method = method or ("DELETE" if path == "/api/delete" else "POST")
    return await raw_client.ask(proxy.port, raw_client.request(method, path, body, close=True), method=method)


def refused(answer: Answer, path: str, status: int = 400) -> str:
    """The words of an error, which must be of this status, in the form that the API at `path` has."""
    assert answer.status == status, answer.body[:300]
    said = answer.json()
    if path.startswith("/api/"):
        assert list(said) == ["error"]
        words = said["error"]
    elif path.startswith("/v1/messages"):
        assert said["type"] == "error"
        words = said["error"]["message"]
    else:
        assert {"message", "type", "param", "code"} == said["error"].keys()
        words = said["error"]["message"]
    assert isinstance(words, str)
    return words


@dataclass(frozen=True)
class Eager:
    """`proxy` pulls what it has not; it has `pinned`, of 2048 tokens of context, and `free` of whatever is asked."""

    proxy: Proxy
    fake: FakeOllama

    def sent(self, path: str) -> dict[str, Any]:
        """The body of the last request for `path`."""
        body = json.loads(self.fake.events("request", path)[-1]["body"])
        assert isinstance(body, dict)
        return body


@pytest.fixture(scope="module")
def eager() -> Iterator[Eager]:
    pinned = {"backend": "ollama", "ctx": 2048}
    with (
        running(running_ollama("pinned", "free")) as fake,
        session_proxy({"ollama": {"host": fake.url, "pull": "auto"}, "models": {"pinned": pinned}}) as proxy,
    ):
        yield Eager(proxy, fake)


@pytest.fixture(scope="module")
def lonely() -> Iterator[Proxy]:
    """Its Ollama is down, and it pulls nothing."""
    with session_proxy({"ollama": {"host": f"127.0.0.1:{free_port()}", "pull": "never"}}) as proxy:
        yield proxy
