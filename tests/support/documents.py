"""Documents to be searched: a proxy with models that embed by words, and folders that it watches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.e2e_support import Fakes
from tests.support.harness import Proxy, session_proxy

MANUAL = {
    "server.md": (
        "# Server\n\n## Ports\n\nThe zebra proxy listens on port 11555. The setting zebra_port sets another one.\n\n"
        "## Logs\n\nThe giraffe log is written to the folder giraffe_logs, and is rotated each night.\n"
    ),
    "install.md": (
        "# Install\n\n## Linux\n\nInstall the walrus package with the command walrus-get on Linux.\n\n"
        "## Windows\n\nInstall the walrus package with the walrus wizard on Windows.\n"
    ),
}
"""Documents with words that no others have."""


def write_documents(folder: Path, documents: Mapping[str, str] = MANUAL) -> Path:
    """Write documents, by their names, into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, text in documents.items():
        (folder / name).write_text(text)
    return folder


def knowing(fakes: Fakes, collections: Mapping[str, Mapping[str, str]], **config: Any) -> dict[str, Any]:
    """The configuration of a proxy with these collections of documents, the model `m`, which answers as a request
    says, and `embed`."""
    watch = [
        {"path": str(write_documents(fakes.folder / f"documents-{name}", documents)), "collection": name}
        for name, documents in collections.items()
    ]
    models = {
        "m": fakes.model(fields={"parallel": 4}),
        "embed": fakes.model(EMBED=1, fields={"parallel": 4}),
        **config.pop("models", {}),
    }
    whole = fakes.config(models, size=4, keep_alive=-1)
    return whole | {"knowledge": {"embedding_model": "embed", "watch": watch}, "agents": ["rag"], **config}


@contextmanager
def knowing_proxy(fakes: Fakes, **config: Any) -> Iterator[Proxy]:
    """A proxy with the collection `manual`, for many tests."""
    with session_proxy(knowing(fakes, {"manual": MANUAL}, **config)) as proxy:
        yield proxy
