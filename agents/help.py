"""The agent `help`, which lists the commands."""

from __future__ import annotations

from collections.abc import Sequence

from llama_smart_proxy import About, Agent, ChatRequest, ChunkStream, Context, say


class Help(Agent):
    """Lists the commands and their options; `/help NAME` describes one. No model is used."""

    command = "help"

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        commands = [*(about for about in ctx.agents if about.command is not None), _OF_THE_PROXY]
        requested = (request.last_user_text.split(maxsplit=1) or [""])[0].removeprefix("/")
        one = [about for about in commands if about.command == requested]
        lines = _entries(one) if one else _overview(commands, ctx.agents)
        if requested and not one:
            lines = [f"There is no command `/{requested[:40]}`.", "", *lines]
        return say("\n".join(lines).translate(_BRACKETS))


_OF_THE_PROXY = About("agents", "agents", "Lists the agents that run in this chat.", {}, running=False)
_BRACKETS = str.maketrans("<>", "[]")
"""Chat UIs interpret tags in an agent's description as markup: Open WebUI 0.12 starts a thought at `<think>`, even in
code."""


def _overview(commands: Sequence[About], agents: Sequence[About]) -> list[str]:
    lines = ["**Commands**, at the beginning of a message:", "", *_entries(commands)]
    lines += ["", *_usage(commands)]
    always = [about for about in agents if about.command is None and about.running]
    if always:
        lines += ["", "**Always on**, without a command:", ""]
        lines += [f"- {about.name}: {about.description}" for about in always]
    return lines


def _entries(commands: Sequence[About]) -> list[str]:
    """One Markdown item per command, with its options below it."""
    lines = []
    for about in commands:
        on = " *(on in this chat)*" if about.running and about.command != Help.command else ""
        lines.append(f"- `/{about.command}` {about.description}{on}")
        lines += [f"    - `{name}=` {text}" for name, text in about.options.items()]
    return lines


def _usage(commands: Sequence[About]) -> list[str]:
    """How to write commands, with an existing one as the example."""
    others = [about for about in commands if about.command != Help.command and about is not _OF_THE_PROXY]
    if not others:
        return ["No agent with a command is enabled."]
    with_option = next((about for about in others if about.options), others[0])
    name = with_option.command
    option = f" {next(iter(with_option.options))}=..." if with_option.options else ""
    return [
        f"Write your message after the command: `/{name}{option} Your question`. Several commands can be combined.",
        f"For the whole chat: `/{name} on` as the whole message; `/{name} off` ends it.",
    ]
