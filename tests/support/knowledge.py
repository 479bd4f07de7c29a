"""Proxies with a knowledge base, whose embedding model is a double that counts words (`tests/fakes/embedder.py`)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes import embedder
from tests.support.harness import Proxy, ports, session_proxy
from tests.support.raw_client import Answer, ask, request

if TYPE_CHECKING:
    import openai

ADMIN, ANN, BOB = "key-of-the-admin-1234567890", "key-of-ann-12345678901234567", "key-of-bob-12345678901234567"
KEYS: list[dict[str, Any]] = [
    {"name": "root", "key": ADMIN, "scopes": ["admin"]},
    {"name": "ann", "key": ANN},
    {"name": "bob", "key": BOB, "collections": ["open-*"]},
]
PUMPS = """# Pump

## Reset

Hold the red button for seven seconds to reset the pump.

## Weight

The pump weighs twelve kilograms.
"""
CATS = "# Cats\n\nA cat sleeps sixteen hours a day and hunts at dawn.\n"


def knowing(folder: Path, **fields: Any) -> dict[str, Any]:
    """A configuration with an embedding model, whose state is in `folder`. The model does not answer while the file
    `gate` is in that folder."""
    program = [sys.executable, "-S", embedder.__file__, "--gate", str(folder / "gate")]
    return {
        "models": {"words": {"cmd": f"{shlex.join(program)} --port ${{PORT}}"}},
        "server_pool": {"size": 1, **ports()},
        "state_dir": str(folder / "state"),
        "knowledge": {"embedding_model": "words", "max_file_mib": 1, "allow_private": ["127.0.0.1"]},
        **fields,
    }


@pytest.fixture(scope="session")
def known_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `known` has its state."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture(scope="session")
def known(known_folder: Path) -> Iterator[Proxy]:
    """A proxy with a knowledge base and the keys `KEYS`."""
    with session_proxy(knowing(known_folder, server={"api_keys": KEYS})) as proxy:
        yield proxy


def client_of(proxy: Proxy, key: str = ADMIN) -> openai.OpenAI:
    """OpenAI's client with this key."""
    import openai  # takes long, and few tests use it

    http = openai.DefaultHttpxClient(verify=False)  # certificates take longer to read than most tests
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=http)


async def asked(
    proxy: Proxy, method: str, path: str, body: bytes | dict[str, Any] | None = None, *, key: str = ADMIN
) -> Answer:
    """The answer to a request, by default of the administrator."""
    headers = [("Authorization", f"Bearer {key}")]
    return await ask(proxy.port, request(method, path, body, headers=headers, close=True), method=method)


def files_below(folder: Path, chosen: Callable[[Path], bool] = lambda file: True) -> list[Path]:
    """All files in and below it."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and chosen(file))
