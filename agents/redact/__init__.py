"""The agent that keeps private things out of requests and answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from agents.base import Agent, Context, Options
from agents.redact.matching import HOLD, PRESETS, Matcher, Scrubber, compiled
from proxy.chat import ChatRequest, Chunk, ChunkStream, Json


class Pattern(Options):
    """A pattern of the operator's own."""

    name: str = Field(description="What stands in the place of what it finds, in brackets.")
    pattern: str = Field(min_length=1, description="A regular expression (of Python's package `regex`).")
    replacement: str | None = Field(default=None, description="What stands there instead of the name.")


class Redact(Agent):
    """Replaces what matches a pattern (e-mail addresses, keys, numbers of cards, ...) in requests, and live in answers.

    Of an answer only what may be the beginning of a match is held back. Not looked at: images, the descriptions of
    tools, prompts made of tokens, and the endpoints that have no agents.
    """

    class Config(Options):
        """What may stand behind `redact` in the configuration."""

        patterns: list[str | Pattern] = Field(
            default=["email", "credit_card", "iban", "api_key", "jwt"],
            min_length=1,
            description=f"Known patterns ({', '.join(sorted(PRESETS))}), and `{{name, pattern, replacement}}`.",
        )
        where: list[Literal["request", "response"]] = Field(
            default=["request", "response"], min_length=1, description="Where to look."
        )
        restore: bool = Field(
            default=False,
            description="Give what was taken out of the request a number each, and put it back into the answer: the "
            "model never sees it, the user does.",
        )
        hold: int = Field(
            default=HOLD, ge=16, description="Longest match, in characters, that is found in a streamed answer."
        )
        _matchers: list[Matcher] = PrivateAttr(default_factory=list)

        @model_validator(mode="after")
        def _compile(self) -> Redact.Config:
            for given in self.patterns:
                if isinstance(given, Pattern):
                    self._matchers.append(compiled(given.name, given.pattern, given.replacement))
                elif given in PRESETS:
                    self._matchers.append(PRESETS[given])
                else:
                    raise ValueError(f"there is no pattern {given!r}; known ones: {', '.join(sorted(PRESETS))}")
            return self

        @property
        def matchers(self) -> list[Matcher]:
            """The patterns, ready to look with."""
            return self._matchers

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if "request" in ctx.config.where:
            found = ctx.state["found"] = Found(ctx.config)
            for holder, key in _texts(request.body):
                holder[key] = found.take_out(holder[key])
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        matchers = list(ctx.config.matchers) if "response" in ctx.config.where else []
        found: Found | None = ctx.state.get("found")
        if ctx.config.restore and found is not None:
            matchers = [*found.put_back(), *matchers]
        answers: dict[int, _Answer] = {}
        async for chunk in stream:
            if matchers and (chunk.delta or chunk.finish_reason):
                answer = answers.setdefault(chunk.index, _Answer(chunk.index, matchers, ctx.config.hold))
                for passed in answer.take(chunk):
                    yield passed
            else:
                yield chunk
        for answer in answers.values():
            for passed in answer.end():
                yield passed


class Found:
    """What was taken out of one request; the same thing has the same number wherever it stands."""

    def __init__(self, config: Redact.Config) -> None:
        self._config = config
        self._placeholders: dict[tuple[str, str], str] = {}

    def take_out(self, text: str) -> str:
        scrubber = Scrubber(self._config.matchers, len(text) + 1, self._name if self._config.restore else None)
        return scrubber.feed(text) + scrubber.end()

    def put_back(self) -> list[Matcher]:
        """Patterns that find the placeholders, and put there what they stand for."""
        return [
            compiled(placeholder, _escaped(placeholder), value)
            for (_, value), placeholder in self._placeholders.items()
        ]

    def _name(self, matcher: Matcher, value: str) -> str:
        known = self._placeholders.get((matcher.name, value))
        if known is None:
            number = sum(name == matcher.name for name, _ in self._placeholders) + 1
            known = self._placeholders[matcher.name, value] = f"[{matcher.name} {number}]"
        return known


class _Answer:
    """One answer: its text, its thoughts, and the arguments of each of its tool calls, each with what is held back."""

    def __init__(self, index: int, matchers: list[Matcher], hold: int) -> None:
        self._index = index
        self._text = Scrubber(matchers, hold)
        self._reasoning = Scrubber(matchers, hold)
        self._calls: dict[int, Scrubber] = {}
        self._matchers = matchers
        self._hold = hold

    def take(self, chunk: Chunk) -> list[Chunk]:
        text, reasoning = chunk.text, chunk.reasoning
        before = self._rest(self._reasoning, "reasoning") if text or chunk.tool_calls or chunk.finish_reason else []
        if chunk.tool_calls or chunk.finish_reason:
            before += self._rest(self._text, "text")
        if chunk.finish_reason:
            return [*before, *self.end(), chunk] if not (text or reasoning) else [*before, *self._last(chunk)]
        if text and (scrubbed := self._text.feed(text)) != text:
            chunk.text = scrubbed
        if reasoning and (scrubbed := self._reasoning.feed(reasoning)) != reasoning:
            chunk.reasoning = scrubbed
        for place, call in enumerate(chunk.tool_calls):
            self._scrub_call(chunk, place, call)
        empty = (text or reasoning) and not chunk.text and not chunk.reasoning and not chunk.tool_calls
        return before if empty and "role" not in chunk.delta else [*before, chunk]

    def end(self) -> list[Chunk]:
        """What is still held back."""
        rest = [*self._rest(self._reasoning, "reasoning"), *self._rest(self._text, "text")]
        for number, scrubber in self._calls.items():
            if arguments := scrubber.end():
                rest.append(_call_chunk(self._index, number, arguments))
        return rest

    def _last(self, chunk: Chunk) -> list[Chunk]:
        """An answer in one piece, or a server that says the last words and the end at once."""
        if chunk.text:
            chunk.text = self._text.feed(chunk.text) + self._text.end()
        if chunk.reasoning:
            chunk.reasoning = self._reasoning.feed(chunk.reasoning) + self._reasoning.end()
        for place, call in enumerate(chunk.tool_calls):
            self._scrub_call(chunk, place, call)
        return [*self.end(), chunk]

    def _rest(self, scrubber: Scrubber, kind: str) -> list[Chunk]:
        rest = scrubber.end()
        if not rest:
            return []
        return [Chunk.of(rest, index=self._index) if kind == "text" else Chunk.of(reasoning=rest, index=self._index)]

    def _scrub_call(self, chunk: Chunk, place: int, call: Json) -> None:
        arguments = (call.get("function") or {}).get("arguments")
        if not arguments:
            return
        number = call.get("index", place)
        if number not in self._calls:
            self._calls[number] = Scrubber(self._matchers, self._hold)
        scrubbed = self._calls[number].feed(arguments)
        if scrubbed != arguments:
            chunk.data["choices"][0]["delta"]["tool_calls"][place]["function"]["arguments"] = scrubbed


def _call_chunk(index: int, number: int, arguments: str) -> Chunk:
    delta = {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}
    return Chunk({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})


def _texts(body: Json) -> Iterator[tuple[Any, Any]]:
    """Every text that the request tells the model, as the object that holds it and its key there."""
    for key in ("prompt", "suffix"):
        yield from _text_at(body, key)
    for message in body.get("messages", ()):
        for key in ("content", "reasoning_content"):
            yield from _text_at(message, key)
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict) and isinstance(call.get("function"), dict):
                yield from _text_at(call["function"], "arguments")


def _text_at(holder: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    value = holder.get(key) if isinstance(holder, dict) else holder[key]
    if isinstance(value, str):
        yield holder, key
    elif isinstance(value, list):
        for place, part in enumerate(value):
            if isinstance(part, str):
                yield value, place
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part, "text"


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() else f"\\{char}" for char in text)
