"""The agent `rag` over real llama.cpp: what of a prompt its server finds in its cache, and what fits into a context."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.documents import add_documents, embedding_model
from tests.support.e2e_support import CHAT, embedded, needs_llama_cpp, tiny
from tests.support.harness import Proxy, session_proxy

PORT, LOG = "Which port does the zebra proxy listen on?", "Where is the giraffe log written to?"
CONTEXT = 2048
"""Tokens of the model's context; its tokens are characters."""
PADDING = [
    {"role": "user", "content": "Tell me something about this and that, as long as it takes. " * 4},
    {"role": "assistant", "content": "This is this, and that is that, as far as is known. " * 4},
]


@pytest.fixture(scope="module")
def real(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("real")
    models = {"tiny": tiny(tiny_models["tiny-a"]), "words": embedding_model(folder)}
    models["ranker"] = tiny(tiny_models["tiny-b"], "--reranking")
    config = embedded(models, size=3, keep_alive=-1) | {"knowledge": {"embedding_model": "words"}}
    config |= {"state_dir": str(folder / "state"), "agents": [{"rag": {"max_documents": 2, "grader_model": "ranker"}}]}
    with session_proxy(config) as proxy:
        yield proxy


async def asked(proxy: Proxy, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    answer = await raw_client.post(proxy.port, CHAT, body)
    assert answer.status == 200, answer.body
    return dict(answer.json())


async def tokens(proxy: Proxy, messages: list[dict[str, Any]]) -> int:
    body = {"model": "tiny", "messages": messages}
    counted = (await raw_client.post(proxy.port, f"{CHAT}/input_tokens", body)).json()["input_tokens"]
    return int(counted)


@needs_llama_cpp
async def test_a_second_question_finds_the_chat_before_the_first_one_in_the_cache(real: Proxy) -> None:
    await add_documents(real, "manual")
    chat = [*PADDING, {"role": "user", "content": f"/rag {PORT}"}]
    first = await asked(real, chat)
    said = first["choices"][0]["message"]["content"]
    chat += [{"role": "assistant", "content": said}, {"role": "user", "content": f"/rag {LOG}"}]
    second = await asked(real, chat)
    assert first["x_sources"] and second["x_sources"] and first["x_sources"] != second["x_sources"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= await tokens(real, PADDING) - 8, "all messages before those of the last question"
    again = await asked(real, chat)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= again["usage"]["prompt_tokens"] - 8


@needs_llama_cpp
async def test_what_does_not_fit_is_left_out_as_a_whole_and_the_chat_never_is(real: Proxy) -> None:
    both = await asked(real, [{"role": "user", "content": "/rag zebra walrus"}], max_tokens=600)
    assert len(both["x_sources"]) == 2, "the answer has as much room as it asks for"
    filler = "x" * (CONTEXT - 64 - both["usage"]["prompt_tokens"])  # with its place in the chat too much for both
    chat = [{"role": "system", "content": filler}, {"role": "user", "content": "/rag zebra walrus"}]
    one = await asked(real, chat, max_tokens=64)
    assert len(one["x_sources"]) == 1 and any("does not fit" in reason for reason in one["x_rag"]["reasons"])
    none = await asked(real, [{"role": "user", "content": f"/rag zebra {'walrus ' * 240}"}], max_tokens=64)
    assert none["x_sources"] == [] and none["usage"]["prompt_tokens"] > 1600, "the question is whole"


@needs_llama_cpp
async def test_a_reranking_model_grades_if_it_is_configured(real: Proxy) -> None:
    answer = await asked(real, [{"role": "user", "content": "/rag grader=rerank zebra walrus"}])
    grades = [source["relevance"] for source in answer["x_sources"]]
    assert not any("failed" in reason for reason in answer["x_rag"]["reasons"])
    scored = await asked(real, [{"role": "user", "content": "/rag zebra walrus"}])
    assert grades != [source["relevance"] for source in scored["x_sources"]]
