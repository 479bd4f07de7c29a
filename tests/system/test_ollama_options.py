"""Options and context sizes of the Ollama API, in any case and of the right shape."""

from __future__ import annotations

import pytest

from tests.support.e2e_support import MESSAGES
from tests.support.ollama_calls import ASKING, Eager, ask, body_of, both_backends, eager, refused
from tests.support.stages import Stage

__all__ = ["eager"]  # a fixture


@pytest.mark.parametrize("path", ["/v1/embeddings", *ASKING])
async def test_a_pinned_context_size_is_what_is_asked_for(eager: Eager, path: str) -> None:
    for options in ({}, {"options": {"num_ctx": 512, "seed": 1}}):
        assert (await ask(eager.proxy, path, body_of("pinned", **options))).status == 200
        sent = eager.sent("/api/embed" if path == "/v1/embeddings" else path)["options"]
        assert sent == {**options.get("options", {}), "num_ctx": 2048}


async def test_embeddings_of_different_sizes_load_a_model_anew_only_once(eager: Eager) -> None:
    for size in (2048, 4096) * 5:
        assert (await ask(eager.proxy, "/v1/embeddings", body_of("free", options={"num_ctx": size}))).status == 200
    assert len([event for event in eager.fake.events("reload") if event["model"] == "free:latest"]) <= 1


@pytest.mark.parametrize("path", ASKING)
async def test_options_are_options_in_any_case(eager: Eager, path: str) -> None:
    assert (await ask(eager.proxy, path, body_of("pinned", Options={"num_ctx": 7, "seed": 1}))).status == 200
    sent = {name: value for name, value in eager.sent(path).items() if name.lower() == "options"}
    assert sent == {"options": {"num_ctx": 2048, "seed": 1}}
    refused(await ask(eager.proxy, path, body_of("pinned", Options={"seed": 1}, options={"seed": 2})), path)


@both_backends
@pytest.mark.parametrize("path", ASKING)
async def test_options_that_are_no_object_are_refused(stage: Stage, path: str, model: str) -> None:
    for options in ("x", 5, True, [{"num_ctx": 7}]):
        refused(await ask(stage.proxy, path, body_of(model, options=options)), path)


@both_backends
async def test_a_chat_in_another_case_is_a_chat(stage: Stage, model: str) -> None:
    chat = await ask(stage.proxy, "/api/chat", {"model": model, "Messages": MESSAGES, "stream": False})
    assert (chat.status, chat.json()["done_reason"]) == (200, "stop")
    assert chat.json()["message"]["content"].startswith("t0 ")
    text = await ask(stage.proxy, "/api/generate", {"model": model, "Prompt": "hi", "stream": False})
    assert (text.status, text.json()["done_reason"]) == (200, "stop")


@pytest.mark.parametrize(
    "path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages", "/v1/embeddings"]
)
async def test_one_clients_small_context_size_is_not_sent_for_another_that_asks_for_none(
    eager: Eager, path: str
) -> None:
    small = body_of("lone", options={"num_ctx": 64})
    await eager.fake.set(models=["pinned", "free", "lone"])
    assert (await ask(eager.proxy, "/api/chat", small)).status == 200
    assert (await ask(eager.proxy, path, body_of("lone"))).status == 200
    asked = {"/v1/embeddings": "/api/embed", "/api/generate": "/api/generate"}.get(path, "/api/chat")
    sent = eager.sent(asked)
    assert sent["model"].startswith("lone") and "num_ctx" not in sent.get("options", {})
