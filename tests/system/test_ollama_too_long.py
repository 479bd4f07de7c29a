"""Chats and prompts that do not fit, over llama.cpp by Ollama's API, and others that an Ollama refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e_support import PIXEL, SMOLLM2, WEATHER, embedded, needs_llama_cpp, tiny
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, session_proxy
from tests.support.ollama_calls import ask, refused
from tests.support.stages import Stage

__all__ = ["tiny_models"]  # a fixture

pytestmark = needs_llama_cpp
SIZE = 512
CALL = {"function": {"name": "look", "arguments": {}}}


@pytest.fixture(scope="module")
def small(tiny_models: dict[str, Path]) -> Iterator[Proxy]:
    """Models with 512 tokens of context, of which each is a byte, but for those of SmolLM2."""
    models: dict[str, Any] = {
        "small": tiny(tiny_models["tiny-a"], ctx=SIZE),
        "shifting": tiny(tiny_models["tiny-c"], "--context-shift", ctx=SIZE),
        "embed": tiny(tiny_models["tiny-b"], "--embeddings"),
        "smollm2": SMOLLM2,
        "watched": {"model": "small", "agents": ["think"]},
    }
    with session_proxy(embedded(models, size=4, keep_alive=-1)) as proxy:
        yield proxy


def said(role: str, length: int, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": "x" * length, **more}


async def chat(proxy: Proxy, messages: list[dict[str, Any]], model: str = "small", **fields: Any) -> dict[str, Any]:
    options = {"num_predict": 4, "temperature": 0}
    body = {"model": model, "messages": messages, "stream": False, "options": options, **fields}
    answer = await ask(proxy, "/api/chat", body)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


SYSTEM = said("system", 90)
TURN = [said("user", 70), said("assistant", 70)]
TOOLS = [said("user", 70), said("assistant", 0, tool_calls=[CALL, CALL]), said("tool", 60), said("tool", 60)]
LAST = said("user", 90)
CHATS = {
    "the oldest turns go": ([*TURN, *TURN, *TURN, LAST], [*TURN, *TURN, LAST]),
    "no more than must": ([*TURN, *TURN, *TURN, said("user", 250)], [*TURN, said("user", 250)]),
    "the system's message stays": ([SYSTEM, *TURN, *TURN, LAST], [SYSTEM, *TURN, LAST]),
    "wherever it is": ([*TURN, SYSTEM, *TURN, LAST], [SYSTEM, *TURN, LAST]),
    "results go with their call": ([*TOOLS, said("assistant", 90), LAST, *TURN[:1]], [LAST, *TURN[:1]]),
    "within the last turn, too": (
        [said("user", 90), *TOOLS[1:], *TOOLS[1:], *TOOLS[1:]],
        [said("user", 90), *TOOLS[1:], *TOOLS[1:]],
    ),
}


@pytest.mark.parametrize("model", ["small", "watched"])
@pytest.mark.parametrize("name", CHATS)
async def test_a_chat_that_no_longer_fits_loses_its_oldest_turns(small: Proxy, name: str, model: str) -> None:
    whole, kept = CHATS[name]
    expected = (await chat(small, kept))["prompt_eval_count"]
    assert expected < SIZE
    answer = await chat(small, whole, model)
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (expected, 4)
    streamed = await ask(small, "/api/chat", {"model": model, "messages": whole, "options": {"num_predict": 4}})
    assert streamed.status == 200 and b'"done":true' in streamed.body


async def test_a_chat_that_is_cut_leaves_room_for_an_answer(small: Proxy) -> None:
    answer = await chat(small, [*TURN, *TURN, *TURN, said("user", 240)], options={"temperature": 0})
    assert answer["prompt_eval_count"] <= SIZE - SIZE // 8


async def test_a_chat_that_may_not_be_cut_is_refused(small: Proxy) -> None:
    long = {"messages": [said("user", SIZE)]}
    for fields in ({"messages": [*TURN, *TURN, *TURN, LAST], "truncate": False}, long | {"shift": False}):
        for stream in (False, True):
            body = {"model": "small", "stream": stream, **fields}
            assert "context" in refused(await ask(small, "/api/chat", body), "/api/chat")
    body = {"model": "small", "messages": [*TURN, *TURN, *TURN, LAST]}
    assert (await ask(small, "/v1/chat/completions", body)).status == 400, "that is a rule of Ollama's API"


@pytest.mark.parametrize(
    "messages",
    [[said("user", 700)], [SYSTEM, *TURN, said("user", 600)], [said("user", 20), *TOOLS[1:3], said("tool", 2000)]],
)
async def test_a_text_that_is_too_long_alone_loses_its_beginning(small: Proxy, messages: list[dict[str, Any]]) -> None:
    """Ollama leaves about half of the context to the answer."""
    answer = await chat(small, messages)
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (SIZE - (SIZE - 4) // 2, 4)


async def test_a_chat_that_fits_is_sent_once_and_not_counted(stage: Stage) -> None:
    await ask(stage.proxy, "/api/chat", {"model": "local", "messages": [LAST], "stream": False})
    before = len(stage.local.events("request"))
    body = {"model": "local", "messages": [*TURN, *TURN, *TURN, LAST], "options": {"num_ctx": 64}, "stream": False}
    assert (await ask(stage.proxy, "/api/chat", body)).status == 200
    assert [event["path"] for event in stage.local.events("request")[before:]] == ["/v1/chat/completions"]


@pytest.mark.parametrize("raw", [False, True])
async def test_a_prompt_that_does_not_fit_loses_its_beginning_but_for_a_few_tokens(small: Proxy, raw: bool) -> None:
    body = {"model": "small", "prompt": "x" * 2000 + "y", "raw": raw, "stream": False, "options": {"num_predict": 4}}
    answer = (await ask(small, "/api/generate", body)).json()
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (SIZE - (SIZE - 4) // 2, 4)
    assert "context" in refused(await ask(small, "/api/generate", {**body, "truncate": False}), "/api/generate")


async def test_a_conversation_by_tokens_goes_on_past_the_context(small: Proxy) -> None:
    body: dict[str, Any] = {"model": "small", "prompt": "x" * 150, "stream": False, "options": {"num_predict": 4}}
    for _ in range(5):
        answer = await ask(small, "/api/generate", body)
        assert answer.status == 200, answer.body
        body["context"] = answer.json()["context"]
    assert len(body["context"]) > SIZE
    loading = await ask(small, "/api/generate", {"model": "small", "prompt": "", "context": body["context"]})
    assert (loading.status, loading.json()["done_reason"]) == (200, "load")


async def test_a_server_that_shifts_its_context_goes_on_past_it(small: Proxy) -> None:
    options = {"num_predict": 700, "temperature": 0, "seed": 1}
    body = {"model": "shifting", "prompt": "x" * 400, "raw": True, "stream": False, "options": options}
    answer = (await ask(small, "/api/generate", body)).json()
    assert answer["prompt_eval_count"] + answer["eval_count"] > SIZE


# -- what an Ollama refuses, and what it does not ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/api/chat", {"tools": [WEATHER]}, "registry.ollama.ai/library/smollm2:latest does not support tools"),
        ("/api/generate", {"suffix": "x"}, "registry.ollama.ai/library/smollm2:latest does not support insert"),
        ("/api/chat", {"think": True}, '"smollm2" does not support thinking'),
        (
            "/api/chat",
            {"messages": [said("user", 5, images=[PIXEL])]},
            "registry.ollama.ai/library/smollm2:latest does not support vision",
        ),
        ("/api/generate", {"images": [PIXEL]}, "registry.ollama.ai/library/smollm2:latest does not support vision"),
        ("/api/chat", {"model": "embed"}, '"embed" does not support chat'),
        ("/api/generate", {"model": "embed"}, '"embed" does not support generate'),
        ("/api/generate", {"model": "embed", "raw": True}, '"embed" does not support generate'),
    ],
)
async def test_what_a_model_cannot_do_is_refused_in_ollamas_words(
    small: Proxy, path: str, fields: dict[str, Any], words: str
) -> None:
    body = {"model": "smollm2", "messages": [said("user", 5)], "prompt": "hi", **fields}
    for stream in (False, True):
        assert refused(await ask(small, path, {**body, "stream": stream}), path) == words


@pytest.mark.parametrize("format", [{"type": "nonsense"}, {"properties": {"a": {"type": "nonsense"}}}])
async def test_a_schema_that_llama_server_cannot_read_asks_for_json(small: Proxy, format: dict[str, Any]) -> None:
    for path in ("/api/chat", "/api/generate"):
        body = {
            "model": "smollm2",
            "messages": [said("user", 5)],
            "prompt": "hi",
            "options": {"num_predict": 16, "temperature": 0},
        }
        answer = await ask(small, path, {**body, "format": format, "stream": False})
        assert answer.status == 200, answer.body
        said_by = answer.json().get("message", answer.json())
        assert (said_by.get("content") or said_by.get("response")).lstrip()[:1] in ("{", "[", '"')


async def test_what_is_refused_twice_is_changed_twice(small: Proxy) -> None:
    turns = [message for _ in range(12) for message in TURN]
    answer = await chat(small, [*turns, LAST], format={"type": "nonsense"})
    assert 0 < answer["prompt_eval_count"] < SIZE


async def test_a_message_without_a_role_is_the_users(small: Proxy) -> None:
    bare = await chat(small, [{"content": "hello"}])
    assert bare["prompt_eval_count"] == (await chat(small, [{"role": "user", "content": "hello"}]))["prompt_eval_count"]
