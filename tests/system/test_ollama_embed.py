"""Embeddings by Ollama's API: texts that are too long, and what an answer says about itself."""

from __future__ import annotations

from typing import Any

from tests.support.e2e_support import needs_llama_cpp
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy
from tests.support.ollama_calls import Eager, ask, both_backends, eager, refused
from tests.support.stages import Stage, chain, served

__all__ = ["chain", "eager", "served", "tiny_models"]  # fixtures

TOO_LONG = "the input length exceeds the context length"
NOTHING_LEFT = "input after truncation exceeds maximum context length"
WORDS = [f"word{number}" for number in range(60)]


async def embed(proxy: Proxy, given: Any, num_ctx: int | None = None, **fields: Any) -> dict[str, Any]:
    options = {} if num_ctx is None else {"options": {"num_ctx": num_ctx}}
    answer = await ask(proxy, "/api/embed", {"model": "embed", "input": given, **options, **fields})
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def close(one: list[float], other: list[float]) -> bool:
    return sum(left * right for left, right in zip(one, other, strict=True)) > 0.999


@both_backends
async def test_an_embedding_says_how_long_the_model_took_to_load(stage: Stage, model: str) -> None:
    for given in ("text", ["a", "b"], ""):
        answer = (await ask(stage.proxy, "/api/embed", {"model": model, "input": given})).json()
        assert isinstance(answer["load_duration"], int)
        assert 0 < answer["load_duration"] <= answer["total_duration"] or model == "distant"


@needs_llama_cpp
async def test_a_text_is_cut_at_the_clients_context_size_and_not_beyond(served: Proxy) -> None:
    """The other texts are left as they are."""
    text = " ".join(WORDS)
    beginnings = [" ".join(WORDS[:count]) for count in range(1, 16)]
    counts = [(await embed(served, beginning))["prompt_eval_count"] for beginning in beginnings]
    limit = counts[9]
    answer = await embed(served, [text, beginnings[2]], limit)
    assert answer["prompt_eval_count"] == limit + counts[2]
    assert close(answer["embeddings"][0], (await embed(served, beginnings[9]))["embeddings"][0])
    assert close(answer["embeddings"][1], (await embed(served, beginnings[2]))["embeddings"][0])
    whole = await embed(served, text)
    assert whole["prompt_eval_count"] > limit
    assert not close(answer["embeddings"][0], whole["embeddings"][0])


@needs_llama_cpp
async def test_a_text_beyond_the_models_context_is_cut_there(served: Proxy) -> None:
    text = " ".join(WORDS * 60)
    answer = await embed(served, text)
    assert 500 < answer["prompt_eval_count"] <= 2048
    said = refused(await ask(served, "/api/embed", {"model": "embed", "input": text, "truncate": False}), "/api/embed")
    assert said == TOO_LONG


@needs_llama_cpp
async def test_a_text_that_may_not_or_cannot_be_cut_is_refused_in_ollamas_words(served: Proxy) -> None:
    for truncate, num_ctx, words in ((False, 5, TOO_LONG), (True, 1, NOTHING_LEFT)):
        body: dict[str, Any] = {"model": "embed", "input": ["short", " ".join(WORDS)], "truncate": truncate}
        body |= {"options": {"num_ctx": num_ctx}}
        assert refused(await ask(served, "/api/embed", body), "/api/embed") == words
    body = {"model": "embed", "input": "a", "truncate": False, "options": {"num_ctx": 64}}
    assert (await ask(served, "/api/embed", body)).status == 200


@needs_llama_cpp
async def test_embeddings_of_one_prompt_are_cut_the_same_way(served: Proxy) -> None:
    body = {"model": "embed", "prompt": " ".join(WORDS * 60)}
    assert len((await ask(served, "/api/embeddings", body)).json()["embedding"]) > 0


async def test_a_clients_smaller_context_size_cuts_and_does_not_load_anew(eager: Eager) -> None:
    before = len(eager.fake.events("load") + eager.fake.events("reload"))
    for size in (8192, 30, 8192, 30):
        body: dict[str, Any] = {"model": "free", "input": ["short", "long " * 100, "of three words"]}
        body["options"] = {"num_ctx": size}
        answer = (await ask(eager.proxy, "/api/embed", body)).json()
        assert answer["prompt_eval_count"] == 3 + min(102, size) + 5
        assert len(answer["embeddings"]) == 3
    assert len(eager.fake.events("load") + eager.fake.events("reload")) == before + 1
    body |= {"truncate": False}
    assert refused(await ask(eager.proxy, "/api/embed", body), "/api/embed") == TOO_LONG
    assert eager.sent("/api/embed")["options"] == {"num_ctx": 8192}
