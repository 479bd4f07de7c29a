"""The agent that asks several models at once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llama_smart_proxy import Agent, BadRequest, ChatRequest, ChunkStream, Context, Options
from llama_smart_proxy.agents.parallel.merging import has_question
from llama_smart_proxy.agents.parallel.session import Session

MOST = 16
"""Most answers to one question."""


def _names(value: Any) -> Any:
    """`a,b` as two names."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class Parallel(Agent):
    """Asks several models, or the same one several times, and makes one answer of theirs: `strategy=synthesize` has a
    model merge them, `judge` has them grade each other, `vote` takes what most say, `show` shows all.

    Each gets the whole conversation, without tools. One that fails does not spoil the answer. Models that cannot be
    loaded together are asked one after the other, each of them once; only for grades they may have to come back.
    """

    command = "parallel"
    per_call = frozenset({"models", "n", "strategy", "chairman", "progress", "quorum"})

    class Config(Options):
        """What may stand behind `parallel` in the configuration."""

        models: Annotated[list[str], BeforeValidator(_names)] = Field(
            default=[],
            max_length=MOST,
            description="The models to ask, with commas between; by default the chat's own.",
        )
        n: int | None = Field(
            default=None, ge=1, le=MOST, description="How often, if it is one model; by default the chat's own 3 times."
        )
        strategy: Literal["synthesize", "judge", "vote", "show"] = Field(
            default="synthesize", description="What becomes of the answers: synthesize, judge, vote or show."
        )
        chairman: str | None = Field(default=None, description="The model that merges; by default the chat's own.")
        progress: bool = Field(default=True, description="Show what is going on, as the answer's thoughts.")
        temperature: float = Field(default=0.8, ge=0, description="For answers of one model, if the request sets none.")
        quorum: int = Field(default=1, ge=1, description="How many have to answer, or the request fails.")
        member_s: float = Field(
            default=300.0, gt=0, description="Seconds that each may take, with loading, for an answer and for a grade."
        )

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if not has_question(request):
            raise BadRequest("/parallel needs a question after it")
        return Session(request.copy(), ctx, _models(request, ctx), _as_choices(request, ctx)).answer()


def _models(request: ChatRequest, ctx: Context) -> list[str]:
    """The model of each who is to be asked."""
    config: Parallel.Config = ctx.config
    if len(config.models) > 1:
        return config.models
    times = config.n or (1 if config.models else 3)
    if _as_choices(request, ctx):
        times = request.body["n"]
        if times > MOST:
            raise BadRequest(f"/parallel gives {MOST} answers at most", param="n")
    return [*(config.models or [request.model])] * times


def _as_choices(request: ChatRequest, ctx: Context) -> bool:
    """Whether the client can have all answers side by side: `n` in OpenAI's API."""
    n = request.body.get("n")
    return ctx.config.strategy == "show" and ctx.api.endswith("/completions") and isinstance(n, int) and n > 1
