"""A backend of somebody else in one file: a provider whose models run in a server program that is in here, too.

The configuration registers it by `modules: [toy.py]`; `sections: {toy: {models: [...], reply: "..."}}` sets it up.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from pydantic import BaseModel

from llama_smart_proxy.backends.base import Services
from llama_smart_proxy.backends.http.connection import Endpoint
from llama_smart_proxy.backends.pool.launcher import Command, HttpLauncher, PoolModel, inherited
from llama_smart_proxy.backends.pool.spawned import SpawnedModel, SpawnedProvider
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.registry import Registry


class Settings(BaseModel):
    """What may stand in the section."""

    models: list[str] = ["toy"]
    reply: str = "Hello from a toy"


class ToyLauncher(HttpLauncher):
    """Starts the server below. It requires its key for everything but `/health`."""

    slots = 2
    keyed_path = "/v1/models"

    def __init__(self, reply: str) -> None:
        self._reply = reply

    def command(self, listen: Endpoint, key: str) -> Command:
        argv = [sys.executable, __file__, listen.host, str(listen.port)]
        return Command(argv, {**inherited(os.environ), "TOY_KEY": key, "TOY_REPLY": self._reply}, listen)


class Toy(SpawnedProvider):
    """The provider."""

    section: ClassVar[str] = "toy"
    Config: ClassVar[Any] = Settings

    @classmethod
    def create(cls, config: Config, services: Services) -> Toy:
        settings = Settings.model_validate(config.sections.get(cls.section, {}))
        launcher = ToyLauncher(settings.reply)
        models = [SpawnedModel(services.pool, PoolModel(name, launcher), kind="toy") for name in settings.models]
        return cls(services.pool, models)


def extend(registry: Registry) -> None:
    registry.providers.append(Toy)


# -- the server program ------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A little of OpenAI's API."""

    def do_GET(self) -> None:
        if self.path == "/health" or self._allowed():
            self._send(200, "application/json", b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        words = os.environ["TOY_REPLY"].split(" ")
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            self._send(200, "application/json", self._completion("message", message, "stop"))
            return
        deltas = [{"role": "assistant", "content": words[0]}, *({"content": f" {word}"} for word in words[1:])]
        events = [self._completion("delta", delta, None) for delta in deltas]
        events += [self._completion("delta", {}, "stop"), b"[DONE]"]
        self._send(200, "text/event-stream", b"".join(b"data: %s\n\n" % event for event in events))

    def _allowed(self) -> bool:
        allowed = self.headers["Authorization"] == f"Bearer {os.environ['TOY_KEY']}"
        if not allowed:
            self._send(401, "application/json", b"{}")
        return allowed

    def _completion(self, part: str, value: dict[str, str], finish: str | None) -> bytes:
        kind = "chat.completion" if part == "message" else "chat.completion.chunk"
        choice = {"index": 0, part: value, "finish_reason": finish}
        return json.dumps({"id": "toy", "object": kind, "created": 1, "model": "toy", "choices": [choice]}).encode()

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
