"""Background prompts of chat UIs (titles, tags, follow-ups): recognised without any configuration, behind people's
requests, and of limited length.

A request is one if its system prompt or its user's text begins as one (`proxy.chat.background`), and it has neither an
earlier answer nor tools. A stream is what a person reads as it is written: it is one only if the whole template is
there, or if it is the system prompt, which no person types.
"""

from __future__ import annotations

from typing import Any

from llama_smart_proxy.backends.base import Feature, Model, Priority, UpstreamRequest
from llama_smart_proxy.backends.tasks import Task
from llama_smart_proxy.proxy.chat import Json, background_kind
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.dialects.base import ClientCodec

MOST_TOKENS = 512
"""Most tokens of an answer. The longest, five follow-up questions, take about 200; the rest is for models that think
first. Open WebUI requests up to 1000 for a title, which takes a small model without an end minutes."""
HOLD_S = 1.0
"""Seconds that a title lets its chat go first: Open WebUI sends it a moment before. llama-server notices up to a second
late that a request was broken off, and not before the end of a batch of its prompt, so it is better not begun."""
_TEMPLATE = "\n###"
"""The next heading in a template of Open WebUI."""
_ROLES = ("system", "developer", "user")


def task_of(codec: ClientCodec, body: Json, model: Model, config: PoolConfig) -> Task | None:
    """The task if this undecoded and unchecked body is a background prompt, which gets limited in tokens; otherwise
    None."""
    kind = background_kind(text := codec.user_text(body))
    if kind is None or (codec.streams(body) and _TEMPLATE not in text):
        kind = background_kind(codec.system_text(body))
    if kind is None or config.tasks == "equal" or body.get("tools") or _has_answer(codec.messages(body) or ()):
        return None
    codec.limit_tokens(body, MOST_TOKENS, always=Feature.LOADING in model.features)
    return Task(HOLD_S if kind == "title" else 0.0)


def priority_of(task: Task | None) -> Priority:
    """The priority of the requests to models for a client's request."""
    return Priority.PERSON if task is None else Priority.TASK


def mark(request: UpstreamRequest, task: Task | None, *, whole: bool = False) -> UpstreamRequest:
    """The request, marked if it is for a task. `whole`: none of the answer is used before it is complete."""
    if task is not None:
        request.priority, request.task, task.whole = Priority.TASK, task, whole
    return request


def _has_answer(messages: Any) -> bool:
    return any(not isinstance(message, dict) or message.get("role") not in _ROLES for message in messages)
