"""The agent `redact`: what is private is replaced however it is cut into pieces, and nothing else is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama_smart_proxy.agents.base import Context
from llama_smart_proxy.agents.redact import Redact
from llama_smart_proxy.agents.redact.matching import Scrubber, compiled, result_of, scrubbed, scrubbing, scrubbing_json
from llama_smart_proxy.agents.redact.presets import PRESETS
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk
from tests.support.laws import law

KEY = f"sk-{'a1B2' * 8}"
PRIVATE = {
    "email": ["a@b.io", "first.last+tag@mail.example.co.uk"],
    "phone": ["+49 30 1234567", "+1 (555) 010-9999"],
    "credit_card": ["4111 1111 1111 1111", "5500-0000-0000-0004"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "ipv4": ["192.168.0.1"],
    "api_key": [KEY, f"ghp_{'x' * 36}", "AKIAIOSFODNN7EXAMPLE"],
    "jwt": [f"eyJhbGciOi.eyJzdWIiOi.{'s' * 20}"],
    "private_key": [f"-----BEGIN RSA PRIVATE KEY-----\n{'Ab1/' * 16}\n-----END RSA PRIVATE KEY-----"],
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


@law(1000)
@given(st.lists(words, max_size=6), st.lists(st.integers(0, 200), max_size=10))
def test_the_same_comes_out_however_it_is_cut(parts: list[str], places: list[int]) -> None:
    text = " ".join(parts)
    pieces = cut(text, places)
    assert scrub(text, pieces) == scrub(text)


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted(min(place, len(text)) for place in places)
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


OWN = [
    [r"a[^b]*b|c"],  # a whole match stands behind the beginning of an earlier one
    [r"\d{2}\B", r"\ba\b"],
    [r"a(?!b)", r"(?<=a)b(?=c)", r"c$"],
    [r"(?m)^a.*$", r"\n\Z"],
    [r"(?x) a+ [$\b] # [ a comment", r"(a|b)c\1"],
    [r"ab|abcab|b+c", r"a.{3,20}c"],
]


@law(1000)
@given(st.sampled_from(OWN), st.text("abc1$ \n", max_size=60), st.lists(st.integers(0, 60), max_size=12))
def test_patterns_that_look_ahead_find_the_same_however_it_is_cut(
    sources: list[str], text: str, places: list[int]
) -> None:
    matchers = [compiled(str(number), source) for number, source in enumerate(sources)]
    scrubber = Scrubber(matchers, 200)
    assert "".join(map(scrubber.feed, cut(text, places))) + scrubber.end() == scrubbed(matchers, text)
    left = set()
    for pieces in (cut(text, places), [text], list(text)):  # what is longer than is held back, too
        scrubber = Scrubber(matchers, 16)
        left.add("".join(map(scrubber.feed, pieces)) + scrubber.end())
    assert len(left) == 1


def test_a_match_that_is_there_may_grow_beyond_what_is_held_for_one_that_is_not() -> None:
    token = f"eyJhbGciOi.eyJ{'a1B2' * 100}.{'s' * 86}"
    pem = f"-----BEGIN PRIVATE KEY-----\n{'Ab1/' * 400}\n-----END PRIVATE KEY-----"
    for name, secret in (("jwt", token), ("private_key", pem), ("api_key", f"sk-proj-{'k' * 300}")):
        assert scrub("", [*f"so {secret}, no"], hold=256) == f"so [{name}], no"


def test_what_follows_a_number_does_not_hide_it() -> None:
    assert scrub("4111 1111 1111 1111 12/26") == "[credit_card] 12/26"
    assert scrub("DE89 3704 0044 0532 0130 00 AND SO ON") == "[iban] AND SO ON"


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


def test_the_time_for_a_text_that_is_held_back_does_not_grow_with_its_square() -> None:
    took_s = []
    for length in (2_000, 32_000):
        scrubber = Scrubber([compiled("block", r"BEGIN[^#]*END")], 1_000_000)
        began = time.process_time()
        assert scrubber.feed("BEGIN") + "".join(scrubber.feed("abc ") for _ in range(length)) == ""
        took_s.append(time.process_time() - began)
        assert scrubber.feed("END") + scrubber.end() == "[block]"
    assert took_s[1] < 16 * 5 * took_s[0]


def test_long_texts_are_done_in_steps_with_the_same_result() -> None:
    text = f"to me@home.org, {'x' * 300} " * 20
    matchers = [PRESETS["email"]]
    scrubber = Scrubber(matchers, 64)
    steps = 0
    for making in (scrubber.feeding(text), scrubber.ending(), scrubbing(matchers, text)):
        steps += sum(1 for _ in making)
    assert steps > 40
    clean = scrubbed(matchers, text)
    assert result_of(scrubbing_json(matchers, json.dumps({"a": [text, 1]}))) == json.dumps({"a": [clean, 1]})
    again = Scrubber(matchers, 64)
    assert result_of(again.feeding(text)) + result_of(again.ending()) == scrubbed(matchers, text)


def test_a_pattern_that_takes_for_ever_is_given_up() -> None:
    scrubber = Scrubber([compiled("evil", r"(a|aa)+(?:b|c)+$")], 4096)
    with pytest.raises(TimeoutError):
        scrubber.feed("a" * 4000 + "!")


def test_bad_patterns_are_told_when_the_configuration_is_read() -> None:
    for patterns, words in (
        ([{"name": "x", "pattern": "("}], "the pattern x is not a regular expression: missing )"),
        ([{"name": "x", "pattern": "a*"}], "the pattern x matches the empty text"),
        ([{"name": "x", "pattern": r"a\Kb"}], "the pattern x has .*, which require"),
        (["e-mail"], "there is no pattern 'e-mail'; known ones: api_key, credit_card, email,"),
    ):
        with pytest.raises(ValidationError, match=words.replace("(", r"\(").replace(")", r"\)")):
            Redact.Config(patterns=cast(Any, patterns))


class Facts:
    """All of a context that the agent looks at."""

    def __init__(self, config: Redact.Config) -> None:
        self.config = config
        self.state: dict[str, Any] = {}


def passed(chunks: list[Chunk], question: str = "", **options: Any) -> list[Chunk]:
    """What becomes of an answer in these chunks."""
    config = Redact.Config(**options)
    agent, facts = Redact(config), cast(Context, Facts(config))

    async def source() -> AsyncIterator[Chunk]:
        for chunk in chunks:
            yield chunk

    async def run() -> list[Chunk]:
        await agent.on_request(ChatRequest({"messages": [{"role": "user", "content": question}]}), facts)
        return [chunk async for chunk in agent.on_response(source(), facts)]

    return asyncio.run(run())


def ending(reason: str = "stop", **delta: Any) -> Chunk:
    return Chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def called(*pieces: str) -> list[Chunk]:
    """A tool call whose arguments come in these pieces, and the end of the answer."""
    calls = [{"index": 0, "function": {"arguments": piece}} for piece in pieces]
    chunks = [Chunk({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}, b"frame") for call in calls]
    return [*chunks, ending("tool_calls")]


def arguments(made: list[Chunk]) -> Any:
    assert [chunk.finish_reason for chunk in made].index("tool_calls") == len(made) - 1
    return json.loads("".join(call["function"]["arguments"] for chunk in made for call in chunk.tool_calls))


def test_arguments_of_tool_calls_are_looked_at_and_stay_json() -> None:
    said = {"to": "me@home.org", "text": "Hi\nyou@home.org \u00e9", "card": 4111111111111111, "n": 1.50}
    for text in (json.dumps(said), json.dumps(said, ensure_ascii=False)):
        made = passed(called(text[:12], text[12:50], text[50:]), patterns=["email", "credit_card"])
        assert arguments(made) == {"to": "[email]", "text": "Hi\n[email] \u00e9", "card": "[credit_card]", "n": 1.5}
    made = passed(called('{"a": "[q', ' 1]"}'), 'I say "x"', patterns=[{"name": "q", "pattern": '"x"'}], restore=True)
    assert arguments(made) == {"a": '"x"'}


def asked(**body: Any) -> dict[str, Any]:
    """What becomes of a request."""
    config = Redact.Config(patterns=["email"])
    request = ChatRequest(body)
    asyncio.run(Redact(config).on_request(request, cast(Context, Facts(config))))
    return request.body


def test_every_text_that_a_model_gets_is_looked_at() -> None:
    for prompt, clean in (
        ("to a@b.io", "to [email]"),
        (["a@b.io", "no"], ["[email]", "no"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[1, "a@b.io"], 7, None], [[1, "[email]"], 7, None]),
        ({"prompt_string": "a@b.io", "multimodal_data": ["x"]}, {"prompt_string": "[email]", "multimodal_data": ["x"]}),
        ([{"prompt_string": "a@b.io"}], [{"prompt_string": "[email]"}]),
    ):
        assert asked(prompt=prompt) == {"prompt": clean}
    for key in ("content", "reasoning_content", "reasoning"):
        assert asked(messages=[{"role": "assistant", key: "a@b.io"}])["messages"] == [
            {"role": "assistant", key: "[email]"}
        ]
    parts = [{"type": "text", "text": "a@b.io"}, {"type": "image_url", "image_url": {"url": "data:,a@b.io"}}]
    (message,) = asked(messages=[{"role": "user", "content": parts}])["messages"]
    assert message["content"] == [{"type": "text", "text": "[email]"}, parts[1]]


def test_untouched_chunks_are_the_same_objects() -> None:
    chunks = [Chunk.of("so ", index=1), Chunk({"choices": []}, b"usage"), *called('{"a": ', '"b"}')]
    assert passed(chunks) == chunks and chunks[2].frame == b"frame"


def test_the_end_comes_last_and_may_bring_the_rest_of_a_match() -> None:
    made = passed([Chunk.of("write me@ho"), ending(content="me.org")])
    assert [(chunk.text, chunk.finish_reason) for chunk in made] == [("write ", None), ("[email]", "stop")]
    made = passed([Chunk.of(reasoning="me@ho"), Chunk.of("me@home.org"), ending()])
    assert [(chunk.reasoning, chunk.text) for chunk in made] == [("me@ho", ""), ("", "[email]"), ("", "")]
    assert "".join(chunk.text for chunk in passed([Chunk.of("me@home.org")])) == "[email]"


def test_several_answers_are_kept_apart() -> None:
    made = passed([Chunk.of("me@ho"), Chunk.of("you@", index=1), Chunk.of("me.org"), Chunk.of("home.org ", index=1)])
    assert ["".join(chunk.text for chunk in made if chunk.index == index) for index in (0, 1)] == [
        "[email]",
        "[email] ",
    ]


def test_tokens_of_a_changed_text_are_not_told_beside_it() -> None:
    chunk = Chunk.of("me@home.org ")
    chunk.data["choices"][0]["logprobs"] = {"content": [{"token": "me@home.org"}]}
    made = passed([chunk])
    assert [chunk.text for chunk in made] == ["[email] "] and "logprobs" not in made[0].choice
