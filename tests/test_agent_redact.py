"""The agent `redact`: what is private is replaced, wherever it stands and however it is cut into pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from agents.base import Context
from agents.redact import Redact
from agents.redact.matching import PRESETS, Scrubber, compiled
from proxy.chat import Chunk
from tests import raw_client
from tests.agent_clients import WAYS, Way
from tests.e2e_support import CHAT, Fakes
from tests.harness import Proxy, session_proxy

KEY = f"sk-{'a1B2' * 8}"
PRIVATE = {
    "email": ["a@b.io", "first.last+tag@mail.example.co.uk"],
    "phone": ["+49 30 1234567", "+1 (555) 010-9999"],
    "credit_card": ["4111 1111 1111 1111", "5500-0000-0000-0004"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "ipv4": ["192.168.0.1"],
    "api_key": [KEY, f"ghp_{'x' * 36}", "AKIAIOSFODNN7EXAMPLE"],
    "jwt": [f"eyJhbGciOi.eyJzdWIiOi.{'s' * 20}"],
}
HARMLESS = ["a@b", "4111 1111 1111 1112", "DE00 3704 0044 0532 0130 00", "1.2.3", "sk-short", "@home", "x@y@z", "+1"]


def scrub(text: str, pieces: list[str] | None = None, *names: str, hold: int = 4000) -> str:
    scrubber = Scrubber([PRESETS[name] for name in names or PRESETS], hold)
    return "".join(map(scrubber.feed, pieces if pieces is not None else [text])) + scrubber.end()


@pytest.mark.parametrize("name", PRIVATE)
def test_known_patterns_find_what_they_are_for(name: str) -> None:
    for value in PRIVATE[name]:
        assert scrub(f"it is {value}, so", None, name) == f"it is [{name}], so"
        assert scrub(value, None, name) == f"[{name}]"
        assert scrub(f"({value})\n", None, name) == f"([{name}])\n"


def test_what_only_looks_like_it_is_left_alone() -> None:
    for text in HARMLESS:
        assert scrub(f"see {text} there") == f"see {text} there"


words = st.sampled_from(
    [*(value for values in PRIVATE.values() for value in values), *HARMLESS, "and", "so", "\n", "é"]
)


@given(st.lists(words, max_size=6), st.lists(st.integers(0, 200), max_size=10))
def test_the_same_comes_out_however_it_is_cut(parts: list[str], places: list[int]) -> None:
    text = " ".join(parts)
    at = sorted(min(place, len(text)) for place in places)
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    assert scrub(text, pieces) == scrub(text)


def test_only_what_may_be_a_match_is_held_back() -> None:
    scrubber = Scrubber([PRESETS["email"]], 256)
    told = [scrubber.feed(text) for text in ("write to ", "me@", "home.", "org now", " or not ")]
    assert told == ["write to ", "", "", "[email] ", "now or not "]
    assert "".join(told) + scrubber.end() == "write to [email] now or not "


def test_what_is_held_back_is_bounded() -> None:
    scrubber = Scrubber([compiled("block", r"BEGIN[^#]*END")], 32)
    left = len("".join(scrubber.feed("BEGIN" + "x" * 10) for _ in range(100)))
    assert left >= 15 * 100 - 33
    scrubber = Scrubber([compiled("block", r"BEGIN[^#]*END")], 32)
    assert scrubber.feed("BEGIN") + scrubber.feed(" 1 END ") + scrubber.end() == "[block] "


def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    scrubber = Scrubber([compiled("evil", r"(a|aa)+(?:b|c)+$")], 4096)
    with pytest.raises(TimeoutError):
        scrubber.feed("a" * 4000 + "!")


def test_bad_patterns_are_told_when_the_configuration_is_read() -> None:
    for patterns, words in (
        ([{"name": "x", "pattern": "("}], "the pattern x is no regular expression: missing )"),
        ([{"name": "x", "pattern": "a*"}], "the pattern x matches the empty text"),
        (["e-mail"], "there is no pattern 'e-mail'; known ones: api_key, credit_card, email,"),
    ):
        with pytest.raises(ValidationError, match=words.replace("(", r"\(").replace(")", r"\)")):
            Redact.Config(patterns=cast(Any, patterns))


class Facts:
    """All of a context that the agent looks at."""

    def __init__(self, config: Redact.Config) -> None:
        self.config = config
        self.state: dict[str, Any] = {}


def test_arguments_of_tool_calls_are_looked_at_too() -> None:
    pieces = ['{"to": "me@ho', 'me.org", "cc": "you', '@home.org"}']
    config = Redact.Config(patterns=["email"])

    async def source() -> AsyncIterator[Chunk]:
        for piece in pieces:
            call = {"index": 0, "function": {"arguments": piece}}
            yield Chunk({"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]})
        yield Chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})

    async def run() -> list[Chunk]:
        stream = Redact(config).on_response(source(), cast(Context, Facts(config)))
        return [chunk async for chunk in stream]

    made = asyncio.run(run())
    arguments = "".join(call["function"]["arguments"] for chunk in made for call in chunk.tool_calls)
    assert json.loads(arguments) == {"to": "[email]", "cc": "[email]"}
    assert made[-1].finish_reason == "tool_calls"


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
