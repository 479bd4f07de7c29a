"""The agent `example`: what a copy of it starts from works in every API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, WEATHER, Fakes
from tests.support.harness import Proxy, session_proxy

WAY = Way(CHAT, stream=True)
MARKS = {"mark": "(!)", "prefix": "<<", "suffix": ">>"}


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    return Fakes(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def proxy(fakes: Fakes) -> Iterator[Proxy]:
    models = {"m": fakes.model(fields={"parallel": 4}, TOKENS=3)}
    with session_proxy(fakes.config(models, keep_alive=-1) | {"agents": [{"example": MARKS}]}) as proxy:
        yield proxy


def asked(fakes: Fakes) -> str:
    """The user's text as it last reached a server."""
    bodies = [json.loads(event["body"]) for event in fakes.events("request") if event["body"]]
    body = [body for body in bodies if "model" in body][-1]
    content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return str(content if isinstance(content, str) else content[-1]["text"])


async def test_request_and_answer_are_marked_in_every_api(fakes: Fakes, proxy: Proxy) -> None:
    for way in WAYS:
        said = await way.ask(proxy, way.body("/example Hello"))
        assert (said.text, said.error) == ("<<t0 t1 t2 >>", None), way
        assert said.finish in ("stop", "end_turn"), way
        assert asked(fakes) == "Hello (!)", way
        plain = await way.ask(proxy, way.body("Hello"))
        assert (plain.text, asked(fakes)) == ("t0 t1 t2 ", "Hello"), "it runs when it is called"


async def test_a_call_sets_the_mark(fakes: Fakes, proxy: Proxy) -> None:
    said = await WAY.ask(proxy, WAY.body('/example mark="- -" Hello'))
    assert (said.text, asked(fakes)) == ("<<t0 t1 t2 >>", "Hello - -")
    said = await WAY.ask(proxy, WAY.body('/example mark="" Hello'))
    assert said.status == 400 and "option mark of /example" in (said.error or "")
    await WAY.ask(proxy, WAY.body("/example prefix=* Hello"))
    assert asked(fakes) == "prefix=* Hello (!)", "what a call may not set is the user's text"


async def test_each_of_several_answers_is_marked_and_a_tool_call_is_not(proxy: Proxy) -> None:
    body: dict[str, Any] = WAY.body("/example Hello", n=2) | {"stream": False}
    choices = (await raw_client.post(proxy.port, CHAT, body)).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert len(texts) == 2 and all(text.startswith("<<t0") and text.endswith(">>") for text in texts)
    call = {"tokens": 0, "tool_call": ["get_weather", {"city": "Rome"}]}
    body = WAY.body("/example Hello", tools=[WEATHER], fake=call) | {"stream": False}
    (choice,) = (await raw_client.post(proxy.port, CHAT, body)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and not choice["message"].get("content")
