"""Documents for the agent rag: a proxy over the fake llama-server, with collections that are filled over HTTP."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.fakes import embedder
from tests.support import raw_client
from tests.support.e2e_support import Fakes
from tests.support.harness import Proxy, until

MANUAL = {
    "ports.md": "# Ports\n\nThe zebra proxy listens on port 11555. The setting zebra_port sets another one.\n",
    "logs.md": "# Logs\n\nThe giraffe log is written to the folder giraffe_logs, and is rotated each night.\n",
    "linux.md": "# Linux\n\nInstall the walrus package with the command walrus-get on Linux.\n",
    "windows.md": "# Windows\n\nInstall the walrus package with the walrus wizard on Windows.\n",
}
"""Documents with words that no others have."""


def embedding_model(folder: Path) -> dict[str, Any]:
    """A model that counts words, and does not answer while the file `gate` is in `folder`."""
    program = [sys.executable, "-S", embedder.__file__, "--gate", str(folder / "gate")]
    return {"cmd": f"{shlex.join(program)} --port ${{PORT}}"}


def with_documents(fakes: Fakes, models: Mapping[str, Any], **config: Any) -> dict[str, Any]:
    """The configuration of a proxy with these models, an embedding model that counts words, and the agent `rag`. The
    embedding model does not answer while the file `gate` is in the folder of the fakes."""
    whole = fakes.config({"words": embedding_model(fakes.folder), **models}, size=6, keep_alive=-1)
    folder = str(fakes.folder / "state")
    return whole | {"state_dir": folder, "knowledge": {"embedding_model": "words"}, "agents": ["rag"], **config}


async def add_documents(
    proxy: Proxy, collection: str, documents: Mapping[str, str] = MANUAL, *, key: str = "none"
) -> None:
    """Add documents, by their names, to a new collection; returns once they have been read."""
    headers = [("Authorization", f"Bearer {key}")]
    made = await raw_client.post(proxy.port, "/v1/vector_stores", {"name": collection}, headers=headers)
    store = f"/v1/vector_stores/{made.json()['id']}"
    for name, text in documents.items():
        path = f"/knowledge/{collection}?source={quote(f'/documents/{name}')}"
        request = raw_client.request("PUT", path, text.encode(), headers=headers, close=True)
        answer = await raw_client.ask(proxy.port, request, method="PUT")
        assert answer.status == 200, answer.body

    async def read() -> bool:
        request = raw_client.request("GET", store, headers=headers, close=True)
        counts = (await raw_client.ask(proxy.port, request, method="GET")).json()["file_counts"]
        assert counts["failed"] == 0, counts
        return bool(counts["completed"] == len(documents))

    await until(read, what="the documents have been read")
