"""The agent that keeps the background prompts of chat UIs away from the user's model.

A chat UI asks for a title, tags and follow-ups with every answer: prompts of their own, at the same time as the chat.
On the user's model they queue before the next question, evict it, or overwrite what it has computed of the chat so far.
Source for how these prompts begin: Open WebUI's defaults (0.5 to 0.12), LibreChat's titles.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from agents.base import Agent, Context, Options
from proxy.chat import ChatRequest, ChunkStream

Kind = Literal["title", "tags", "follow_ups", "queries", "image_prompt", "autocomplete", "emoji"]
BEGINNINGS: dict[Kind, str] = {
    "title": r"### Task:\s+Generate a concise\b[^\n]{0,40}\btitle|"
    r"(?:Please generate|Provide) a concise, 5-word-or-less title for the conversation",
    "tags": r"### Task:\s+Generate \d+-\d+ broad tags",
    "follow_ups": r"### Task:\s+Suggest \d+-\d+ relevant follow-up",
    "queries": r"### Task:\s+Analyze the chat history to determine the necessity of generating",
    "image_prompt": r"### Task:\s+Generate a detailed prompt for an?m? image generation",
    "autocomplete": r"### Task:\s+You are an autocompletion system",
    "emoji": r"Your task is to reflect the speaker's likely facial expression",
}
"""How each kind of prompt begins. Open WebUI's prompt for a question over documents begins with `### Task:` as well,
and is the user's own."""


class Shield(Agent):
    """Sends the background prompts of chat UIs (titles, tags, follow-ups, search queries, autocompletion) to a small
    model, or to a slot of their own, so that they neither evict the user's model nor spoil its cache.

    A prompt is recognised by how the request begins and by being alone in it. The answer is relayed untouched.
    """

    class Config(Options):
        """What may stand behind `shield` in the configuration."""

        model: str | None = Field(
            default=None, description="A small model for them, best a pinned one; used if it fits beside the user's."
        )
        slot: int | None = Field(
            default=None,
            ge=0,
            description="Else the slot of llama-server that they go to, best 0: chats get the last one first. The "
            "model needs parallel >= 2.",
        )
        kinds: list[Kind] = Field(default=list(BEGINNINGS), description="Which of them; by default all.")
        patterns: list[str] = Field(default=[], description="Regular expressions for the beginnings of further ones.")
        max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of their answers.")

        @field_validator("patterns")
        @classmethod
        def _compile(cls, patterns: list[str]) -> list[str]:
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as exc:
                    raise ValueError(f"{pattern!r} is no regular expression: {exc}") from None
            return patterns

    def __init__(self, config: Shield.Config) -> None:
        super().__init__(config)
        if config.model is None and config.slot is None:
            raise ValueError("shield needs a model or a slot")

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        config: Shield.Config = ctx.config
        if not is_background(request, config):
            return None
        if config.max_tokens is not None:
            _limit(request, config.max_tokens)
        if config.model is not None and await self._fits(config.model, request.model, ctx):
            request.model = config.model
        elif config.slot is not None and ctx.server == "llama.cpp":
            request.body["id_slot"] = config.slot
        return None

    async def _fits(self, small: str, asked: str, ctx: Context) -> bool:
        return small != asked and len(await ctx.fitting([asked, small])) == 1


def is_background(request: ChatRequest, config: Shield.Config) -> bool:
    """Whether it is a chat UI that asks, on its own behalf."""
    if any(message.get("role") not in ("system", "developer", "user") for message in request.messages):
        return False
    beginnings = [BEGINNINGS[kind] for kind in config.kinds] + config.patterns
    return any(re.match(beginning, request.last_user_text.lstrip()) for beginning in beginnings)


def _limit(request: ChatRequest, most: int) -> None:
    given = [request.body[name] for name in ("max_tokens", "max_completion_tokens") if request.body.get(name)]
    if not any(isinstance(limit, int) and limit <= most for limit in given):
        for name in ("max_tokens", "max_completion_tokens"):
            request.body.pop(name, None)
        request.body["max_tokens"] = most
