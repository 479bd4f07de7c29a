"""The agent `shield`: background prompts of chat UIs cost the user's model nothing."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from llama_smart_proxy.agents.shield import Shield, is_background
from llama_smart_proxy.proxy.chat import BACKGROUND_PROMPTS, BackgroundKind, ChatRequest
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, SMOLLM2, Fakes, embedded, fakes, instance, needs_llama_cpp
from tests.support.harness import Proxy, running_proxy, session_proxy

__all__ = ["fakes"]
TITLE = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Guidelines:\n- ..."
)
BACKGROUND: list[tuple[BackgroundKind, str]] = [
    ("title", TITLE),
    ("title", "### Task:\n\nGenerate a concise, 3-5 word title summarizing the chat history."),
    ("title", "\n### Task:\nGenerate a concise title summarizing the chat history."),
    ("title", "Provide a concise, 5-word-or-less title for the conversation, using title case conventions."),
    ("title", "Please generate a concise title (max 40 characters) for a conversation that starts with:\nUser: Hi"),
    ("title", "Analyze this conversation and provide:\n1. The detected language of the conversation\n2. ..."),
    ("title", "Based on the chat history, give this conversation a name.\nKeep it short"),
    ("tags", "### Task:\nGenerate 1-3 broad tags categorizing the main themes"),
    ("follow_ups", "### Task:\nPredict 3-5 useful messages this user might naturally send next to advance"),
    ("follow_ups", "### Task:\nSuggest 3-5 relevant follow-up questions"),
    ("queries", "### Task:\nAnalyze the chat history to determine the necessity of generating search queries"),
    ("image_prompt", "### Task:\nGenerate a detailed prompt for am image generation task"),
    ("autocomplete", "### Task:\nYou are an autocompletion system. Continue the text"),
    ("emoji", "Your task is to reflect the speaker's likely facial expression through a fitting emoji."),
    ("adapted", "### Task:\nGib dem Chat einen Titel.\n### Chat:\n<chat_history>\nUSER: Hallo\n</chat_history>"),
]
SYSTEM = [
    "You are a professional conversation summarizer. Generate a concise title that captures ...",
    "You are an assistant skilled in conversation. You need to summarize the user's conversation into a title within",
    "You are an AI conversation titles assistant who specializes in ...",
    "You are a chat thread titling assistant.\nGoal: ...",
]
"""Where the chat stands in the user's message, and what is asked in the system prompt."""
THE_USERS = [
    "Hello",
    "### Task:\nRespond to the user query using the provided context, incorporating inline citations",
    f"What does this prompt do? {TITLE}",
    f"> {TITLE}",
    "### Task:\nGenerate a concise title for my essay",
    "### Task:\nGenerate a function that adds numbers",
    "Generate a concise title for my essay",
    "Analyze this conversation and provide: a summary",
]
WAY = Way(CHAT, stream=False)


def of(text: str, *before: dict[str, Any]) -> ChatRequest:
    return ChatRequest({"model": "m", "messages": [*before, {"role": "user", "content": text}]})


@pytest.mark.parametrize(("kind", "text"), BACKGROUND)
def test_background_prompts_are_known_by_their_beginning(kind: BackgroundKind, text: str) -> None:
    assert is_background(of(text), Shield.Config())
    assert is_background(of(text), Shield.Config(kinds=[kind]))
    assert not is_background(of(text), Shield.Config(kinds=[other for other in BACKGROUND_PROMPTS if other != kind]))
    assert is_background(of(text, {"role": "system", "content": "Be brief."}), Shield.Config())
    answer = {"role": "assistant", "content": "Yes?"}
    assert not is_background(of(text, answer), Shield.Config()), "in the middle of a chat it is the user's"


def test_every_kind_has_an_example() -> None:
    assert {kind for kind, _ in BACKGROUND} == set(BACKGROUND_PROMPTS)


@pytest.mark.parametrize("prompt", SYSTEM)
def test_background_prompts_are_known_by_their_system_prompt(prompt: str) -> None:
    assert is_background(of("user: Hi", {"role": "system", "content": prompt}), Shield.Config())
    assert not is_background(of("Hi", {"role": "system", "content": f"Never say: {prompt}"}), Shield.Config())


@pytest.mark.parametrize("text", THE_USERS)
def test_what_users_ask_is_no_background(text: str) -> None:
    assert not is_background(of(text), Shield.Config())
    assert is_background(of(text), Shield.Config(patterns=["(?i)hello", "###", "What", "Gener", "Analyze", ">"]))


# -- through the proxy -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A proxy with room for the models `m` and `small`, and the model `m` behind several shields, by name."""

    proxy: Proxy
    fakes: Fakes

    def asked(self) -> dict[str, Any]:
        """The body that asked a server for the last answer."""
        bodies = [json.loads(event["body"]) for event in self.fakes.events("request") if event["body"]]
        found: dict[str, Any] = [body for body in bodies if "model" in body][-1]
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    fakes = Fakes(tmp_path_factory.mktemp("shield"))
    models = {"m": fakes.model(fields={"parallel": 4}), "small": fakes.model()}
    shields: dict[str, dict[str, Any]] = {
        "routed": {"model": "small", "slot": 3},
        "slotted": {"slot": 3},
        "short": {"max_tokens": 50},
        "thinking": {"no_thinking": False},
        "itself": {"model": "m", "slot": 2},
    }
    virtual: dict[str, Any] = {
        name: {"model": "m", "agents": [{"shield": options}]} for name, options in shields.items()
    }
    virtual["crowd"] = {"model": "m", "agents": ["example", {"parallel": {"n": 2, "strategy": "show"}}]}
    config = fakes.config(models | virtual, keep_alive=-1, size=2)
    with session_proxy(config | {"agents": ["shield", "example", "parallel"]}) as proxy:
        yield Stage(proxy, fakes)


async def test_they_go_to_the_small_model_and_do_not_think_in_every_api(stage: Stage) -> None:
    for way in WAYS:
        told = []
        for text, model in ((TITLE, "small"), ("Hello", "m"), (THE_USERS[2], "m")):
            said = await way.ask(stage.proxy, way.body(text, model="routed"))
            assert (said.status, said.error) == (200, None), way
            body = stage.asked()
            assert (body["model"], body.get("id_slot")) == (model, None), (way, text)
            thinks = body.get("chat_template_kwargs", {}).get("enable_thinking", True)
            assert thinks is (model == "m" or "prompt" in body), (way, text)
            told.append(said)
        assert told[0] == told[1]
    assert len(stage.fakes.events("start")) == 2, "both models stay"


async def test_chats_reach_the_model_as_they_came(stage: Stage) -> None:
    body = WAY.body("Hello", model="slotted", temperature=0.5, chat_template_kwargs={"enable_thinking": True})
    await WAY.ask(stage.proxy, body)
    assert stage.asked() == body | {"model": "m"}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages"])
async def test_their_answers_are_relayed_byte_for_byte(stage: Stage, path: str) -> None:
    way = Way(path, stream=True)
    bodies = [
        (await raw_client.post(stage.proxy.port, path, way.body(TITLE, model=model))).body
        for model in ("routed", "small")
    ]
    routed, direct = (re.sub(rb'"predicted_ms": [0-9.e-]+', b"", body) for body in bodies)
    assert routed == direct


async def test_they_go_to_the_slot_where_there_is_no_small_model(stage: Stage) -> None:
    for way in WAYS:
        for text, slot in ((TITLE, 3), ("Hello", None)):
            await way.ask(stage.proxy, way.body(text, model="slotted"))
            assert stage.asked().get("id_slot") == slot, (way, text)
    await WAY.ask(stage.proxy, WAY.body(TITLE, model="itself"))
    assert stage.asked()["id_slot"] == 2, "the user's model is no other model"


async def test_the_agents_that_users_call_have_no_part_in_them(stage: Stage) -> None:
    for way in WAYS:
        for text, times in ((TITLE, 1), ("Hello", 2)):
            before = len(stage.fakes.events("request"))
            said = await way.ask(stage.proxy, way.body(text, model="crowd"))
            assert (said.status, said.error) == (200, None), way
            sent = [event["body"] for event in stage.fakes.events("request")[before:] if event["body"]]
            bodies = [body for body in map(json.loads, sent) if "model" in body]
            assert sum(body.get("n", 1) for body in bodies) == times, (way, text)
            assert all((' #"' in json.dumps(body)) is (times == 2) for body in bodies), (way, text)


async def test_their_answers_may_be_short(stage: Stage) -> None:
    for given, limits in (
        ({"max_completion_tokens": 1000}, {"max_tokens": 50}),
        ({"max_tokens": 20}, {"max_tokens": 20}),
        ({}, {"max_tokens": 50}),
    ):
        await WAY.ask(stage.proxy, WAY.body(TITLE, model="short", **given))
        assert {key: value for key, value in stage.asked().items() if "max" in key} == limits
    await WAY.ask(stage.proxy, WAY.body("Hello", model="short", max_tokens=1000))
    assert stage.asked()["max_tokens"] == 1000


async def test_they_may_think_if_the_operator_says_so(stage: Stage) -> None:
    variables = {"enable_thinking": True, "tone": "dry"}
    await WAY.ask(stage.proxy, WAY.body(TITLE, model="thinking", chat_template_kwargs=variables))
    assert stage.asked()["chat_template_kwargs"] == variables
    await WAY.ask(stage.proxy, WAY.body(TITLE, model="m", chat_template_kwargs=variables))
    assert stage.asked()["chat_template_kwargs"] == {"enable_thinking": False, "tone": "dry"}


async def test_the_users_model_is_not_evicted_for_them(fakes: Fakes) -> None:
    models = {"m": fakes.model(fields={"parallel": 4}), "small": fakes.model()}
    config = fakes.config(models, keep_alive=-1, size=1)
    async with running_proxy(config | {"agents": [{"shield": {"model": "small", "slot": 3}}]}) as proxy:
        await WAY.ask(proxy, WAY.body("Hello"))
        pid = (await instance(proxy, "m"))["pid"]
        for way in WAYS:
            said = await way.ask(proxy, way.body(TITLE))
            assert (said.status, said.error) == (200, None), way
        assert (await instance(proxy, "m"))["pid"] == pid
        assert len(fakes.events("start")) == 1, "there is one place, and it is the user's"


async def test_a_bad_pattern_is_told_at_the_start(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model()}) | {"agents": [{"shield": {"patterns": ["("]}}]}
    with pytest.raises(AssertionError, match=r"'\(' is not a regular expression"):
        async with running_proxy(config):
            pass


@needs_llama_cpp
async def test_real_llama_cpp_keeps_the_chat_in_its_cache() -> None:
    args = ["-t", "1", "--no-kv-unified", "--cache-ram", "0"]
    config = embedded({"m": {**SMOLLM2, "args": args, "parallel": 2}})
    history: list[dict[str, str]] = [{"role": "user", "content": "Tell me about rivers. " * 40}]

    async def turn(proxy: Proxy, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {"model": "m", "messages": messages, "max_tokens": 4, "temperature": 0}
        answer: dict[str, Any] = (await raw_client.post(proxy.port, CHAT, body)).json()
        return answer

    async with running_proxy(config | {"agents": [{"shield": {"slot": 0}}]}) as proxy:
        first = await turn(proxy, history)
        prompts = [text for kind, text in BACKGROUND if kind in ("tags", "follow_ups", "queries")]
        await asyncio.gather(*(turn(proxy, [{"role": "user", "content": text}]) for text in prompts))
        history += [first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
        second = await turn(proxy, history)
    assert second["timings"]["cache_n"] >= first["timings"]["prompt_n"], "nothing of the chat was computed anew"
