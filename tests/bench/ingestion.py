"""How fast documents are added, and what that costs those who chat meanwhile.

`python -m tests.bench.ingestion` measures the catalogue alone (pieces per second into SQLite, without embedding), then
the first tokens of 50 clients who chat, alone and while 5,000 small documents are added.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_smart_proxy.proxy.knowledge import catalogue, queue
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.ingestion import STORED_AT_ONCE
from llama_smart_proxy.proxy.knowledge.queue import Staged
from llama_smart_proxy.proxy.store import Sql
from tests.support import beside_ingestion
from tests.support.embedding import embedding_server
from tests.support.harness import running_proxy, until

DIMENSIONS, LENGTH = 384, 900


async def inserted(folder: Path, pieces: int) -> float:
    """Pieces per second that the catalogue takes, in one document."""
    database = Database(folder, "")
    vectors = np.random.default_rng(1).standard_normal((pieces, DIMENSIONS)).astype("<f2")

    def begun(sql: Sql) -> tuple[queue.Job, int]:
        kept = catalogue.create(sql, "bench", "", {}, None)
        serial, _ = catalogue.add_document(sql, "long.md", 1, "digest")
        catalogue.attach(sql, kept.serial, serial, None, None)
        (job,) = queue.jobs(sql, 1)
        return job, queue.begin(sql, job, "model")[0]

    job, version = await database.run(begun)
    began_s = time.perf_counter()
    for at in range(0, pieces, STORED_AT_ONCE):
        rows = [
            Staged(version, number, "A > B", f"{number} ".ljust(LENGTH, "x"), vectors[number].tobytes())
            for number in range(at, min(at + STORED_AT_ONCE, pieces))
        ]
        await database.run(partial(queue.store, rows=rows))
    await database.run(partial(queue.complete, job=job, version=version, identity="model"))
    rate = pieces / (time.perf_counter() - began_s)
    database.close()
    return rate


async def beside(folder: Path, files: int) -> dict[str, float]:
    """Median and 95th percentile of the first tokens, in milliseconds, and files per second."""
    async with embedding_server() as server:
        docs = folder / "docs"
        async with running_proxy(beside_ingestion.config(folder, server, docs)) as proxy:
            await beside_ingestion.chatting(proxy, lambda number: number < 2)
            alone = await beside_ingestion.chatting(proxy, lambda number: number < 20)
            complete = asyncio.Event()
            beside_ingestion.write(docs, files)
            await until(lambda: server.texts)
            began_s = time.perf_counter()
            chatting = asyncio.create_task(beside_ingestion.chatting(proxy, lambda _: not complete.is_set()))
            await until(lambda: beside_ingestion.added(proxy, files), 3600)
            spent_s = time.perf_counter() - began_s
            complete.set()
            during = await chatting
    return {
        **_summary("alone", alone.firsts),
        **_summary("during", during.firsts),
        "ratio_p50": statistics.median(during.firsts) / statistics.median(alone.firsts),
        "chats": len(during.firsts),
        "errors": len(during.wrong),
        "files_per_s": files / spent_s,
    }


def _summary(name: str, firsts: list[float]) -> dict[str, float]:
    points = statistics.quantiles(firsts, n=20)
    return {f"{name}_p50_ms": statistics.median(firsts) * 1000, f"{name}_p95_ms": points[18] * 1000}


async def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=50_000)
    parser.add_argument("--files", type=int, default=5000)
    given = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        result["inserted_per_s"] = await inserted(Path(folder), given.pieces)
    print(json.dumps(result), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result |= await beside(Path(folder), given.files)
    print(json.dumps({name: round(value, 2) for name, value in result.items()}, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
