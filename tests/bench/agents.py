"""The agents that the proxy runs for the rows of the table that have any, and the models that have them."""

from __future__ import annotations

from pathlib import Path

MARK = "!"
"""What the rewriter adds to each text: how to tell that it ran."""
HEAD = """
from collections.abc import AsyncIterator
try:
    from llama_smart_proxy.agents.base import Agent, Context
    from llama_smart_proxy.proxy.chat import Chunk, ChunkStream
except ImportError:
    from agents.base import Agent, Context
    from proxy.chat import Chunk, ChunkStream
"""
"""A checkout to compare with may be older than the one package that holds all modules."""
WHOLE = """
class Whole{number}(Agent):
    command = "whole{number}"

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        async for chunk in stream:
            yield chunk
"""
EACH = """
class Each(Agent):
    command = "each"

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        return chunk
"""
REWRITER = f"""
class Rewriter(Agent):
    command = "rewriter"

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        if chunk.text:
            chunk.text += "{MARK}"
        return chunk
"""
AGENTS = {"whole1": WHOLE.format(number=1), "each": EACH, "whole2": WHOLE.format(number=2), "rewriter": REWRITER}
"""By name. Each has a command, so that it does not run for models that do not name it."""
CHAINS = {"m-1-agent": ["whole1"], "m-3-agents": ["whole1", "each", "whole2"], "m-rewritten": ["rewriter"]}
"""The agents of each virtual model."""


def write(folder: Path) -> None:
    """Write them all into `folder`, which is made."""
    folder.mkdir()
    for name, source in AGENTS.items():
        (folder / f"{name}.py").write_text(HEAD + source)
