"""Words that call agents: at position 0 of a text, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.middleware.slash import MAX_ITEMS, Command, leading_commands
from tests.support.laws import law

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
    ("/RAG /Opt hi", ["rag", "opt"], "hi"),
    ("/rag /etc/hosts is what?", ["rag"], "/etc/hosts is what?"),
]
"""What calls, whom, and what is left of it."""
VERBATIM = [
    "What is it?", "", " /rag What?", "\n/rag What?", "\t/rag What?", "\ufeff/rag What?", "\u200b/rag What?",
    "What does /rag do?", "Say:\n/rag hi", "`/rag` is what?", "```\n/rag\n```", "> /rag hi", '"/rag hi"', "'/rag'",
    "(/rag hi)", "- /rag hi", "1. /rag hi", "**/rag** hi", "//rag hi", "/ rag hi", "/rag/opt hi", "/rag: hi",
    "/rag, hi", "/rag.", "/rag's", "/ragged hi", "/ra hi", "/rag_ hi", "/rag- hi",
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
    assert ([call.name for call in called], left) == (commands, rest)


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
    assert (called, left) == ([Command("opt")], "top_k=3 /rag")


def test_a_text_of_commands_alone_does_not_go_on_for_ever() -> None:
    called, left = leading_commands("/rag " * 1000, KNOWN)
    assert len(called) == MAX_ITEMS and left == "/rag " * (1000 - MAX_ITEMS)
    called, left = leading_commands("/rag " + "top_k=1 " * 1000, KNOWN)
    assert called == [Command("rag", {"top_k": "1"})] and left == "top_k=1 " * (1000 - MAX_ITEMS)


@law(1000)
@given(st.text(max_size=40))
def test_whatever_is_left_is_the_end_of_what_there_was(text: str) -> None:
    called, rest = leading_commands(text, KNOWN)
    assert text.endswith(rest) and (called or rest == text)
    assert not called or text.lower().startswith(f"/{called[0].name}")
    called, rest = leading_commands(f"/rag {text}", KNOWN)
    assert called[0].name == "rag" and text.endswith(rest)


@law(1000)
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
