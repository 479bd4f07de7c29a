"""The agent `parallel`, which sends a question to several models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llama_smart_proxy import Agent, BadRequest, ChatRequest, ChunkStream, Context, Options
from llama_smart_proxy.agents.parallel.merging import has_question
from llama_smart_proxy.agents.parallel.session import Session

MAX_ANSWERS = 16
"""Maximum number of answers to one question."""


def _names(value: Any) -> Any:
    """Splits `a,b` into names; other values are returned unchanged."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class Parallel(Agent):
    """Sends the question to several models, or several times to one, and combines the answers: with
    `strategy=synthesize` a model merges them, `judge` selects the best by mutual grades, `vote` the most frequent one,
    `show` shows all.

    Each model gets the whole conversation, without tools. The failure of some models does not fail the answer. Models
    that cannot be loaded together are used one after the other; each is loaded once, and again only for grading.
    """

    command = "parallel"
    per_call = frozenset({"models", "n", "strategy", "chairman", "progress", "quorum"})

    class Config(Options):
        """The options of `parallel` in the configuration."""

        models: Annotated[list[str], BeforeValidator(_names)] = Field(
            default=[],
            max_length=MAX_ANSWERS,
            description="The models to use, separated by commas; by default the chat's own.",
        )
        n: int | None = Field(
            default=None, ge=1, le=MAX_ANSWERS, description="Number of answers of a single model; 3 for the chat's own."
        )
        strategy: Literal["synthesize", "judge", "vote", "show"] = Field(
            default="synthesize", description="How to combine the answers: synthesize, judge, vote or show."
        )
        chairman: str | None = Field(default=None, description="The model that merges; by default the chat's own.")
        progress: bool = Field(default=True, description="Show the progress as reasoning of the answer.")
        temperature: float = Field(
            default=0.8, ge=0, description="For several answers of one model, if the request sets none."
        )
        quorum: int = Field(default=1, ge=1, description="Minimum number of answers, or the request fails.")
        member_s: float = Field(
            default=300.0,
            gt=0,
            description="Time limit in seconds per model, including loading, for an answer and for a grade.",
        )

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if not has_question(request):
            raise BadRequest("/parallel requires a question after it")
        return Session(request.copy(), ctx, _models(request, ctx), _as_choices(request, ctx)).answer()


def _models(request: ChatRequest, ctx: Context) -> list[str]:
    """The model of each answer."""
    config: Parallel.Config = ctx.config
    if len(config.models) > 1:
        return config.models
    times = config.n or (1 if config.models else 3)
    if _as_choices(request, ctx):
        times = request.body["n"]
        if times > MAX_ANSWERS:
            raise BadRequest(f"/parallel supports at most {MAX_ANSWERS} answers", param="n")
    return [*(config.models or [request.model])] * times


def _as_choices(request: ChatRequest, ctx: Context) -> bool:
    """Whether to return the answers as separate choices: `n` in OpenAI's API."""
    n = request.body.get("n")
    return ctx.config.strategy == "show" and ctx.api.endswith("/completions") and isinstance(n, int) and n > 1
