"""Slash commands: at position 0 of the user's last text, and nowhere else, whoever writes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.middleware.slash import MOST, Called, leading_commands
from tests.support import raw_client
from tests.support.agent_clients import Way, write_agent
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, running_proxy, session_proxy

KNOWN = {"rag": frozenset({"top_k", "words"}), "opt": frozenset[str](), "two-words": frozenset[str]()}
LEADING: list[tuple[str, list[str], str]] = [
    ("/rag What is it?", ["rag"], "What is it?"),
    ("/rag", ["rag"], ""),
    ("/rag\nWhat?", ["rag"], "What?"),
    ("/rag   \t What?", ["rag"], "What?"),
    ("/rag /opt What?", ["rag", "opt"], "What?"),
    ("/opt /rag What?", ["opt", "rag"], "What?"),
    ("/rag /rag What?", ["rag", "rag"], "What?"),
    ("/rag /unknown What?", ["rag"], "/unknown What?"),
    ("/rag What about /opt?", ["rag"], "What about /opt?"),
    ("/two-words hi", ["two-words"], "hi"),
    ("/rag /etc/hosts is what?", ["rag"], "/etc/hosts is what?"),
]
"""What calls, whom, and what is left of it."""
VERBATIM = [
    "What is it?", "", " /rag What?", "\n/rag What?", "\t/rag What?", "\ufeff/rag What?", "\u200b/rag What?",
    "What does /rag do?", "Say:\n/rag hi", "`/rag` is what?", "```\n/rag\n```", "> /rag hi", '"/rag hi"', "'/rag'",
    "(/rag hi)", "- /rag hi", "1. /rag hi", "**/rag** hi", "//rag hi", "/ rag hi", "/rag/opt hi", "/rag: hi",
    "/rag, hi", "/rag.", "/rag's", "/RAG hi", "/Rag hi", "/ragged hi", "/ra hi", "/rag_ hi", "/rag- hi",
    "/r\u0430g hi",  # with a Cyrillic letter
    "\uff0frag hi", "\u2044rag hi", "\u2215rag hi", "\u29f8rag hi", "\\rag hi", "rag hi", "/unknown hi",
    "/unknown /rag hi", "/etc/hosts is what?", "/", "/1 hi", "/-rag hi", "<context>/rag hi</context>",
    "</context>\n/rag hi",
    "### Task:\nGenerate a concise title.\n<chat_history>\nUSER: /rag hi\n</chat_history>",
    "### Task:\nSuggest 3-5 follow-up questions.\n/rag", "/rag\x00 hi", "/rag\u200bhi", "/rag=3 hi",
]  # fmt: skip
"""What calls nobody, and reaches the model as it is."""


@pytest.mark.parametrize(("text", "commands", "rest"), LEADING)
def test_leading_words_call_agents_and_are_taken_out(text: str, commands: list[str], rest: str) -> None:
    called, left = leading_commands(text, KNOWN)
    assert ([call.command for call in called], left) == (commands, rest)


@pytest.mark.parametrize("text", VERBATIM)
def test_anything_else_is_left_alone(text: str) -> None:
    assert leading_commands(text, KNOWN) == ([], text)


def test_options_are_those_that_the_agent_has() -> None:
    for text, options, rest in (
        ("/rag top_k=3 What?", {"top_k": "3"}, "What?"),
        ('/rag words="a b" top_k=3 What?', {"words": "a b", "top_k": "3"}, "What?"),
        ("/rag x=3 What?", {}, "x=3 What?"),
        ("/rag top_k=3, What?", {"top_k": "3,"}, "What?"),
        ("/rag top_k= What?", {}, "top_k= What?"),
        ('/rag words="a b What?', {"words": '"a'}, "b What?"),
        ("/rag What? top_k=3", {}, "What? top_k=3"),
    ):
        called, left = leading_commands(text, KNOWN)
        assert (called[0].options, left) == (options, rest), text
    called, left = leading_commands("/opt top_k=3 /rag", KNOWN)
    assert (called, left) == ([Called("opt")], "top_k=3 /rag")


def test_a_text_of_commands_alone_does_not_go_on_for_ever() -> None:
    called, left = leading_commands("/rag " * 1000, KNOWN)
    assert len(called) == MOST and left == "/rag " * (1000 - MOST)
    called, left = leading_commands("/rag " + "top_k=1 " * 1000, KNOWN)
    assert called == [Called("rag", {"top_k": "1"})] and left == "top_k=1 " * (1000 - MOST)


@given(st.text(max_size=40))
def test_whatever_is_left_is_the_end_of_what_there_was(text: str) -> None:
    called, rest = leading_commands(text, KNOWN)
    assert text.endswith(rest) and (called or rest == text)
    assert not called or text.startswith(f"/{called[0].command}")
    called, rest = leading_commands(f"/rag {text}", KNOWN)
    assert called[0].command == "rag" and text.endswith(rest)


@given(st.sampled_from([text for text, _, _ in LEADING]), st.text(min_size=1, max_size=3))
def test_nothing_may_stand_in_front_of_a_command(text: str, before: str) -> None:
    if not before.startswith("/"):
        assert leading_commands(before + text, KNOWN) == ([], before + text)


def test_a_cheap_look_misses_nobody() -> None:
    user = {"role": "user", "content": "/rag hi"}
    for body in (
        {"messages": [user]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "/rag"}]}]},
        {"messages": [user, {"role": "assistant", "content": ""}, {"role": "tool", "content": "x"}]},
        {"prompt": "/rag"},
        {"prompt": ["/rag"]},
    ):
        assert ClientCodec().user_text(body).startswith("/"), body
    others: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": 3},
        {"messages": 3},
        {},
        {"messages": [3]},
    ]
    for other in others:
        assert not ClientCodec().user_text(other).startswith("/"), other


# -- through the proxy -------------------------------------------------------------------------------------------------

RAG = '''
class Rag(Agent):
    """Leaves a mark on the request."""
    command = "rag"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.body["marked"] = True
        return None
'''
SAYS = {"type": "text", "text": "/rag hi"}
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("slash"))
    write_agent(fakes.folder / "agents", "rag", RAG)
    config = fakes.config({"m": fakes.model(), "off": fakes.model(fields={"agents": False})}, keep_alive=-1)
    config |= {"agents_dirs": [str(fakes.folder / "agents")], "agents": ["rag"]}
    with session_proxy(config) as proxy:
        yield proxy, fakes


async def sent(stage: tuple[Proxy, Fakes], messages: list[dict[str, Any]], model: str = "m") -> dict[str, Any]:
    """What the model's server gets of it."""
    proxy, fakes = stage
    answer = await raw_client.post(proxy.port, CHAT, {"model": model, "messages": copy.deepcopy(messages)})
    assert answer.status == 200
    return fakes.generated()[-1]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "/rag hi"}, HI],
        [{"role": "developer", "content": "/rag hi"}, HI],
        [HI, {"role": "assistant", "content": "/rag hi"}, HI],
        [HI, {"role": "assistant", "content": "/rag hi"}],
        [{"role": "user", "content": "/rag hi"}, {"role": "assistant", "content": "Yes"}, HI],
        [HI, {"role": "tool", "tool_call_id": "1", "content": "/rag hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}, SAYS]}],
        [{"role": "user", "content": "<context>\n/rag hi\n</context>\n/rag hi"}],
        [{"role": "user", "content": "### Task:\nGenerate 1-3 broad tags\n/rag"}],
        [{"role": "user", "content": "/unknown hi"}],
        [{"role": "user", "content": "\uff0frag hi"}],
        [{"role": "user", "content": " /rag hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/rag"}}]}],
    ],
)
async def test_nobody_but_the_user_calls(stage: tuple[Proxy, Fakes], messages: list[dict[str, Any]]) -> None:
    body = await sent(stage, messages)
    assert "marked" not in body and body["messages"] == messages


@pytest.mark.parametrize(
    ("messages", "left"),
    [
        ([{"role": "user", "content": "/rag hi"}], "hi"),
        ([{"role": "user", "content": [SAYS]}], [{"type": "text", "text": "hi"}]),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, SAYS]}],
            [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "hi"}],
        ),
        ([{"role": "user", "content": "/rag"}], ""),
    ],
)
async def test_the_user_calls(stage: tuple[Proxy, Fakes], messages: list[dict[str, Any]], left: Any) -> None:
    body = await sent(stage, messages)
    assert body["marked"] is True and body["messages"] == [{"role": "user", "content": left}]


async def test_a_turn_with_tools_stays_the_users_turn(stage: tuple[Proxy, Fakes]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    after: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    body = await sent(stage, [{"role": "user", "content": "/rag hi"}, *after])
    assert body["marked"] is True and body["messages"] == [HI, *after], "the same prefix as before the call"


async def test_opting_out_wins(stage: tuple[Proxy, Fakes]) -> None:
    messages = [{"role": "user", "content": "/rag hi"}]
    assert (await sent(stage, messages, "off"))["messages"] == messages
    proxy, fakes = stage
    ways_out: list[tuple[list[tuple[str, str]], dict[str, Any]]] = [
        ([("X-Agents", "off")], {}),
        ([], {"agents": False}),
        ([("X-Agents", "rag")], {"agents": "off"}),
    ]
    for headers, fields in ways_out:
        body = {"model": "m", "messages": messages, **fields}
        await raw_client.post(proxy.port, CHAT, body, headers=headers)
        assert fakes.generated()[-1]["messages"] == messages and "marked" not in fakes.generated()[-1]


async def test_the_configuration_can_do_without_slash_commands(stage: tuple[Proxy, Fakes]) -> None:
    _, fakes = stage
    config = fakes.config({"m": fakes.model()}) | {"slash_commands": False, "agents": ["rag"]}
    async with running_proxy(config | {"agents_dirs": [str(fakes.folder / "agents")]}) as proxy:
        way = Way(CHAT, stream=False)
        await way.ask(proxy, way.body("/rag hi"))
        assert fakes.generated()[-1]["messages"][-1]["content"] == "/rag hi"
        await way.ask(proxy, way.body("/rag hi", agents=["rag"]))
        assert fakes.generated()[-1]["marked"] is True and "/rag hi" in json.dumps(fakes.generated()[-1])
