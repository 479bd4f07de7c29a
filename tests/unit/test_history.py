"""What slash commands leave in a chat that is sent again: models do not see it, and its switches hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llama_smart_proxy.proxy.chat.status import status_line
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES
from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.dialects.ollama import CHAT as OLLAMA
from llama_smart_proxy.proxy.dialects.openai import CHAT, TEXT
from llama_smart_proxy.proxy.dialects.responses import CODEC as RESPONSES
from llama_smart_proxy.proxy.errors import UpstreamFailed, error_text
from llama_smart_proxy.proxy.middleware.commands import Commands
from llama_smart_proxy.proxy.middleware.history import MAX_MESSAGES, History, may_hold_commands, read_history
from llama_smart_proxy.proxy.middleware.plugins import Plugins

CODECS = [CHAT, OLLAMA, MESSAGES, RESPONSES]
LISTED = "Agents that run in this chat: none."
ON = ("/parallel on", f"/parallel is on in this chat.\n{LISTED}")
OFF = ("/parallel off", f"/parallel is off in this chat.\n{LISTED}")
PLAIN = ("hi", "Hello!")


def commands() -> Commands:
    return Commands(Plugins.of(Config.model_validate({"agents": ["parallel"], "models": {"m": {"path": "/m.gguf"}}})))


def chat(*turns: tuple[str, str], last: str = "And now?") -> list[dict[str, Any]]:
    messages = []
    for text, answer in turns:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": last}]


def in_parts(codec: ClientCodec, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat with the texts as parts, after an image."""

    def part(message: dict[str, Any]) -> dict[str, Any]:
        kind = {"user": "input_text", "assistant": "output_text"}[message["role"]] if codec is RESPONSES else "text"
        return {"type": kind, "text": message["content"]}

    image = {"type": "image", "source": {}}
    return [{**message, "content": [image, part(message)]} for message in messages]


def read(codec: ClientCodec, messages: list[dict[str, Any]]) -> History:
    body = {codec.messages_field: messages}
    before = copy.deepcopy(body)
    history = read_history(codec, body, commands())
    assert body == before, "the client's own bytes may still be sent: nothing is changed in place"
    assert may_hold_commands(codec, body) or history == History()
    return history


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("turns", "seen", "switches"),
    [
        ([PLAIN], None, {}),
        ([("/parallel hi", "Hello!")], [PLAIN], {}),
        ([("/PARALLEL n=3 hi", "Hello!"), PLAIN], [PLAIN, PLAIN], {}),
        ([ON], [], {"parallel": True}),
        ([PLAIN, ON, PLAIN, OFF], [PLAIN, PLAIN], {"parallel": False}),
        ([OFF, ON], [], {"parallel": True}),
        ([("/agents", LISTED), PLAIN], [PLAIN], {}),
        ([("/help parallel", "/parallel asks several models."), PLAIN], [PLAIN], {}),
        ([("/parallel on", "As you wish.")], None, {}),
        ([("/usr/bin/parallel on", "A path.")], None, {}),
        ([("What does /parallel on do?", "It switches.")], None, {}),
        ([("/rag hi", "Hello!")], None, {}),
        ([("/agents and what they do", "They help.")], None, {}),
    ],
)
def test_models_see_no_command_of_an_earlier_turn(
    codec: ClientCodec, turns: list[tuple[str, str]], seen: list[tuple[str, str]] | None, switches: dict[str, bool]
) -> None:
    for shape in (list, lambda messages: in_parts(codec, messages)):
        history = read(codec, shape(chat(*turns)))
        assert history.messages == (None if seen is None else shape(chat(*seen)))
        assert history.switches == switches


@pytest.mark.parametrize("codec", CODECS)
def test_the_answer_of_an_agent_that_is_not_enabled_goes_with_its_command(codec: ClientCodec) -> None:
    answer = commands().idle(None, "/example hi")
    assert answer is not None
    assert read(codec, chat(("/example hi", answer), PLAIN)).messages == chat(PLAIN)
    assert read(codec, chat(("/example hi", "Hello!"), PLAIN)).messages is None


@pytest.mark.parametrize("codec", CODECS)
def test_an_error_shown_in_an_answer_is_no_part_of_it(codec: ClientCodec) -> None:
    error = error_text(UpstreamFailed("it broke\noff"))
    for shape in (list, lambda messages: in_parts(codec, messages)):
        assert read(codec, shape(chat(("Why?", f"Because{error}")))).messages == shape(chat(("Why?", "Because")))
    for answer in (error, error.strip()):
        assert read(codec, chat(("Why?", answer))).messages == chat(("Why?", ""))
    for answer in ("Write **Error:** there", f"{error}\n\nThat is what it shows.", f"{error} {'x' * 1000}"):
        assert read(codec, chat(("Why?", answer))).messages is None


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_status_lines_in_front_of_the_reasoning_are_no_part_of_it(codec: ClientCodec, name: str) -> None:
    shown = status_line("Loading m, about\n8 s") + status_line("Loading m, about 3 s")
    contents: tuple[dict[str, Any], ...] = (
        {"content": "Hello!"},
        {"content": None, "tool_calls": [{"id": "1"}]},
        {"content": {}},
    )
    question: dict[str, Any] = {"role": "user", "content": "hi"}
    for thoughts in ("Hm.\n\u23f3 it is late.", ""):
        for fields in contents:
            answer = {"role": "assistant", **fields, name: shown + thoughts}
            clean = {"role": "assistant", **fields, **({name: thoughts} if thoughts else {})}
            for messages in ([question, answer, *chat()], [*chat(), answer]):
                expected = [clean if message is answer else message for message in messages]
                assert read(codec, messages).messages == expected
            assert read(codec, [clean, *chat()]).messages is None
    assert read(codec, [{"role": "user", "content": "hi", name: shown}, *chat()]).messages is None


@pytest.mark.parametrize("codec", CODECS)
def test_an_empty_text_beside_other_parts_is_left_out_as_on_its_own_turn(codec: ClientCodec) -> None:
    messages = in_parts(codec, chat(("/parallel", "Hello!")))
    read_back = read(codec, messages).messages
    assert read_back is not None and read_back[0]["content"] == messages[0]["content"][:1]


def test_the_turn_under_way_is_left_to_the_agents() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    under_way: list[dict[str, Any]] = [
        {"role": "user", "content": "/parallel on the roof"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "/parallel on"},
    ]
    assert read(CHAT, under_way).messages is None
    assert read(CHAT, [*chat(ON)[:-1], *under_way]).messages == under_way


def test_tool_results_are_no_turn_of_the_user() -> None:
    result: dict[str, Any] = {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "1", "content": "/parallel on"}],
    }
    use: dict[str, Any] = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
    asked = {"role": "user", "content": "/parallel hi"}
    assert read(MESSAGES, [asked, use, result]).messages is None, "the turn that they belong to is still the last one"
    later = [asked, use, result, *chat(last="more")]
    assert read(MESSAGES, later).messages == [{**asked, "content": "hi"}, *later[1:]]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "messages",
    [
        [],
        [None, 1, "x", [], {}],
        [{"role": "user"}, {"role": "user", "content": None}, {"role": "assistant", "content": {"text": "/parallel"}}],
        [{"role": "user", "content": [None, {"text": None}, {"type": [], "text": "/parallel hi"}]}, *chat()],
        [{"role": "user", "content": "/parallel on"}, None, *chat()],
        [{"role": [], "type": {}, "content": "/parallel on"}, *chat()],
    ],
)
def test_nonsense_is_left_to_the_decoder(codec: ClientCodec, messages: list[Any]) -> None:
    read(codec, messages)


def test_an_endless_chat_is_taken_as_it_is() -> None:
    assert read(CHAT, chat(ON) * MAX_MESSAGES) == History()


def test_a_prompt_has_no_history() -> None:
    assert read_history(TEXT, {"prompt": "/parallel on", "messages": chat(ON)}, commands()) == History()
