"""Slash commands: at position 0 of the user's last text, and nowhere else, whoever writes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, write_agent
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, running_proxy, session_proxy

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


async def test_a_later_turn_shows_the_model_the_prompt_that_it_knows(stage: tuple[Proxy, Fakes]) -> None:
    asked: list[dict[str, Any]] = [{"role": "user", "content": "/rag hi"}]
    first = await sent(stage, asked)
    answered = {"role": "assistant", "content": "Yes"}
    later = await sent(stage, [*asked, answered, HI])
    assert "marked" not in later and later["messages"] == [*first["messages"], answered, HI]
    messages = [*asked, answered, HI]
    assert (await sent(stage, messages, "off"))["messages"] == messages, "where no agent may be called, it is a text"


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/parallel n=2 hi", True),
        ("/PARALLEL", True),
        ("/example on", True),
        ("/rag /parallel hi", True),
        ("/rag /example", True),
        ("/unknown /parallel hi", False),
        ("/redact hi", False),  # it has no command
        ("/think hi", False),  # nor has that one, and it means something to some models
        ("/parallelism hi", False),
        ("hi /parallel", False),
        ("/help /parallel", False),
        ("/rag /etc/parallel", False),
    ],
)
async def test_the_command_of_an_agent_that_is_not_enabled_is_answered_by_how_to_enable_it(
    stage: tuple[Proxy, Fakes], text: str, told: bool
) -> None:
    proxy, fakes = stage
    name = text.lower().partition("example" if "example" in text else "parallel")[1]
    hint = f"The agent /{name} is part of this proxy, but it is not enabled. To enable it, add `{name}` to `agents:`"
    for way in WAYS if told else WAYS[:1]:
        asked = len(fakes.events("request"))
        said = await way.ask(proxy, way.body(text))
        assert (said.error, said.text.startswith(hint)) == (None, told), way
        if told:
            assert len(fakes.events("request")) == asked, "no model was asked"
    disabled = await WAYS[0].ask(proxy, WAYS[0].body(text, model="off"))
    assert "not enabled" not in disabled.text, "where agents are off, commands are text"


async def test_capitals_make_no_difference(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    for text, headers in (("/RAG hi", []), ("/Rag hi", []), ("hi", [("X-Agents", "RAG")])):
        said = await WAYS[0].ask(proxy, WAYS[0].body(text), headers)
        assert said.error is None and fakes.generated()[-1]["marked"] is True, text
    assert "rag" in (await WAYS[0].ask(proxy, WAYS[0].body("/HELP"))).text
