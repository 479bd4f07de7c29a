"""The agent `redact`: what is private is replaced, wherever it stands and however it is cut into pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, session_proxy

KEY = f"sk-{'a1B2' * 8}"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("redact"))
    restoring = {"redact": {"restore": True}}
    own = {
        "redact": {"patterns": [{"name": "code", "pattern": "[XY]-[0-9]+", "replacement": "***"}], "where": ["request"]}
    }
    models = {
        "m": fakes.model(fields={"parallel": 4}),
        "restoring": {"model": "m", "agents": [restoring]},
        "own": {"model": "m", "agents": [own]},
    }
    config = fakes.config(models, keep_alive=-1) | {"agents": [{"redact": {"patterns": ["email", "api_key"]}}]}
    with session_proxy(config) as proxy:
        yield proxy, fakes


async def test_answers_are_redacted_in_every_api(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        said = await way.ask(stage[0], way.steered(texts=["Write to m", "e@ho", "me.org", ", or", " n", "ot"]))
        assert (said.text, said.error) == ("Write to [email], or not", None), way


async def test_requests_are_redacted_in_every_api(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    for way in WAYS:
        await way.ask(proxy, way.body(f"My key is {KEY}!"))
        event = [event for event in fakes.events("request") if event["path"] in (way.path, CHAT, "/v1/messages")][-1]
        assert KEY not in event["body"] and "My key is [api_key]!" in event["body"], way
    assert not any(KEY in json.dumps(event) for event in fakes.events())


async def test_every_text_of_a_request_is_looked_at(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    mail = "me@home.org"
    function = {"name": "f", "arguments": json.dumps({"to": mail})}
    messages = [
        {"role": "system", "content": f"I am {mail}"},
        {"role": "user", "content": [{"type": "text", "text": mail}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": mail,
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": mail},
        {"role": "user", "content": mail},
    ]
    await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": messages})
    sent = json.dumps(fakes.generated()[-1])
    assert mail not in sent and sent.count("[email]") == 6
    system = [{"type": "text", "text": mail}]
    body = {"model": "m", "max_tokens": 9, "system": system, "messages": [{"role": "user", "content": mail}]}
    await raw_client.post(proxy.port, "/v1/messages", body)
    event = fakes.events("request")[-1]
    assert event["path"] == "/v1/messages" and mail not in event["body"]


async def test_blocks_that_no_other_api_has_are_looked_at_too(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    mail = "me@home.org"
    text = {"type": "text", "text": mail}
    pdf = {
        "type": "document",
        "title": mail,
        "source": {"type": "base64", "media_type": "x", "data": "bWVAaG9tZS5vcmc="},
    }
    blocks = [{"type": "search_result", "source": mail, "title": mail, "content": [text]}, pdf]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "new", "deep": [{"er": mail}]}]}
    messages = [{"role": "user", "content": [result, *blocks]}, {"role": "developer", "content": [text]}]
    body = {"model": "m", "max_tokens": 9, "messages": messages}
    await raw_client.post(proxy.port, "/v1/messages", body)
    sent = fakes.events("request")[-1]["body"]
    assert json.loads(sent) == json.loads(json.dumps(body | {"stream": True}).replace(mail, "[email]"))


async def test_what_was_taken_out_is_put_back_for_the_user(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    way = Way(CHAT, stream=True)
    texts = ["To [em", "ail 2]", " from [email 1]", ", not x@", "y.org"]
    messages = [
        {"role": "user", "content": "I am a@b.io, she is c@d.io, and a@b.io again"},
        {"role": "user", "content": json.dumps({"fake": {"texts": texts}})},
    ]
    said = await way.ask(proxy, {"model": "restoring", "stream": True, "messages": messages})
    assert fakes.generated()[-1]["messages"][0]["content"] == "I am [email 1], she is [email 2], and [email 1] again"
    assert said.text == "To c@d.io from a@b.io, not [email]"


async def test_own_patterns_and_places(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    way = Way(CHAT, stream=False)
    said = await way.ask(proxy, way.body("X-12 and Y-3", model="own", fake={"texts": ["X-1"]}))
    assert said.text == "X-1"
    assert fakes.generated()[-1]["messages"][-1]["content"] == "*** and ***"


@pytest.mark.parametrize("where", ["request", "answer"])
async def test_others_are_served_while_a_long_text_is_searched(stage: tuple[Proxy, Fakes], where: str) -> None:
    proxy, _ = stage
    text = f"to me@home.org, {'x ' * 20}" * (10_000 if where == "request" else 1_500)
    way = Way(CHAT, stream=where == "answer")
    body = way.body(text) if where == "request" else way.body("hi", fake={"texts": [text]})
    long = asyncio.ensure_future(way.ask(proxy, body))
    served = 0
    while not long.done():
        assert (await raw_client.get(proxy.port, "/health")).status == 200
        served += 1
    assert (await long).error is None
    assert served >= 5, "others had to wait"
    if where == "answer":
        assert (await long).text == text.replace("me@home.org", "[email]")
