"""The agent `shield`, which keeps the background prompts of chat UIs away from the user's model.

A chat UI requests a title, tags and follow-ups with every answer, with separate prompts concurrent to the chat. On the
user's model they delay the next question, evict the model, or overwrite its prompt cache of the chat.
"""

from __future__ import annotations

import re
from typing import get_args

from pydantic import Field, field_validator

from llama_smart_proxy import (
    Agent,
    BackgroundKind,
    ChatRequest,
    ChunkStream,
    Context,
    Options,
    background_kind,
)


class Shield(Agent):
    """Sends the background prompts of chat UIs (titles, tags, follow-ups, search queries) to a small model, or to a
    slot of their own, so that they neither evict the user's model nor overwrite its cache.

    A background prompt is recognised by its beginning, in a chat without a previous answer; a user's text that quotes
    one further on is not affected. The answer is relayed unchanged. Agents with a command, configured for the model or
    switched on in the chat, do not run for background prompts, unless the operator runs them always.
    """

    class Config(Options):
        """The options of `shield` in the configuration."""

        model: str | None = Field(
            default=None,
            description="A small model for them, preferably pinned; used if it fits in memory beside the user's.",
        )
        slot: int | None = Field(
            default=None,
            ge=0,
            description="Otherwise the slot of llama-server for them, preferably 0, as chats get the last one first. "
            "Requires a model with parallel >= 2.",
        )
        kinds: list[BackgroundKind] = Field(
            default=list(get_args(BackgroundKind)), description="The kinds of prompts to handle; by default all."
        )
        patterns: list[str] = Field(
            default=[], description="Regular expressions for the beginnings of further prompts."
        )
        max_tokens: int | None = Field(default=None, ge=1, description="Maximum number of tokens of their answers.")
        no_thinking: bool = Field(default=True, description="Disable thinking for them in models on llama.cpp.")

        @field_validator("patterns")
        @classmethod
        def _compile(cls, patterns: list[str]) -> list[str]:
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as exc:
                    raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from None
            return patterns

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        config: Shield.Config = ctx.config
        if not is_background(request, config):
            return None
        ctx.leave_out(*(about.name for about in ctx.agents if about.command is not None))
        if config.max_tokens is not None:
            _limit(request, config.max_tokens)
        if config.no_thinking and ctx.server == "llama.cpp":
            _disable_thinking(request)
        if config.model is not None and await _fits(config.model, request.model, ctx):
            request.model = config.model
        elif config.slot is not None and ctx.server == "llama.cpp":
            request.body["id_slot"] = config.slot
        return None


def is_background(request: ChatRequest, config: Shield.Config) -> bool:
    """Whether the request is a background prompt of a chat UI."""
    if any(message.get("role") not in ("system", "developer", "user") for message in request.messages):
        return False
    texts = [text.lstrip() for text in (request.last_user_text, request.system) if text]
    return any(
        background_kind(text) in config.kinds or any(re.match(pattern, text) for pattern in config.patterns)
        for text in texts
    )


async def _fits(small: str, requested: str, ctx: Context) -> bool:
    """Whether both models can be loaded at the same time."""
    return small != requested and len(await ctx.fitting([requested, small])) == 1


def _limit(request: ChatRequest, max_tokens: int) -> None:
    given = [request.body[name] for name in ("max_tokens", "max_completion_tokens") if request.body.get(name)]
    if not any(isinstance(limit, int) and limit <= max_tokens for limit in given):
        for name in ("max_tokens", "max_completion_tokens"):
            request.body.pop(name, None)
        request.body["max_tokens"] = max_tokens


def _disable_thinking(request: ChatRequest) -> None:
    given = request.body.get("chat_template_kwargs") or {}
    if isinstance(given, dict) and not request.is_text:
        request.body["chat_template_kwargs"] = {**given, "enable_thinking": False}
