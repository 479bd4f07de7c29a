"""What only Anthropic's API can express is kept beside what agents see, and written back in its place."""

from __future__ import annotations

import pytest

from llama_smart_proxy.proxy.chat import Json, first_problem, without_extensions
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES
from llama_smart_proxy.proxy.errors import BadRequest
from tests.unit.test_anthropic_dialect import PDF, REFUSED, changed

SENSELESS: tuple[str, ...] = ("stream", "messages: ", "messages.0: ", "messages.0.role: Field", "messages.0.content: ")
SENSELESS += ("messages.0.content.0: Input", "messages.0.content.0.type", "messages.0.content.0.text")
"""How the reasons begin why a request can be sent to no server at all."""


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_translated_is_written_back_for_a_server_of_the_same_api(change: Json, message: str) -> None:
    body = changed(change)
    if message.startswith(SENSELESS):
        with pytest.raises(BadRequest):
            MESSAGES.decode_same_api(body)
        return
    request = MESSAGES.decode_same_api(body)
    assert MESSAGES.encode(request.copy()) == changed(change)
    assert MESSAGES.fits(request)
    problem = first_problem(request.body)
    assert isinstance(problem, BadRequest) and problem.message == message
    assert "_extensions" not in str(without_extensions(request.body))


def test_kept_blocks_keep_their_places_when_an_agent_changes_what_is_around_them() -> None:
    tools = [{"type": "web_search_20250305", "name": "s"}, {"name": "f", "input_schema": {}}, {"type": "bash_1"}]
    search = {"type": "server_tool_use", "id": "1", "name": "s", "input": {"q": "x"}}
    reply = [{"type": "text", "text": "a"}, search, {"type": "text", "text": "b"}]
    pdf = {"type": "document", "source": PDF}
    asked = [pdf, {"type": "text", "text": "?"}]
    body = changed({"tools": tools, "messages": [{"role": "assistant", "content": reply}, {"role": "developer"}]})
    body["messages"].append({"role": "user", "content": asked})
    request = MESSAGES.decode_same_api(body)
    assert [tool["function"]["name"] for tool in request.tools] == ["f"]
    assert request.last_user_text == MESSAGES.user_text(body) == "?"
    request.last_user_text = "!"
    request.system = "s"
    request.messages[1]["content"][2]["text"] = "B"
    back = MESSAGES.encode(request)
    assert back["tools"] == tools and back["system"] == "s"
    assert back["messages"] == [
        {"role": "assistant", "content": [reply[0], search, {"type": "text", "text": "B"}]},
        {"role": "developer"},
        {"role": "user", "content": [pdf, {"type": "text", "text": "!"}]},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "/a"}],
        [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}, {"type": "text", "text": "/a"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "/a"}, {"type": "tool_result", "tool_use_id": "x"}]}],
        [
            {"role": "user", "content": "/a"},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]},
        ],
        [
            {"role": "user", "content": "/a"},
            {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]},
        ],
        [{"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "/a"}}]}],
        [{"role": "user", "content": [{"type": "document", "source": PDF}, {"type": "text", "text": "/a"}]}],
        [{"role": "user", "content": "/a"}, {"role": "user", "content": []}],
    ],
)
def test_the_users_text_is_found_without_decoding(messages: list[Json]) -> None:
    body = changed({"messages": messages})
    assert MESSAGES.user_text(body) == MESSAGES.decode_same_api(body).last_user_text
