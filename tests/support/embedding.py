"""A server in the test's process that embeds by words, counts what it is asked for, and fails when it is told to."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config

DIMENSIONS = 64


class EmbeddingServer:
    """`texts` are all that were embedded. It answers with the status `fails`, refuses texts that contain `refuses` and,
    whatever they have, the first `refuses_first` requests, and answers nothing while `gate` is clear: `waiting` are the
    requests that wait for it."""

    def __init__(self) -> None:
        self.port = 0
        self.texts: list[str] = []
        self.batches: list[int] = []
        self.fails = self.failed = self.refused = self.waiting = 0
        self.refuses = "\0"
        self.refuses_first = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def remote(self) -> dict[str, Any]:
        """The section of a remote with its models, by names of their own."""
        models = ["words", "other-words", "judge"]
        return {"url": f"http://127.0.0.1:{self.port}", "models": models}

    async def embeddings(self, request: web.Request) -> web.Response:
        """`POST /v1/embeddings`."""
        body = await request.json()
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if self.fails:
            self.failed += 1
            return web.json_response({"error": {"message": "down"}}, status=self.fails)
        if self.refused < self.refuses_first or any(self.refuses in text for text in body["input"]):
            self.refused += 1
            return web.json_response({"error": {"message": "bad input"}}, status=400)
        self.texts += body["input"]
        self.batches.append(len(body["input"]))
        salt = "" if body["model"] == "words" else body["model"]
        data = [{"index": number, "embedding": vector_of(text, salt)} for number, text in enumerate(body["input"])]
        return web.json_response({"object": "list", "data": data})

    async def rerank(self, request: web.Request) -> web.Response:
        """`POST /v1/rerank`: the shorter, the better."""
        texts = (await request.json())["documents"]
        results = [{"index": number, "relevance_score": -len(text) / 10} for number, text in enumerate(texts)]
        return web.json_response({"results": results})


def vector_of(text: str, salt: str = "") -> list[float]:
    """How often words of each kind are in a text."""
    vector = [0.01] * DIMENSIONS
    for word in re.findall(r"\w{3,}", text.lower()):
        vector[zlib.crc32((salt + word).encode()) % DIMENSIONS] += 1
    return vector


@asynccontextmanager
async def embedding_server() -> AsyncIterator[EmbeddingServer]:
    """The server, on a port of its own."""
    server = EmbeddingServer()
    app = web.Application()
    app.add_routes([web.post("/v1/embeddings", server.embeddings), web.post("/v1/rerank", server.rerank)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.port = runner.addresses[0][1]
    try:
        yield server
    finally:
        server.gate.set()
        await runner.cleanup()


def settings(server: EmbeddingServer, folder: object, **sections: Any) -> Config:
    """The configuration of a proxy with that server, and with its state in `folder`."""
    knowledge = {"embedding_model": "words", **sections.pop("knowledge", {})}
    base = {"llama_cpp": {"hf_cache": False}, "remotes": {"r": server.remote}, "state_dir": str(folder)}
    return Config.model_validate({**base, "knowledge": knowledge, **sections})


@asynccontextmanager
async def running_app(config: Config) -> AsyncIterator[App]:
    """A proxy in the test's process that listens nowhere."""
    app = App(config)
    await app.start()
    try:
        yield app
    finally:
        await app.close()
