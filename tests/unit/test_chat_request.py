"""What agents read of a request, and what becomes of what they set."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import ChatRequest

HI = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_messages_and_tools_can_be_replaced() -> None:
    request = ChatRequest({"model": "m", "messages": [HI]})
    request.messages = [{"role": "system", "content": "s"}, *request.messages]
    request.tools = [TOOL]
    request.messages.append(HI)
    assert request.body == {"model": "m", "messages": [{"role": "system", "content": "s"}, HI, HI], "tools": [TOOL]}
    assert (request.system, request.last_user_text, request.tools) == ("s", "hi", [TOOL])


def test_without_tools_there_is_no_choice_among_them() -> None:
    body = {"messages": [HI], "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": True}
    request = ChatRequest(body)
    request.tools = []
    assert request.body == {"messages": [HI]} and request.tools == []


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ("p", "s\n\np"),
        (["p"], ["s\n\np"]),
        (["p", "q"], ["s\n\np", "s\n\nq"]),
        ([1, 2], None),
        ([[1]], None),
        (None, None),
    ],
)
def test_the_system_text_of_a_text_completion_is_put_in_front_of_its_prompt(prompt: Any, written: Any) -> None:
    request = ChatRequest({"model": "m", "prompt": prompt})
    if written is None:
        with pytest.raises(ValueError, match="no text"):
            request.system = "s"
        return
    request.system = "s"
    assert request.body == {"model": "m", "prompt": written}
    request.system = ""
    assert request.body["prompt"] == written


def test_a_text_completion_does_not_silently_become_a_chat() -> None:
    request = ChatRequest({"model": "m", "prompt": "p"})
    with pytest.raises(ValueError, match="prompt"):
        request.messages = [HI]
    assert request.body == {"model": "m", "prompt": "p"} and request.messages == []
