"""Models made for embeddings and reranking, on real llama.cpp, as they come: without a flag in the configuration."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import pytest

from tests.support.e2e_support import embedded
from tests.support.gguf_fixture import WIDTH, write_tiny_gguf
from tests.support.harness import Proxy, session_proxy
from tests.support.raw_client import post

KINDS = ("mean", "last", "rank")
LONG = "x" * 1500
"""So many tokens: three times llama-server's own batch."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with a model of each kind of pooling."""
    folder = tmp_path_factory.mktemp("pooled")
    files = {
        kind: write_tiny_gguf(folder / f"{kind}.gguf", name=kind, pooling=gguf.PoolingType[kind.upper()])
        for kind in KINDS
    }
    models = {kind: {"path": str(file), "args": ["-t", "1"], "ctx": 2048} for kind, file in files.items()}
    with session_proxy(embedded(models, size=3)) as proxy:
        yield proxy


@pytest.mark.parametrize("model", ["mean", "last"])
async def test_an_embedding_model_embeds_long_inputs_without_a_flag(proxy: Proxy, model: str) -> None:
    answer = await post(proxy.port, "/v1/embeddings", {"model": model, "input": [LONG, "short"]})
    assert answer.status == 200, answer.body
    body = answer.json()
    assert [len(item["embedding"]) for item in body["data"]] == [WIDTH, WIDTH]
    assert body["usage"]["prompt_tokens"] >= len(LONG)
    ollama = await post(proxy.port, "/api/embed", {"model": model, "input": LONG, "truncate": False})
    assert (ollama.status, len(ollama.json()["embeddings"])) == (200, 1)
    assert ollama.json()["prompt_eval_count"] >= len(LONG)


async def test_a_rerank_model_reranks_long_documents_without_a_flag(proxy: Proxy) -> None:
    body = {"model": "rank", "query": "q", "documents": [LONG, "short"]}
    answer = await post(proxy.port, "/v1/rerank", body)
    assert answer.status == 200, answer.body
    assert sorted(item["index"] for item in answer.json()["results"]) == [0, 1]
