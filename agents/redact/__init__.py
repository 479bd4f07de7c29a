"""The agent `redact`, which removes private data from requests and answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, model_validator

from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Json, Options
from llama_smart_proxy.agents.redact.matching import (
    HOLD,
    Matcher,
    Naming,
    Scrubber,
    Steps,
    by_replacement,
    compiled,
    result_of,
    scrubbing,
    scrubbing_json,
)
from llama_smart_proxy.agents.redact.presets import PRESETS

T = TypeVar("T")

LONG = 8 * 1024
"""Characters that are searched in a few milliseconds."""
_NO_TEXT = {"type", "id", "tool_use_id", "cache_control", "image_url", "input_audio", "file", "multimodal_data", "data"}
_NO_TEXT |= {"media_type", "signature", "encrypted_content", "encrypted_index", "_extensions"}
"""Fields of content parts that are not searched: names, and data of other media."""


class Pattern(Options):
    """A custom pattern."""

    name: str = Field(description="Replaces a match, in brackets.")
    pattern: str = Field(min_length=1, description="A regular expression (of Python's package `regex`).")
    replacement: str | None = Field(default=None, description="Replaces a match instead of the name.")


class Redact(Agent):
    """Replaces matches of patterns (e-mail addresses, keys, card numbers, ...) in requests, and live in answers.

    Only text that may be the beginning of a match is delayed. Not covered: images, tool descriptions, prompts given as
    tokens, and endpoints without agents.
    """

    class Config(Options):
        """The options of `redact` in the configuration."""

        patterns: list[str | Pattern] = Field(
            default=["email", "credit_card", "iban", "api_key", "jwt", "private_key"],
            min_length=1,
            description=f"Built-in patterns ({', '.join(sorted(PRESETS))}), and `{{name, pattern, replacement}}`.",
        )
        where: list[Literal["request", "response"]] = Field(
            default=["request", "response"], min_length=1, description="Which texts to search."
        )
        restore: bool = Field(
            default=False,
            description="Number the matches in the request, and restore them in the answer: the model does not get "
            "them, but the user does.",
        )
        hold: int = Field(
            default=HOLD,
            ge=16,
            description="Maximum number of characters of an answer that are delayed because they may become a match.",
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
                    known = ", ".join(sorted(PRESETS))
                    hint = "a custom one is written {name: ticket, pattern: 'T-[0-9]+'}"
                    raise ValueError(f"there is no pattern {given!r}; known ones: {known}; {hint}")
            return self

        @property
        def matchers(self) -> list[Matcher]:
            """The compiled patterns."""
            return self._matchers

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if "request" in ctx.config.where:
            found = ctx.state["found"] = Found(ctx.config)
            texts = list(_texts(request.body))
            await _done(found.take_out(texts), sum(len(holder[key]) for holder, key in texts), ctx)
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        matchers = list(ctx.config.matchers) if "response" in ctx.config.where else []
        naming = by_replacement
        found: Found | None = ctx.state.get("found")
        if found is not None and found.originals:
            matchers = [found.placeholders(), *matchers]
            naming = found.put_back
        answers: dict[int, _Answer] = {}
        async for chunk in stream:
            if matchers and (chunk.delta or chunk.finish_reason):
                if chunk.index not in answers:
                    answers[chunk.index] = _Answer(chunk.index, matchers, ctx, naming)
                for passed in await answers[chunk.index].take(chunk):
                    yield passed
            else:
                yield chunk
        for answer in answers.values():
            for passed in await answer.end():
                yield passed


class Found:
    """The matches removed from one request; equal values get the same number. `originals` maps placeholders to values,
    if they are restored in the answer."""

    def __init__(self, config: Redact.Config) -> None:
        self._matchers = config.matchers
        self._naming = self._name if config.restore else by_replacement
        self._names: dict[tuple[str, str], str] = {}
        self._count: dict[str, int] = {}
        self.originals: dict[str, str] = {}

    def take_out(self, texts: Iterable[tuple[Any, Any]]) -> Steps[None]:
        """Remove the matches from these texts, each given as its container and its key there."""
        for holder, key in texts:
            scrub = scrubbing_json if key == "arguments" else scrubbing
            holder[key] = yield from scrub(self._matchers, holder[key], self._naming)
            yield

    def placeholders(self) -> Matcher:
        """A matcher for the placeholders. Their number is not limited, so its pattern does not list them."""
        names = "|".join(sorted(_escaped(name) for name in self._count))
        return replace(
            compiled("", rf"\[(?:{names}) \d{{1,9}}\]", ""),
            check=lambda text: len(text) if text in self.originals else 0,
        )

    def put_back(self, matcher: Matcher, found: str) -> str:
        """The original value of a placeholder; for a match of another pattern, its replacement."""
        return matcher.replacement if matcher.name else self.originals[found]

    def _name(self, matcher: Matcher, value: str) -> str:
        known = self._names.get((matcher.name, value))
        if known is None:
            number = self._count[matcher.name] = self._count.get(matcher.name, 0) + 1
            known = self._names[matcher.name, value] = f"[{matcher.name} {number}]"
            self.originals[known] = value
        return known


class _Answer:
    """One answer. Its text and reasoning are redacted while streaming; the arguments of tool calls when they are
    complete, as they are JSON, in which text is escaped."""

    def __init__(self, index: int, matchers: list[Matcher], ctx: Context, naming: Naming) -> None:
        self._index = index
        self._matchers = matchers
        self._ctx = ctx
        self._hold: int = ctx.config.hold
        self._naming = naming
        self._kind = ""  # of the current text: `content`, or the server's field name for reasoning
        self._scrubber = Scrubber(matchers, self._hold, naming)
        self._calls: list[Chunk] = []

    async def take(self, chunk: Chunk) -> list[Chunk]:
        """The chunks to send for `chunk`, in the original order, and before the end."""
        chunks = []
        for part in _parts(chunk):
            chunks += await self._take(part)
        return chunks

    async def end(self) -> list[Chunk]:
        """The chunks that are still delayed."""
        return [*await self._rest(), *await self._called()]

    async def _take(self, chunk: Chunk) -> list[Chunk]:
        text = chunk.reasoning or chunk.text
        chunks = await self._begin(_kind(chunk)) if text else []
        if text:
            held = self._scrubber.holds
            if self._scrubber.held + len(text) > LONG:
                clean = await self._ctx.aside(self._scrubber.feeding(text))
            else:
                clean = self._scrubber.feed(text)
            if chunk.finish_reason:
                clean += await self._ended()
            if held or clean != text:
                if chunk.reasoning:
                    chunk.reasoning = clean
                else:
                    chunk.text = clean
                if not clean and not chunk.finish_reason and "role" not in chunk.delta:
                    return chunks
        if chunk.tool_calls:
            chunks += await self._rest()
            self._calls.append(chunk)
        if chunk.finish_reason:
            chunks += await self.end()
        return chunks if chunk.tool_calls else [*chunks, chunk]

    async def _begin(self, kind: str) -> list[Chunk]:
        """The chunks delayed until text of another kind begins."""
        if self._kind == kind and not self._calls:
            return []
        rest = await (self._called() if self._kind == kind else self.end())
        self._kind = kind
        return rest

    async def _ended(self) -> str:
        return await _done(self._scrubber.ending(), self._scrubber.held, self._ctx)

    async def _rest(self) -> list[Chunk]:
        rest, self._scrubber = await self._ended(), Scrubber(self._matchers, self._hold, self._naming)
        if not rest:
            return []
        return [Chunk({"choices": [{"index": self._index, "delta": {self._kind: rest}, "finish_reason": None}]})]

    async def _called(self) -> list[Chunk]:
        """The delayed tool calls. A modified one has all of its arguments in its first chunk."""
        chunks, self._calls = self._calls, []
        whole: dict[int, str] = {}
        for number, function in (pair for chunk in chunks for pair in _functions(chunk.seen)):
            whole[number] = whole.get(number, "") + (function.get("arguments") or "")
        clean = {
            number: await _done(scrubbing_json(self._matchers, text, self._naming), len(text), self._ctx)
            for number, text in whole.items()
        }
        changed = {number for number, text in clean.items() if text != whole[number]}
        for chunk in chunks:
            if any(number in changed for number, _ in _functions(chunk.seen)):
                for number, function in _functions(chunk.data):
                    if number in changed:
                        function["arguments"] = clean.pop(number, "")
        return chunks


async def _done(steps: Steps[T], length: int, ctx: Context) -> T:
    """The result of `steps`, which search a text of this `length`: a long one aside, as other requests would wait."""
    return await ctx.aside(steps) if length > LONG else result_of(steps)


def _parts(chunk: Chunk) -> list[Chunk]:
    """The chunk, or several if it has text of several kinds."""
    chunks = []
    if chunk.reasoning and (chunk.text or chunk.tool_calls):
        chunks.append(Chunk.of(reasoning=chunk.reasoning, index=chunk.index))
        chunk.reasoning = ""
    if chunk.text and chunk.tool_calls:
        chunks.append(Chunk.of(chunk.text, index=chunk.index))
        chunk.text = ""
    return [*chunks, chunk]


def _kind(chunk: Chunk) -> str:
    """The field name of the chunk's text."""
    if not chunk.reasoning:
        return "content"
    return "reasoning_content" if chunk.delta.get("reasoning_content") else "reasoning"


def _functions(data: Json) -> Iterator[tuple[int, Json]]:
    """The parts of tool calls in a chunk, each with the number of its call."""
    for position, call in enumerate(data["choices"][0]["delta"].get("tool_calls") or ()):
        if isinstance(call.get("function"), dict):
            yield call.get("index", position), call["function"]


def _texts(body: Json) -> Iterator[tuple[Any, Any]]:
    """All texts of the request that the model gets, each as its container and its key there."""
    for key in ("prompt", "suffix"):
        yield from _text_at(body, key)
    for message in body.get("messages", ()):
        for key in ("content", "reasoning_content", "reasoning"):
            yield from _text_at(message, key)
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict) and isinstance(call.get("function"), dict):
                yield from _text_at(call["function"], "arguments")


def _text_at(holder: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    """The texts at `holder[key]`, also in content parts of any type, and in llama-server's prompts: nested lists, and
    objects."""
    value = holder.get(key) if isinstance(holder, dict) else holder[key]
    if isinstance(value, str):
        yield holder, key
    elif isinstance(value, list):
        for position in range(len(value)):
            yield from _text_at(value, position)
    elif isinstance(value, dict):
        for name in [name for name in value if name not in _NO_TEXT]:
            yield from _text_at(value, name)


def _escaped(text: str) -> str:
    return "".join(char if char.isalnum() else f"\\{char}" for char in text)
