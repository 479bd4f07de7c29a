"""The reader of documents, as the rest of the proxy uses it."""

from __future__ import annotations

import os
from pathlib import Path

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece
from llama_smart_proxy.proxy.knowledge.reading.limits import Limits
from llama_smart_proxy.proxy.knowledge.reading.process import Worker

LIMITS = Limits()
CHUNKING = Chunking()


class DocumentReader:
    """Reads documents in a process with limits, one at a time; and web pages in another one, as a person waits.

    It is a `Reader`.
    """

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._files = Worker(limits)
        self._pages = Worker(limits)

    async def read(self, file: Path, name: str, media_type: str = "", chunking: Chunking = CHUNKING) -> list[Piece]:
        """As `Reader.read`. If the caller is cancelled, the process is replaced."""
        return await self._files.pieces(_request(file, name, media_type, chunking))

    async def page(self, content: bytes, name: str, media_type: str = "", chunking: Chunking = CHUNKING) -> list[Piece]:
        """As `Reader.page`."""
        return await self._pages.pieces(_request(None, name, media_type, chunking), content)

    async def close(self) -> None:
        """As `Reader.close`."""
        await self._files.close()
        await self._pages.close()


def _request(file: Path | None, name: str, media_type: str, chunking: Chunking) -> Json:
    by = {"characters": chunking.characters, "overlap": chunking.overlap}
    return {"path": os.path.abspath(file) if file else "", "name": name, "media_type": media_type, **by}
