"""How long models stay loaded: `keep_alive` of the Ollama API, with and without anything to generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES, Fakes, fakes, state
from tests.support.harness import Proxy, running_proxy, session_proxy, until
from tests.support.ollama_calls import ask, refused

__all__ = ["fakes"]  # a fixture
HOUR_S = 3600


async def left_s(proxy: Proxy, model: str) -> float:
    """Seconds that a loaded model still has."""
    items = (await raw_client.get(proxy.port, "/api/ps")).json()["models"]
    (ends,) = (datetime.fromisoformat(item["expires_at"]) for item in items if item["name"] == model)
    return (ends - datetime.now(ends.tzinfo)).total_seconds()


@dataclass(frozen=True)
class Warm:
    """`proxy` has the models `a` to `d` on the fake llama-server; an idle one stays for 5 minutes."""

    proxy: Proxy
    fakes: Fakes


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    fakes = Fakes(tmp_path_factory.mktemp("warm"))
    with session_proxy(fakes.config({name: fakes.model() for name in "abcd"}, keep_alive=300, size=4)) as proxy:
        yield Warm(proxy, fakes)


async def test_a_load_request_says_how_long_the_model_stays(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"a": fakes.model()}, keep_alive=0)) as proxy:
        for _ in range(2):
            answer = await ask(proxy, "/api/generate", {"model": "a", "keep_alive": "10m"})
            assert (answer.status, answer.json()["done_reason"]) == (200, "load")
            assert 500 < await left_s(proxy, "a") <= 600
        assert len(fakes.events("start")) == 1


async def test_generating_from_a_context_with_keep_alive_0_loads_once_and_unloads_then(warm: Warm) -> None:
    body = {"model": "a", "prompt": "hi", "context": [1, 2], "keep_alive": 0, "stream": False}
    before = len(warm.fakes.events("start"))
    answer = await ask(warm.proxy, "/api/generate", body)
    assert (answer.status, answer.json()["done"]) == (200, True)

    async def unloaded() -> bool:
        return await state(warm.proxy, "a") == "unloaded"

    await until(unloaded, what="the end of the model")
    assert len(warm.fakes.events("start")) == before + 1


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": [{"role": "user", "content": 5}]}),
    ("/api/chat", {"messages": MESSAGES, "format": "xml"}),
    ("/api/chat", {"messages": MESSAGES, "options": {"top_k": "many"}}),
    ("/api/chat", {"messages": MESSAGES, "think": 5}),
    ("/api/generate", {"prompt": 5}),
    ("/api/generate", {"prompt": "hi", "options": "x"}),
    ("/api/embed", {"input": 5}),
    ("/api/embed", {"input": [5]}),
    ("/api/embeddings", {"prompt": 5}),
]


@pytest.mark.parametrize(("path", "fields"), REFUSED)
async def test_a_refused_request_does_not_change_how_long_the_model_stays(
    warm: Warm, path: str, fields: dict[str, Any]
) -> None:
    assert (await ask(warm.proxy, "/api/generate", {"model": "b", "keep_alive": "5m"})).status == 200
    refused(await ask(warm.proxy, path, {"model": "b", "keep_alive": "2h", "stream": False, **fields}), path)
    assert await left_s(warm.proxy, "b") < HOUR_S


@pytest.mark.parametrize(("path", "field"), [("/api/embed", "input"), ("/api/embeddings", "prompt")])
async def test_embeddings_obey_keep_alive(warm: Warm, path: str, field: str) -> None:
    assert (await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "5m"})).status == 200
    assert await left_s(warm.proxy, "c") < HOUR_S
    assert (await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "5h"})).status == 200
    assert await left_s(warm.proxy, "c") > 4 * HOUR_S
    assert "missing unit" in refused(await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "60"}), path)


@pytest.mark.parametrize("body", [{"input": ""}, {"input": []}, {}])
async def test_embeddings_of_nothing_load_the_model(warm: Warm, body: dict[str, Any]) -> None:
    assert (await ask(warm.proxy, "/api/generate", {"model": "d", "keep_alive": 0})).status == 200
    assert await state(warm.proxy, "d") == "unloaded"
    answer = await ask(warm.proxy, "/api/embed", {"model": "d", **body})
    assert (answer.status, answer.json()["embeddings"]) == (200, [])
    assert await state(warm.proxy, "d") == "loaded"
