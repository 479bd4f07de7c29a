"""A template to copy: an agent that marks the question, and the answer on both sides.

Copy this file into a folder named in `agents_dirs`, rename it, and add that name to `agents:`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import Field

from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Options


class Example(Agent):
    """Adds a mark after your question, and one before and one after the answer."""

    # Called by `/example` at the beginning of a message. Without a command, an agent runs in every chat.
    command = "example"
    # Options that a command may set: `/example mark=* Hello`.
    per_call = frozenset({"mark"})

    # Options in the configuration: `agents: [{example: {prefix: "> "}}]`. Unknown keys are rejected there.
    class Config(Options):
        """The options of `example` in the configuration."""

        mark: str = Field(default="#", min_length=1, description="The mark after the question.")
        prefix: str = Field(default="# ", description="Text before the answer.")
        suffix: str = Field(default=" #", description="Text after the answer.")

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        # Works for every API: the last user message of a chat, or the prompt of a text completion.
        request.last_user_text = f"{request.last_user_text} {ctx.config.mark}"
        # None: continue with the next agent, then the model. `return say("...")` would answer instead of them.
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        # `self` serves all requests concurrently: keep the state of a request in local variables, and pass values from
        # one hook to another in `ctx.state`.
        begun: set[int] = set()  # with `n` > 1 several answers are interleaved, each with its `index`
        # One iteration per chunk, as it arrives; the same for requests without `stream`.
        async for chunk in stream:
            if chunk.text and chunk.index not in begun:
                begun.add(chunk.index)
                yield Chunk.of(ctx.config.prefix, index=chunk.index)  # an inserted chunk
            yield chunk  # an unchanged chunk is sent as its original bytes
        # After the last text: the proxy delays the end of the answer until this generator returns.
        for index in begun:
            yield Chunk.of(ctx.config.suffix, index=index)
