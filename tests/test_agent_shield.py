"""The agent `shield`: background prompts of chat UIs cost the user's model nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agents.shield import BEGINNINGS, Shield, is_background
from proxy.chat import ChatRequest
from tests import raw_client
from tests.agent_clients import WAYS, Way, proxy_with_agents
from tests.e2e_support import CHAT, SMOLLM2, Fakes, embedded, fakes, needs_llama_cpp
from tests.harness import Proxy, running_proxy

__all__ = ["fakes"]
TITLE = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n- ..."
)
BACKGROUND = [
    TITLE,
    "### Task:\n\nGenerate a concise, 3-5 word title summarizing the chat history.",
    "### Task:\nGenerate 1-3 broad tags categorizing the main themes",
    "### Task:\nSuggest 3-5 relevant follow-up questions",
    "### Task:\nAnalyze the chat history to determine the necessity of generating search queries",
    "### Task:\nYou are an autocompletion system. Continue the text",
    "Please generate a concise, 5-word-or-less title for the conversation",
]
THE_USERS = [
    "Hello",
    "### Task:\nRespond to the user query using the provided context",
    f"What does this prompt do? {TITLE}",
    "### Task:\nGenerate a function that adds numbers",
    "Generate a concise title for my essay",
]
WAY = Way(CHAT, stream=False)


def of(text: str, *before: dict[str, Any]) -> ChatRequest:
    return ChatRequest({"model": "m", "messages": [*before, {"role": "user", "content": text}]})


@pytest.mark.parametrize("text", BACKGROUND)
def test_background_prompts_are_known_by_their_beginning(text: str) -> None:
    assert is_background(of(text), Shield.Config(slot=0))
    assert not is_background(of(text), Shield.Config(slot=0, kinds=[]))
    answer = {"role": "assistant", "content": "Yes?"}
    assert not is_background(of(text, answer), Shield.Config(slot=0)), "in the middle of a chat it is the user's"


@pytest.mark.parametrize("text", THE_USERS)
def test_what_users_ask_is_no_background(text: str) -> None:
    assert not is_background(of(text), Shield.Config(slot=0))
    assert is_background(of(text), Shield.Config(slot=0, patterns=["Hello", "###", "What", "Generate"]))


@asynccontextmanager
async def shielded(fakes: Fakes, options: dict[str, Any], **pool: Any) -> AsyncIterator[Proxy]:
    models = {"m": fakes.model(fields={"parallel": 4}), "small": fakes.model()}
    config = fakes.config(models, keep_alive=-1, **pool)
    async with running_proxy(config | {"agents": [{"shield": options}]}) as proxy:
        yield proxy


def started(fakes: Fakes) -> int:
    return len(fakes.events("start"))


async def test_background_prompts_go_to_the_small_model_in_every_api(fakes: Fakes) -> None:
    async with shielded(fakes, {"model": "small"}, size=2) as proxy:
        for way in WAYS:
            for text, model in ((TITLE, "small"), ("Hello", "m")):
                said = await way.ask(proxy, way.body(text))
                assert (said.status, said.error) == (200, None), way
                bodies = [json.loads(event["body"]) for event in fakes.events("request") if event["body"]]
                assert [body["model"] for body in bodies if "model" in body][-1] == model, (way, text)
        assert started(fakes) == 2


async def test_the_users_model_is_not_evicted_for_them(fakes: Fakes) -> None:
    async with shielded(fakes, {"model": "small", "slot": 3}, size=1) as proxy:
        await WAY.ask(proxy, WAY.body("Hello"))
        await WAY.ask(proxy, WAY.body(TITLE))
        assert [body.get("id_slot") for body in fakes.generated()] == [None, 3]
        assert started(fakes) == 1, "there is one place, and it is the user's"


async def test_their_answers_may_be_short(fakes: Fakes) -> None:
    async with shielded(fakes, {"slot": 1, "max_tokens": 50}) as proxy:
        await WAY.ask(proxy, WAY.body(TITLE, max_completion_tokens=1000))
        await WAY.ask(proxy, WAY.body(TITLE, max_tokens=20))
        await WAY.ask(proxy, WAY.body("Hello", max_tokens=1000))
        limits = [{key: body[key] for key in body if "max" in key} for body in fakes.generated()]
        assert limits == [{"max_tokens": 50}, {"max_tokens": 20}, {"max_tokens": 1000}]


async def test_without_a_model_or_a_slot_it_is_of_no_use(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {}, ["shield"]) as proxy:
        listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert listed["shield"]["error"] == "ValueError: shield needs a model or a slot"


def test_every_kind_has_a_beginning() -> None:
    assert all(BEGINNINGS.values()) and Shield.Config(slot=0).kinds == list(BEGINNINGS)


@needs_llama_cpp
async def test_real_llama_cpp_keeps_the_chat_in_its_cache() -> None:
    args = ["-t", "1", "--no-kv-unified", "--cache-ram", "0"]
    config = embedded({"m": {**SMOLLM2, "args": args, "parallel": 2}})
    history: list[dict[str, str]] = [{"role": "user", "content": "Tell me about rivers. " * 40}]

    async def turn(proxy: Proxy, messages: list[dict[str, str]], tokens: int = 4) -> dict[str, Any]:
        body = {"model": "m", "messages": messages, "max_tokens": tokens, "temperature": 0}
        answer: dict[str, Any] = (await raw_client.post(proxy.port, CHAT, body)).json()
        return answer

    async with running_proxy(config | {"agents": [{"shield": {"slot": 0}}]}) as proxy:
        first = await turn(proxy, history)
        for text in BACKGROUND[:3]:
            await turn(proxy, [{"role": "user", "content": text}])
        history += [first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        second = await turn(proxy, history)
    assert second["timings"]["cache_n"] >= first["timings"]["prompt_n"], "nothing of the chat was computed anew"
