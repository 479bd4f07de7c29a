"""Chats go on while thousands of documents are being added."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import beside_ingestion
from tests.support.embedding import embedding_server
from tests.support.harness import running_proxy, until

pytest.importorskip("numpy", reason="needs the extra rag")


@pytest.mark.full
async def test_fifty_clients_chat_without_an_error_while_5000_documents_are_added(tmp_path: Path) -> None:
    async with embedding_server() as server:
        config = beside_ingestion.config(tmp_path, server, tmp_path / "docs")
        async with running_proxy(config) as proxy:
            complete = asyncio.Event()
            beside_ingestion.write(tmp_path / "docs", 5000)
            chatting = asyncio.create_task(
                beside_ingestion.chatting(proxy, lambda number: number < 2 or not complete.is_set())
            )
            await until(lambda: beside_ingestion.added(proxy, 5000), 600)
            complete.set()
            chats = await chatting
            assert chats.wrong == [] and len(chats.firsts) >= 2 * beside_ingestion.CLIENTS
    assert sum(server.batches) == 5000
