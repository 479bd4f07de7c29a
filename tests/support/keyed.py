"""A proxy in the test's process that requires API keys, over scripted servers of OpenAI's and of Ollama's API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config
from tests.support import toxic
from tests.support.here import served_here
from tests.support.raw_client import Answer, RawClient, ask, connected, request
from tests.support.toxic import Link, RawUpstream, Request, raw_upstream

CHAT, MESSAGES = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
USER, ADMIN, FEW = "user-canary-0123456789", "root-canary-0123456789", "few-canary-01234567890"
KEYS: list[Any] = [
    {"name": "user", "key": USER},
    {"name": "root", "key": ADMIN, "scopes": ["admin"]},
    {"name": "few", "key": FEW, "models": ["a*", "team"], "agents": ["b"]},
]
USAGE = {"prompt_tokens": 30, "completion_tokens": 10, "total_tokens": 40}
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "a1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
STREAM = toxic.stream(
    toxic.token("Hi"),
    toxic.event({**COMPLETION, "object": "chat.completion.chunk", "choices": []}),
    toxic.DONE,
)
MESSAGE = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "a1",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 30, "output_tokens": 10},
}
MESSAGE_STREAM = toxic.stream(
    b"event: message_delta\n" + toxic.event({"type": "message_delta", "delta": {}, "usage": MESSAGE["usage"]}),
    b"event: message_stop\n" + toxic.event({"type": "message_stop"}),
)
DETAILS = {
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "1B",
    "quantization_level": "Q4",
}
TAG = {
    "name": "big:latest",
    "model": "big:latest",
    "modified_at": "2026-01-01T00:00:00Z",
    "size": 1,
    "digest": "0" * 64,
}
OF_OLLAMA: dict[str, Any] = {
    "/api/tags": {"models": [{**TAG, "details": DETAILS}]},
    "/api/ps": {"models": []},
    "/api/version": {"version": "0.13.0"},
    "/api/show": {"details": DETAILS, "model_info": {}, "capabilities": ["completion"]},
    "/api/chat": {"model": "big:latest", "message": {"role": "assistant", "content": "Hi"}, "done": True},
    "/api/generate": {"model": "big:latest", "response": "", "done": True},
}


async def answering(link: Link, asked: Request) -> None:
    """What both servers answer, by the path of a request."""
    path = asked.line.split()[1].partition("?")[0]
    if path in OF_OLLAMA:
        await link.send(toxic.plain(json.dumps(OF_OLLAMA[path]).encode()))
    else:
        whole, stream = (MESSAGE, MESSAGE_STREAM) if path == "/v1/messages" else (COMPLETION, STREAM)
        streamed = asked.body and asked.json().get("stream") is True
        await link.send(stream if streamed else toxic.plain(json.dumps(whole).encode()))


@dataclass
class Keyed:
    """The proxy at `port`; `upstream` is both of its servers."""

    port: int
    upstream: RawUpstream
    app: App | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    async def reload(self, **server: Any) -> None:
        """Let another configuration apply, with these settings of the server."""
        assert self.app is not None
        self.settings = {**self.settings, "server": {**self.settings["server"], **server}}
        await self.app.apply(await self.app.prepared(Config.model_validate(self.settings)))

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, key: str = "", more: Any = ()
    ) -> Answer:
        """The answer to a request with this key, if there is one, and further headers."""
        headers = [*([("Authorization", f"Bearer {key}")] if key else []), *more]
        return await ask(self.port, request(method, path, body, headers=headers, close=True), method=method)

    async def chat(self, key: str, model: str = "a1", *, text: str = "Hello", more: Any = (), **fields: Any) -> Answer:
        """The answer to a chat with this key."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return await self.ask("POST", CHAT, body, key=key, more=more)

    def sent(self, path: str) -> list[Request]:
        """The requests for `path` that reached a server."""
        return [item for item in self.upstream.requests if item.line.split()[1].partition("?")[0] == path]

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[RawClient]:
        """A connection to the proxy."""
        async with connected(self.port) as client:
            yield client


@asynccontextmanager
async def keyed(keys: list[Any] | None = None, *, script: Any = answering, **config: Any) -> AsyncIterator[Keyed]:
    """A proxy with these keys, with the models `a1`, `a2` and `b1` of a remote, `big` of an Ollama, and the virtual
    models `team` over `b1` and `vb` over `a1`."""
    async with raw_upstream(script) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        server = {"api_keys": KEYS if keys is None else keys, **config.pop("server", {})}
        settings = {
            "server": server,
            "remotes": {"up": {"url": url, "models": ["a1", "a2", "b1"]}},
            "ollama": {"host": url},
            "models": {"team": {"model": "b1", "aliases": ["mates"]}, "vb": {"model": "a1"}},
            "agents": [],
            **config,
        }
        async with served_here(settings) as (front, port):
            app = front.request_handler
            assert isinstance(app, App)
            yield Keyed(port, upstream, app, settings)
