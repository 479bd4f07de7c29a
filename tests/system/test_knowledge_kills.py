"""`kill -9` while documents are being added: nothing is lost, and nothing is there twice."""

from __future__ import annotations

import random
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.embedding import EmbeddingServer, embedding_server
from tests.support.harness import running_proxy, until

pytest.importorskip("numpy", reason="needs the extra rag")
FILES, LONG = 40, 60


def write(folder: Path) -> set[str]:
    """Small files, and one with many pieces. Returns a word of each piece, which no other has."""
    folder.mkdir()
    for number in range(FILES):
        (folder / f"small{number}.md").write_text(f"# Small\n\nThe content of sm{number}x.\n")
    parts = [f"# Part {number}\n\nlo{number}x {'and so on ' * 70}\n" for number in range(LONG)]
    (folder / "long.md").write_text("\n".join(parts))
    return {f"sm{number}x" for number in range(FILES)} | {f"lo{number}x" for number in range(LONG)}


def pieces(folder: Path) -> list[str]:
    """The texts that are found, once no file is in progress; before that none."""
    if not (folder / "knowledge.db").exists():
        return []
    with closing(sqlite3.connect(f"file:{folder / 'knowledge.db'}?mode=ro", uri=True, timeout=30)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'chunks'").fetchall():
            return []
        states = database.execute("SELECT status, count(*) FROM members GROUP BY status").fetchall()
        if states != [("completed", FILES + 1)]:
            return []
        assert database.execute("SELECT count(*) FROM versions").fetchall() == [(FILES + 1,)]
        assert database.execute("SELECT sum(pieces) = (SELECT count(*) FROM chunks) FROM members").fetchone()[0]
        query = "SELECT k.text FROM chunks k JOIN members m ON m.version = k.version"
        return [text for (text,) in database.execute(query)]


async def killed(config: dict[str, Any], server: EmbeddingServer, texts: int) -> None:
    """Run a proxy until so many more texts have been embedded, or nothing is left to be, and kill it."""
    begun = len(server.texts)
    folder = Path(config["state_dir"])
    async with running_proxy(config) as proxy:
        await until(lambda: len(server.texts) >= begun + texts or pieces(folder))
        proxy.send(signal.SIGKILL)
        await proxy.ended()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.full)])
async def test_after_a_kill_no_piece_is_lost_and_none_is_there_twice(tmp_path: Path, kills: int) -> None:
    words = write(tmp_path / "docs")
    chosen = random.Random(kills)
    state = tmp_path / "state"
    async with embedding_server() as server:
        config = {
            "state_dir": str(state),
            "remotes": {"r": server.remote},
            "llama_cpp": {"hf_cache": False},
            "knowledge": {"embedding_model": "words", "watch": [{"path": str(tmp_path / "docs")}]},
        }
        for _ in range(kills):
            await killed(config, server, chosen.randrange(0, 120 // kills))
        async with running_proxy(config):
            await until(lambda: pieces(state))
    found = Counter(word for text in pieces(state) for word in words if word in text.split() or f"{word}." in text)
    assert found == dict.fromkeys(words, 1)
    kept = {file.name for file in (state / "knowledge").iterdir() if file.is_file()}
    assert len(kept) == FILES + 1 and not any(name.endswith(".new") for name in kept)
