"""Which requests are background prompts of chat UIs, in every API, and how long their answers may be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.backends.tasks import Task
from llama_smart_proxy.proxy.api.background import HOLD_S, MOST_TOKENS, task_of
from llama_smart_proxy.proxy.chat import Json, background_kind
from llama_smart_proxy.proxy.chat.background import LONGEST
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.dialects import anthropic, ollama, openai, responses
from llama_smart_proxy.proxy.dialects.base import ClientCodec

TITLE = "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history."
TAGS = "### Task:\nGenerate 1-3 broad tags categorizing the main themes"
WHOLE = f"{TITLE}\n### Guidelines:\n- Be brief.\n### Chat History:\n<chat_history>\nUSER: hi\n</chat_history>"
ADAPTED = "### Task:\nGib dem Chat einen Titel.\n### Chat:\n<chat_history>\nUSER: Hallo\n</chat_history>"
SUMMARIZER = "You are a professional conversation summarizer. Generate a concise title that ..."
ANSWER, QUESTION = {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": TITLE}
CHAT = openai.CHAT
CODECS: list[ClientCodec] = [
    CHAT, openai.TEXT, ollama.CHAT, ollama.GENERATE, anthropic.MESSAGES, responses.CODEC,
]  # fmt: skip


def found(codec: ClientCodec, body: Json, *, local: bool = True, tasks: str = "last") -> Task | None:
    model = SimpleNamespace(features={Feature.LOADING} if local else set())
    return task_of(codec, body, cast(Model, model), PoolConfig(tasks=cast(Any, tasks)))


def body_of(codec: ClientCodec, text: str, **fields: Any) -> Json:
    body: Json = {"model": "m", "stream": False, **fields}
    if codec in (openai.TEXT, ollama.GENERATE):
        return body | {"prompt": text}
    return body | {codec.messages_field: [{"role": "user", "content": text}]}


def limit_of(codec: ClientCodec, body: Json) -> object:
    place = body.get("options", {}) if codec in (ollama.CHAT, ollama.GENERATE) else body
    return next((place[name] for name in codec.limit_fields if name in place), None)


def with_limit(codec: ClientCodec, body: Json, limit: object) -> Json:
    field = {codec.limit_fields[0]: limit}
    return body | ({"options": {"seed": 1} | field} if codec in (ollama.CHAT, ollama.GENERATE) else field)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("text", [TITLE, TAGS, WHOLE, ADAPTED, f"\n  {TITLE}"])
def test_a_background_prompt_is_known_in_every_api(codec: ClientCodec, text: str) -> None:
    assert found(codec, body_of(codec, text)) is not None
    assert found(codec, body_of(codec, text), tasks="equal") is None
    assert found(codec, body_of(codec, text, tools=[{"type": "function"}])) is None
    assert found(codec, body_of(codec, f"What is this? {text}")) is None


@pytest.mark.parametrize("codec", CODECS)
def test_a_stream_is_a_persons_unless_it_is_a_whole_template(codec: ClientCodec) -> None:
    assert found(codec, body_of(codec, TITLE, stream=True)) is None
    assert found(codec, body_of(codec, WHOLE, stream=True)) is not None


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("codec", "body"),
    [
        (CHAT, {"messages": [{"role": "system", "content": SUMMARIZER}, {"role": "user", "content": "user: hi"}]}),
        (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": SUMMARIZER}]}]}),
        (ollama.CHAT, {"messages": [{"role": "system", "content": SUMMARIZER}, {"role": "user", "content": "hi"}]}),
        (ollama.GENERATE, {"system": SUMMARIZER, "prompt": "hi"}),
        (anthropic.MESSAGES, {"system": SUMMARIZER, "messages": [{"role": "user", "content": "hi"}]}),
        (responses.CODEC, {"instructions": SUMMARIZER, "input": "hi"}),
    ],
)
def test_a_background_prompt_is_known_by_its_system_prompt(codec: ClientCodec, body: Json, stream: bool) -> None:
    assert found(codec, {**body, "stream": stream}) is not None


@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION, ANSWER],
        [ANSWER, QUESTION],
        [QUESTION, {"role": "tool", "content": "x"}],
        [{"role": "user", "content": "### Task:\nRespond to the user query using the provided context"}],
        [{"role": "user", "content": "### Task:\nWrite a function that sorts"}],
        [QUESTION, {"role": "user", "content": "Hello"}],
        [None, 1, {"role": "user", "content": {"a": 1}}],
        "nonsense",
        [],
    ],
)
def test_what_a_person_asks_is_none_whatever_it_is(messages: Any) -> None:
    body = {"messages": messages, "max_tokens": 4000}
    assert found(CHAT, body) is None
    assert body == {"messages": messages, "max_tokens": 4000}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (1000, MOST_TOKENS), (MOST_TOKENS, MOST_TOKENS), (20, 20), (0, 0), (-1, MOST_TOKENS), (1e9, MOST_TOKENS),
        ("many", "many"), (None, MOST_TOKENS),
    ],
)  # fmt: skip
def test_its_answer_is_limited_and_no_limit_is_raised(codec: ClientCodec, given: object, sent: object) -> None:
    body = with_limit(codec, body_of(codec, TITLE), given)
    before = dict(body)
    assert found(codec, body) is not None
    assert limit_of(codec, body) == sent
    changed = {"options", *codec.limit_fields}
    assert {key: value for key, value in body.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }


@pytest.mark.parametrize("codec", CODECS)
def test_a_limit_is_added_for_models_of_this_machine_only(codec: ClientCodec) -> None:
    local, remote = body_of(codec, TITLE), body_of(codec, TITLE)
    assert found(codec, local) is not None and found(codec, remote, local=False) is not None
    assert (limit_of(codec, local), limit_of(codec, remote)) == (MOST_TOKENS, None)


def test_options_that_are_none_stay_as_they_are() -> None:
    body = body_of(ollama.CHAT, TITLE, options=[1])
    assert found(ollama.CHAT, body) is not None and body["options"] == [1]


def test_only_a_title_waits_for_its_chat() -> None:
    title, tags = found(CHAT, body_of(CHAT, TITLE)), found(CHAT, body_of(CHAT, TAGS))
    assert title is not None and tags is not None
    assert (title.hold_s, tags.hold_s) == (HOLD_S, 0)


def test_only_the_beginning_of_a_text_is_read() -> None:
    assert background_kind("### Task:\n" + "x" * LONGEST + "\n<chat_history>") is None
    assert background_kind(" " * LONGEST + TITLE) is None
