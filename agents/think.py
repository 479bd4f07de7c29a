"""The agent `think`, which separates a model's reasoning from its answer, or merges them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

from pydantic import Field

from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Json, Options, first_text_part

MOST_SPACE = 1000
"""Characters of white space that are delayed: what may be in front of a tag is looked through with every chunk."""


class Think(Agent):
    """Converts `<think>` text at the beginning of an answer to reasoning (`reasoning_content`, Ollama's `thinking`); or
    with `to: text`, reasoning to `<think>` text; live, also if a tag is split across chunks.

    Only thoughts before the answer are converted: a tag further on is part of the answer.
    """

    class Config(Options):
        """The options of `think` in the configuration."""

        to: Literal["reasoning", "text"] = Field(
            default="reasoning", description="The form of thoughts for clients: reasoning, or text between tags."
        )
        tags: list[tuple[str, str]] = Field(
            default=[("<think>", "</think>"), ("<thinking>", "</thinking>")],
            min_length=1,
            description="Pairs of tags around thoughts; with `to: text` the first pair is output.",
        )
        starts_inside: bool = Field(
            default=False, description="Answers begin within a thought: the chat template contains the opening tag."
        )
        keep_history: bool = Field(
            default=False, description="Do not convert thoughts in the answers of the chat history."
        )

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if ctx.config.to == "reasoning" and not ctx.config.keep_history:
            for message in request.messages:
                if message.get("role") == "assistant":
                    _separate_thought(message, ctx.config.tags)
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        streams: dict[int, _Reasoning | _Text] = {}  # with n > 1 several answers are interleaved
        make = _Reasoning if ctx.config.to == "reasoning" else _Text
        async for chunk in stream:
            if chunk.index not in streams:
                streams[chunk.index] = make(ctx.config, chunk.index)
            for passed in streams[chunk.index].take(chunk):
                yield passed
        for rest in streams.values():
            for passed in rest.end():
                yield passed


class _Reasoning:
    """One answer whose text may begin with a thought."""

    def __init__(self, config: Think.Config, index: int) -> None:
        self._pairs = config.tags
        self._index = index
        self._held = ""
        self._waiting: list[Chunk] = []  # the chunks of `_held`, while it is undecided
        self._starts_inside = config.starts_inside
        self._close: tuple[str, ...] = ()  # the tags that end the thought; set within one
        self._blank = False  # at the beginning of a thought, or after it: white space is dropped
        self._done = False  # the answer itself has begun

    def take(self, chunk: Chunk) -> list[Chunk]:
        if self._done and not self._blank:
            return [chunk]
        if chunk.reasoning:
            self._starts_inside = False  # the server separates thoughts itself
        if not chunk.text:
            return [*self.end(), chunk] if chunk.finish_reason or chunk.tool_calls else [chunk]
        self._held += chunk.text
        self._waiting.append(chunk)
        text, thought = self._read()
        if not (self._close or self._done):
            return self.end() if chunk.finish_reason else []
        waiting, self._waiting = self._waiting, []
        if not thought and text == "".join(one.text for one in waiting):
            return waiting  # unchanged
        if chunk.finish_reason:
            thought, self._held = thought + self._held, ""
        chunk.text = text
        chunks = [Chunk.of(reasoning=thought, index=self._index)] if thought else []
        return [*chunks, chunk] if text or chunk.finish_reason or chunk.reasoning or chunk.delta.get("role") else chunks

    def end(self) -> list[Chunk]:
        """The rest: an incomplete tag is text, or part of the thought."""
        rest, self._held = self._held, ""
        waiting, self._waiting = self._waiting, []
        if waiting and not self._starts_inside:
            self._done = True
            return waiting
        if waiting and waiting[-1].finish_reason:
            waiting[-1].text = ""
            return [Chunk.of(reasoning=rest, index=self._index), waiting[-1]]
        return [Chunk.of(reasoning=rest, index=self._index)] if rest else []

    def _read(self) -> tuple[str, str]:
        """The text and the thought that are decided now, removed from `_held`."""
        if not self._close and not self._done:
            start = self._held.lstrip()
            pair = next((pair for pair in self._pairs if start.startswith(pair[0])), None)
            if pair is not None:
                self._held, self._close, self._blank = start[len(pair[0]) :], pair[1:], True
            elif len(self._held) <= MOST_SPACE and any(tag.startswith(start) for tag, _ in self._pairs):
                return "", ""  # it may become a tag
            elif self._starts_inside:
                self._close, self._blank = tuple(close for _, close in self._pairs), True
            else:
                self._done = True
        thought = self._read_thought() if self._close else ""
        if self._close:
            return "", thought
        text = self._held.lstrip() if self._blank else self._held
        self._blank = self._blank and not text
        self._held = ""
        return text, thought

    def _read_thought(self) -> str:
        if self._blank:
            self._held = self._held.lstrip()
        found = [(position, tag) for tag in self._close if (position := self._held.find(tag)) >= 0]
        if found:
            position, tag = min(found)
            thought, self._held = self._held[:position], self._held[position + len(tag) :]
            self._close, self._done, self._blank = (), True, True
            return thought.rstrip()
        keep = max(_partial_tag(self._held, tag) for tag in self._close)
        thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        space = len(thought) - len(thought.rstrip())  # it is dropped if a tag follows
        if 0 < space <= MOST_SPACE:
            thought, self._held = thought[:-space], thought[-space:] + self._held
        self._blank = self._blank and not thought
        return thought


class _Text:
    """One answer whose reasoning is converted to text between tags."""

    def __init__(self, config: Think.Config, index: int) -> None:
        self._open, self._close = config.tags[0]
        self._index = index
        self._inside = False

    def take(self, chunk: Chunk) -> list[Chunk]:
        thought, text = chunk.reasoning, chunk.text
        if not thought and not self._inside:
            return [chunk]
        output = ""
        if thought:
            output, self._inside = ("" if self._inside else f"{self._open}\n") + thought, True
        ends = bool(text or chunk.tool_calls or chunk.finish_reason)
        if self._inside and ends:
            output += f"\n{self._close}\n\n"
            self._inside = False
        if not thought and not text and output:
            return [Chunk.of(output, index=self._index), chunk]
        if thought:
            chunk.reasoning = ""
        if output:
            chunk.text = output + text
        return [chunk]

    def end(self) -> list[Chunk]:
        return [Chunk.of(f"\n{self._close}\n\n", index=self._index)] if self._inside else []


def _partial_tag(text: str, tag: str) -> int:
    """The length of the longest end of `text` that is a beginning of `tag`, but not all of it."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _separate_thought(message: Json, tags: list[tuple[str, str]]) -> None:
    """Move a leading thought of an earlier answer to its reasoning, or drop it if the message has reasoning."""
    content = message.get("content")
    holder, key = (first_text_part(content), "text") if isinstance(content, list) else (message, "content")
    if holder is None or not isinstance(holder.get(key), str):
        return
    text = holder[key].lstrip()
    for opening, closing in tags:
        if text.startswith(opening) and closing in text:
            thought, _, rest = text[len(opening) :].partition(closing)
            holder[key] = rest.lstrip()
            if isinstance(content, list) and not holder[key] and len(content) > 1:
                content.remove(holder)  # not every API accepts an empty part
            if thought.strip() and not message.get("reasoning_content"):
                message["reasoning_content"] = thought.strip()
            return
