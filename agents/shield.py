"""The agent `shield`, which keeps the background prompts of chat UIs away from the user's model.

A chat UI requests a title, tags and follow-ups with every answer, with separate prompts concurrent to the chat. On the
user's model they delay the next question, evict the model, or overwrite its prompt cache of the chat.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from llama_smart_proxy import Agent, ChatRequest, ChunkStream, Context, Options

Kind = Literal["title", "tags", "follow_ups", "queries", "image_prompt", "autocomplete", "emoji"]
BEGINNINGS: dict[Kind, tuple[str, ...]] = {
    "title": (
        r"### Task:\s+Generate a concise, \d-\d word title\b",
        r"### Task:\s+Generate a concise title summarizing the chat",
        r"(?:Please generate|Provide) a concise, 5-word-or-less title for the conversation",
        r"Please generate a concise title \(max \d+ characters\) for a conversation",
        r"Analyze this conversation and provide:\s+1\. The detected language",
        r"Based on the chat history, give this conversation a (?:name|title)\.",
        r"Generate a concise, descriptive title for this conversation based on",
        r"You are a professional conversation summarizer\. Generate a concise title",
        r"You are an assistant skilled in conversation\. You need to summarize .{0,40} into a title",
        r"You are an AI conversation titles assistant",
        r"You are a chat thread titling assistant",
    ),
    "tags": (r"### Task:\s+Generate \d-\d broad tags",),
    "follow_ups": (
        r"### Task:\s+Suggest \d-\d relevant follow-up",
        r"### Task:\s+Predict \d-\d useful messages this user might naturally send next",
    ),
    "queries": (
        r"### Task:\s+Analyze the chat history to determine the necessity of generating",
        r"You are an AI question rephraser\b",
    ),
    "image_prompt": (r"### Task:\s+Generate a detailed prompt for a[mn]? image generation",),
    "autocomplete": (r"### Task:\s+You are an autocompletion system",),
    "emoji": (r"Your task is to reflect the speaker's likely facial expression",),
}
"""Regular expressions for the beginnings of the prompts of each kind, in the system prompt or the user's text.

Those without `### Task:` are titles of LibreChat, Chatbox, n8n, Lobe, Cherry Studio, big-AGI and Hugging Face's
chat-ui, in this order, and queries of Cherry Studio and Perplexica; the others are Open WebUI's, 0.5 to 0.12. Its
prompt for a question over documents begins with `### Task:` as well, but is a question of the user.
"""


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
        kinds: list[Kind] = Field(
            default=list(BEGINNINGS), description="The kinds of prompts to handle; by default all."
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
    beginnings = [beginning for kind in config.kinds for beginning in BEGINNINGS[kind]] + config.patterns
    return any(re.match(beginning, text) for text in texts for beginning in beginnings)


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
