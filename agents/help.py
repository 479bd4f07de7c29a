"""The agent that tells which commands there are."""

from __future__ import annotations

from agents.base import Agent, Context
from proxy.chat import ChatRequest, ChunkStream, say


class Help(Agent):
    """Lists the commands and what they do. No model is asked."""

    command = "help"

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        lines = ["Commands, at the beginning of a message:", ""]
        for about in ctx.agents:
            if about.command is not None:
                lines.append(f"- `/{about.command}` {about.description}")
                lines += [f"    - `{name}=` {words}" for name, words in about.options.items()]
        lines += ["- `/agents` Tells which agents run in this chat.", ""]
        lines.append("With `on` or `off` and nothing else behind it, a command is for the whole chat: `/NAME on`.")
        always = [f"{about.name} ({about.description})" for about in ctx.agents if about.command is None]
        if always:
            lines += ["", f"Without a command: {', '.join(always)}"]
        return say("\n".join(lines))
