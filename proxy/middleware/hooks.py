"""Runs the hooks of agents for one request, each within its limits. Those for its answer: `layers`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.proxy.chat import ChatRequest, ChunkStream
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, ProxyError
from llama_smart_proxy.proxy.middleware.context import AgentContext
from llama_smart_proxy.proxy.middleware.functions import offer

logger = logging.getLogger(__name__)


async def run_request_hooks(
    contexts: Sequence[AgentContext], request: ChatRequest
) -> tuple[list[AgentContext], AgentContext | None, ChunkStream | None]:
    """Run `on_request` of the agents, first to last, until one returns an answer.

    Returns the agents that passed the request on, and the agent that answered with its answer, or None and None.
    Raises: AgentError, and any `ProxyError` that an agent raises itself.
    """
    entered: list[AgentContext] = []
    left_out: set[str] = set()
    for ctx in contexts:
        if ctx.name in left_out and not ctx.active.explicit:
            continue
        ctx.active.plugin.counts.calls += 1
        answer = await _on_request(ctx, request)
        if answer is not None:
            return entered, ctx, answer
        if not ctx.failed:
            entered.append(ctx)
            left_out |= ctx.leaves_out
    return entered, None, None


async def _on_request(ctx: AgentContext, request: ChatRequest) -> ChunkStream | None:
    agent = ctx.active.loaded.agent
    functions = ctx.active.loaded.functions
    if type(agent).on_request is Agent.on_request and not functions:
        return None
    before = request.copy() if ctx.active.settings.on_error == "skip" else None
    try:
        offer(request, functions)
        ctx.timer.begin()
        try:
            answer = await agent.on_request(request, ctx)
        finally:
            ctx.timer.end()
        if ctx.timer.was_cancelled():
            raise ctx.timer.hung()
        _check_request(ctx, request)
        if answer is not None and not hasattr(answer, "__anext__"):
            raise AgentError(ctx.name, f"returned a {type(answer).__name__} from on_request, which is not a stream")
        return answer
    except BaseException as exc:
        failure = failure_of(ctx, exc)
        if before is None:
            raise failure from exc
        request.body, request.stream = before.body, before.stream
        return None


def failure_of(ctx: AgentContext, exc: BaseException) -> ProxyError:
    """The error to report for an exception in an agent, which is counted and logged. Raises: `exc` itself if it is the
    cancellation of the request, and not a failure."""
    hung = ctx.timer.was_cancelled()
    if isinstance(exc, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise exc
    if hung:  # replaces any exception that the cancellation caused in the agent
        exc = ctx.timer.hung()
    ctx.failed = True
    ctx.active.plugin.counts.failures += not isinstance(exc, BadRequest)  # the client's fault
    if isinstance(exc, ProxyError):
        logger.warning("agent %s: %s", ctx.name, exc)
        return exc
    logger.error("agent %s failed", ctx.name, exc_info=exc)
    return AgentError(ctx.name, f"failed: {type(exc).__name__}")


def _check_request(ctx: AgentContext, request: ChatRequest) -> None:
    body = request.body
    messages = body.get("messages", []) if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise AgentError(ctx.name, "changed the messages to something other than a list of objects")
    if not isinstance(body.get("model"), str) or ("messages" not in body and "prompt" not in body):
        raise AgentError(ctx.name, "left a request without model, or without messages or prompt")
    if not messages and "messages" in body:
        raise AgentError(ctx.name, "left a request without messages")
