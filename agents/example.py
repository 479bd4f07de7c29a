"""The template to copy: an agent that marks the question, and the answer on both sides.

Copy this file into a folder named in `agents_dirs`, give it a name of its own, and name that in `agents:`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import Field

from llama_smart_proxy import Agent, ChatRequest, Chunk, ChunkStream, Context, Options


class Example(Agent):
    """Adds a mark after your question, and one before and one after the answer."""

    # Called by `/example` at the beginning of a message. Without a command, an agent runs in every chat.
    command = "example"
    # What a call may set: `/example mark=* Hello`.
    per_call = frozenset({"mark"})

    # What the configuration may set: `agents: [{example: {prefix: "> "}}]`. Unknown keys are refused there.
    class Config(Options):
        """What may stand behind `example` in the configuration."""

        mark: str = Field(default="#", min_length=1, description="The mark behind the question.")
        prefix: str = Field(default="# ", description="What stands before the answer.")
        suffix: str = Field(default=" #", description="What stands behind the answer.")

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        # The same for every API: a chat's last user message, or the prompt of a text.
        request.last_user_text = f"{request.last_user_text} {ctx.config.mark}"
        # None: go on to the next agent, and to the model. `return say("...")` would be the answer instead.
        return None

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        # Nothing about a request is kept on `self`, which serves all of them at once: it goes into variables here, and
        # what one hook leaves for the other into `ctx.state`.
        begun: set[int] = set()  # with `n` > 1 several answers come interleaved, each with its `index`
        # One turn for each piece of the answer, as it arrives. Without `stream` in the request it is all the same.
        async for chunk in stream:
            if chunk.text and chunk.index not in begun:
                begun.add(chunk.index)
                yield Chunk.of(ctx.config.prefix, index=chunk.index)  # a chunk of our own
            yield chunk  # one that is not changed leaves as the very bytes it came as
        # Behind the last piece of text: the proxy holds back the end of the answer until here.
        for index in begun:
            yield Chunk.of(ctx.config.suffix, index=index)
