"""Chats while documents are being added: for a test that counts their errors, and a bench that measures them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.e2e_support import Fakes, streaming, text_of
from tests.support.embedding import EmbeddingServer
from tests.support.harness import Proxy
from tests.support.raw_client import get

CLIENTS = 50


@dataclass
class Chats:
    """What became of chats: how long the first token of each took, in seconds, and those that went wrong."""

    firsts: list[float] = field(default_factory=list)
    wrong: list[object] = field(default_factory=list)


def config(folder: Path, server: EmbeddingServer, watched: Path) -> dict[str, Any]:
    """A proxy with a chat model for all clients at once, and with a watched folder, which need not exist."""
    fakes = Fakes(folder)
    model = fakes.model(TOKENS=4, TOKEN_MS=50, fields={"args": ["--parallel", str(CLIENTS)]})
    knowledge = {"embedding_model": "words", "watch": [{"path": str(watched), "collection": "load"}]}
    return {
        **fakes.config({"m": model}),
        "remotes": {"r": server.remote},
        "state_dir": str(folder / "state"),
        "knowledge": knowledge,
    }


def write(folder: Path, files: int) -> None:
    """So many small documents, which appear at once."""
    new = folder.with_name("new")
    new.mkdir()
    for number in range(files):
        (new / f"{number}.md").write_text(
            f"# Document {number}\n\nThe content of document {number} is number {number}.\n"
        )
    new.rename(folder)


async def added(proxy: Proxy, files: int) -> bool:
    """Whether so many documents have been added. The list itself takes time: this waits a little first."""
    await asyncio.sleep(0.2)
    stores = (await get(proxy.port, "/v1/vector_stores")).json()["data"]
    return any(store["file_counts"]["completed"] == files for store in stores)


async def chatting(proxy: Proxy, goes_on: Callable[[int], bool]) -> Chats:
    """50 clients chat, each again and again while `goes_on` for the number of its chats."""
    chats = Chats()
    await asyncio.gather(*(_client(proxy, goes_on, chats) for _ in range(CLIENTS)))
    return chats


async def _client(proxy: Proxy, goes_on: Callable[[int], bool], chats: Chats) -> None:
    number = 0
    while goes_on(number):
        number += 1
        began_s = time.monotonic()
        async with streaming(proxy, "m") as stream:
            await stream.event()
            chats.firsts.append(time.monotonic() - began_s)
            await stream.rest()
            if stream.status != 200 or text_of(stream.events) != "t0 t1 t2 t3 ":
                chats.wrong.append((stream.status, stream.events))
