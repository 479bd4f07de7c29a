"""What the proxy gives to agents: answers again, substitution in a stream, and functions that a model calls."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from llama_smart_proxy import Agent, ChatRequest, Chunk, Reply, fold, replay, say, substitute
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.middleware.functions import MAX_ROUNDS, Function, functions_of, offer, with_calls
from tests.support.laws import law

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


async def stream(*chunks: Chunk) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


def texts(text: str, places: list[int]) -> list[str]:
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(cuts)]


async def collected(answer: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in answer]


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        {"content": "hi"},
        {"content": "", "reasoning_content": "hm", "tool_calls": [CALL, {**CALL, "id": "d"}]},
        {"content": "both", "reasoning_content": "hm", "refusal": "no"},
        {"content": ""},
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls"])
def test_a_replayed_answer_is_the_answer(message: Json, finish: str) -> None:
    one = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    other = {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "2"}}
    data = {"id": "x", "model": "m", "created": 1, "object": "chat.completion", "usage": USAGE, "timings": {"n": 1}}
    for choices in ([one], [one, other]):
        reply = Reply(data | {"choices": choices})
        chunks = asyncio.run(collected(replay(reply)))
        again = asyncio.run(fold(stream(*chunks)))
        assert again.data == reply.data
        assert [chunk.index for chunk in chunks if chunk.finish_reason] == [choice["index"] for choice in choices]


# -- substitute --------------------------------------------------------------------------------------------------------


@law(1000)
@given(st.text(alphabet="abx", max_size=30), st.lists(st.integers(0, 100), max_size=6), st.booleans(), st.booleans())
def test_a_substitution_does_not_depend_on_the_pieces(text: str, places: list[int], ends: bool, thinks: bool) -> None:
    for pattern, function in ((r"ab+", None), (re.compile(r"AB+", re.I), lambda found: f"<{found}>")):
        chunks = [*([Chunk.of(reasoning="ab")] if thinks else []), *map(Chunk.of, texts(text, places))]
        chunks += [Chunk.ending()] if ends else []
        made = asyncio.run(collected(substitute(stream(*chunks), cast(Any, pattern), function or "!")))
        reply = asyncio.run(fold(stream(*made)))
        assert reply.text == re.sub("ab+", (lambda found: f"<{found[0]}>") if function else "!", text)
        assert reply.reasoning == ("ab" if thinks else "")
        assert not ends or made[-1].finish_reason == "stop", "nothing follows the end"


def test_what_is_held_back_for_a_match_is_passed_before_a_tool_call() -> None:
    part = {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **CALL}]}, "finish_reason": None}]}
    made = asyncio.run(collected(substitute(stream(Chunk.of("a"), Chunk(part), Chunk.ending()), "ab", "!")))
    assert [(chunk.text, bool(chunk.tool_calls)) for chunk in made] == [("a", False), ("", True), ("", False)]


def test_choices_are_substituted_apart_and_an_unchanged_chunk_stays_as_it_came() -> None:
    chunks = [Chunk.of("a", index=0), Chunk.of("b", index=1), Chunk.of("b", index=0), Chunk.ending(index=0)]
    made = asyncio.run(collected(substitute(stream(*chunks), "ab", "!")))
    assert [(chunk.index, chunk.text) for chunk in made] == [(1, "b"), (0, "!"), (0, "")]
    untouched = Chunk({"choices": [{"index": 0, "delta": {"content": "xyz"}}]}, b"data: xyz\n\n")
    (same,) = asyncio.run(collected(substitute(stream(untouched), "ab", "!")))
    assert same is untouched and same.frame is not None


# -- functions ---------------------------------------------------------------------------------------------------------


async def plain(city: str, days: Annotated[int, Field(ge=1, description="How many.")] = 1) -> str:
    """The forecast."""
    return f"{city} {days}"


def in_thread(unit: Literal["c", "f"]) -> Json:
    """The temperature."""
    return {"unit": unit, "here": threading.current_thread() is threading.main_thread()}


async def with_context(self: Any, ctx: Any, word: str) -> str:
    return f"{type(self).__name__} {ctx.name} {word}"


def fails() -> str:
    raise RuntimeError("no luck")


class Helpful(Agent):
    tools: ClassVar[tuple[Callable[..., Any], ...]] = (plain, in_thread, with_context, fails)


FUNCTIONS = functions_of(Helpful)


class Model:
    """Gives these answers, one after the other, and keeps the requests; as the context of an agent, too."""

    def __init__(self, *answers: list[Chunk], **fields: Any) -> None:
        self.request = ChatRequest({"model": "m", "messages": [{"role": "user", "content": "?"}], **fields})
        offer(self.request, FUNCTIONS)
        self.answers, self.asked, self.name = list(answers), list[Json](), "helpful"
        self.active = SimpleNamespace(loaded=SimpleNamespace(agent=Helpful(Helpful.Config())))

    def chat(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        self.asked.append(request.copy().body)
        return stream(*self.answers.pop(0))

    async def run(self) -> list[Chunk]:
        first = stream(*self.answers.pop(0))
        return await collected(with_calls(first, cast(Any, self), FUNCTIONS))


def calling(*calls: tuple[str, Any], text: str = "", usage: Json | None = None) -> list[Chunk]:
    """An answer with these calls, each cut in two."""
    chunks = [Chunk.of(text)] if text else []
    for index, (name, arguments) in enumerate(calls):
        written = json.dumps(arguments)
        for call in (
            {"index": index, "id": f"call{index}", "function": {"name": name, "arguments": written[:3]}},
            {"index": index, "function": {"arguments": written[3:]}},
        ):
            chunks.append(Chunk({"choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}))
    chunks.append(Chunk.ending("tool_calls" if calls else "stop"))
    return [*chunks, *([Chunk({"choices": [], "usage": usage})] if usage else [])]


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    function = Function(plain).tool["function"]
    assert (function["name"], function["description"]) == ("plain", "The forecast.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "default": 1, "description": "How many."},
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert list(Function(with_context).tool["function"]["parameters"]["properties"]) == ["word"]
    with pytest.raises(Exception, match="schema"):
        functions_of(type("Odd", (Agent,), {"tools": (_odd,)}))


def _odd(what: threading.Thread) -> str:
    return ""


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("plain", {"city": "Rome", "days": 2}, "Rome 2"),
        ("plain", {"city": "Rome"}, "Rome 1"),
        ("in_thread", {"unit": "c"}, '{"unit": "c", "here": false}'),
        ("with_context", {"word": "w"}, "Helpful helpful w"),
        ("fails", {}, "error: RuntimeError: no luck"),
        ("plain", {"town": "Rome"}, "error: wrong arguments: "),
        ("plain", {"city": "Rome", "days": 0}, "error: wrong arguments: "),
        ("in_thread", [1], "error: wrong arguments: "),
    ],
)
def test_the_model_gets_the_result_of_a_call_and_the_client_the_text(name: str, arguments: Any, result: str) -> None:
    counts = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    model = Model(
        calling((name, arguments), text="Wait. ", usage=USAGE),
        calling(text="Done.", usage=counts),
        tool_choice="required",
    )
    reply = asyncio.run(fold(stream(*asyncio.run(model.run()))))
    assert (reply.text, reply.tool_calls, reply.finish_reason) == ("Wait. Done.", [], "stop")
    assert reply.usage == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}
    (asked,) = model.asked
    told, answered = asked["messages"][1:]
    assert told["tool_calls"][0]["id"] == answered["tool_call_id"] == "call0" and told["content"] == "Wait. "
    assert json.loads(told["tool_calls"][0]["function"]["arguments"]) == arguments
    assert answered["content"].startswith(result) and answered["role"] == "tool"
    assert "tool_choice" not in asked, "otherwise it would have to call for ever"


def test_an_answer_without_calls_passes_as_it_came() -> None:
    chunks = [*calling(text="hi"), Chunk({"choices": [], "usage": USAGE})]
    assert all(made is given for made, given in zip(asyncio.run(Model(chunks).run()), chunks, strict=True))


def test_calls_of_the_clients_own_tools_are_passed_on() -> None:
    own = {"type": "function", "function": {"name": "plain", "description": "the client's", "parameters": {}}}
    theirs = {"type": "function", "function": {"name": "theirs", "parameters": {}}}
    mixed: list[tuple[str, Json]] = [("fails", {}), ("theirs", {})]
    for calls in (mixed[1:], mixed, mixed[::-1]):
        model = Model(calling(*calls, text="x"), tools=[theirs])
        reply = asyncio.run(fold(stream(*asyncio.run(model.run()))))
        assert [call["function"]["name"] for call in reply.tool_calls] == ["theirs"]
        assert (reply.finish_reason, reply.text, model.asked) == ("tool_calls", "x", [])
    model = Model(calling(("plain", {"city": "x"})), tools=[own])
    assert [tool["function"]["name"] for tool in model.request.tools].count("plain") == 1
    reply = asyncio.run(fold(stream(*asyncio.run(model.run()))))
    assert reply.tool_calls and model.asked == [], "of two with one name it is the client's"


def test_a_model_that_never_stops_calling_gets_no_functions_in_the_end() -> None:
    model = Model(*[calling(("fails", {})) for _ in range(MAX_ROUNDS)], calling(text="enough"))
    reply = asyncio.run(fold(stream(*asyncio.run(model.run()))))
    assert reply.text == "enough" and len(model.asked) == MAX_ROUNDS
    assert all(asked["tools"] for asked in model.asked[:-1]) and "tools" not in model.asked[-1]


def test_a_text_completion_has_no_functions() -> None:
    request = ChatRequest({"model": "m", "prompt": "x"})
    offer(request, FUNCTIONS)
    assert request.body == {"model": "m", "prompt": "x"}
    assert asyncio.run(fold(say("x"))).text == "x"
