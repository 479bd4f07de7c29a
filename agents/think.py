"""The agent that keeps a model's thoughts apart from its answer, in the form that the client understands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

from pydantic import Field

from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Json, Options, first_text_part


class Think(Agent):
    """Turns `<think>` text at the beginning of an answer into reasoning (`reasoning_content`, Ollama's `thinking`), or,
    with `to: text`, reasoning into `<think>` text; live, also where a tag comes in two pieces.

    Only thoughts in front of the answer count: a tag further on is part of the answer.
    """

    class Config(Options):
        """What may stand behind `think` in the configuration."""

        to: Literal["reasoning", "text"] = Field(
            default="reasoning", description="How clients get thoughts: as reasoning, or as text between tags."
        )
        tags: list[tuple[str, str]] = Field(
            default=[("<think>", "</think>"), ("<thinking>", "</thinking>")],
            min_length=1,
            description="Pairs of tags around thoughts; with `to: text` the first pair is written.",
        )
        starts_inside: bool = Field(
            default=False, description="Answers begin within a thought: the model's template has opened it."
        )
        keep_history: bool = Field(
            default=False, description="Leave thoughts in earlier answers where they are; else they are set apart, too."
        )

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if ctx.config.to == "reasoning" and not ctx.config.keep_history:
            for message in request.messages:
                if message.get("role") == "assistant":
                    _set_apart(message, ctx.config.tags)
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        streams: dict[int, _Reasoning | _Text] = {}  # with n > 1 several answers come interleaved
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
        self._waiting: list[Chunk] = []  # those that `_held` is of, while it is not known what it is
        self._starts_inside = config.starts_inside
        self._close: tuple[str, ...] = ()  # what ends the thought; set within one
        self._blank = False  # at the beginning of a thought, or behind it: white space is dropped
        self._done = False  # the answer itself has begun

    def take(self, chunk: Chunk) -> list[Chunk]:
        if self._done and not self._blank:
            return [chunk]
        if chunk.reasoning:
            self._starts_inside = False  # the server knows where thoughts end
        if not chunk.text:
            return [*self.end(), chunk] if chunk.finish_reason or chunk.tool_calls else [chunk]
        self._held += chunk.text
        self._waiting.append(chunk)
        text, thought = self._read()
        if not (self._close or self._done):
            return self.end() if chunk.finish_reason else []
        waiting, self._waiting = self._waiting, []
        if not thought and text == "".join(one.text for one in waiting):
            return waiting  # as they came
        if chunk.finish_reason:
            thought, self._held = thought + self._held, ""
        chunk.text = text
        made = [Chunk.of(reasoning=thought, index=self._index)] if thought else []
        return [*made, chunk] if text or chunk.finish_reason or chunk.reasoning or chunk.delta.get("role") else made

    def end(self) -> list[Chunk]:
        """What is still held: an unfinished tag is text, or part of the thought."""
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
        """The text and the thought that can leave now."""
        if not self._close and not self._done:
            start = self._held.lstrip()
            pair = next((pair for pair in self._pairs if start.startswith(pair[0])), None)
            if pair is not None:
                self._held, self._close, self._blank = start[len(pair[0]) :], pair[1:], True
            elif any(tag.startswith(start) for tag, _ in self._pairs):
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
        found = [(place, tag) for tag in self._close if (place := self._held.find(tag)) >= 0]
        if found:
            place, tag = min(found)
            thought, self._held = self._held[:place], self._held[place + len(tag) :]
            self._close, self._done, self._blank = (), True, True
            return thought.rstrip()
        keep = max(_beginning_at_end(self._held, tag) for tag in self._close)
        thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        space = len(thought) - len(thought.rstrip())  # perhaps that before the tag
        if space and thought:
            thought, self._held = thought[:-space], thought[-space:] + self._held
        self._blank = self._blank and not thought
        return thought


class _Text:
    """One answer whose reasoning is to be text between tags."""

    def __init__(self, config: Think.Config, index: int) -> None:
        self._open, self._close = config.tags[0]
        self._index = index
        self._inside = False

    def take(self, chunk: Chunk) -> list[Chunk]:
        thought, text = chunk.reasoning, chunk.text
        if not thought and not self._inside:
            return [chunk]
        written = ""
        if thought:
            written, self._inside = ("" if self._inside else f"{self._open}\n") + thought, True
        ends = bool(text or chunk.tool_calls or chunk.finish_reason)
        if self._inside and ends:
            written += f"\n{self._close}\n\n"
            self._inside = False
        if not thought and not text and written:
            return [Chunk.of(written, index=self._index), chunk]
        if thought:
            chunk.reasoning = ""
        if written:
            chunk.text = written + text
        return [chunk]

    def end(self) -> list[Chunk]:
        return [Chunk.of(f"\n{self._close}\n\n", index=self._index)] if self._inside else []


def _beginning_at_end(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _set_apart(message: Json, tags: list[tuple[str, str]]) -> None:
    """Take a leading thought out of an earlier answer's text; it becomes reasoning, unless the message has some."""
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
                content.remove(holder)  # not every API takes an empty part
            if thought.strip() and not message.get("reasoning_content"):
                message["reasoning_content"] = thought.strip()
            return
