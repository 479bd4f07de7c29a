"""The token counts of an answer that agents have changed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from llama_smart_proxy.backends.base import Feature, Model, UpstreamRequest
from llama_smart_proxy.proxy.chat import ChatRequest, Json
from llama_smart_proxy.proxy.dialects import UPSTREAM_CODECS
from llama_smart_proxy.proxy.dialects.anthropic.tokens import estimate
from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.stream.answer import ModelAnswer
from llama_smart_proxy.proxy.stream.upstream import JSON_HEADERS, fetch_json

COUNT_S = 2.0
"""Time limit in seconds for the server to count a prompt."""


async def usage_of(answer: ModelAnswer | None) -> Json | None:
    """What the model's server counted; zero without a model; None if the server does not count.

    If an agent stopped the answer, the server has sent no final counts. Then the completion is the number of chunks
    until then, of one token each; the prompt is counted by the server's tokenizer, or else estimated.
    """
    if answer is None:
        return _usage(0, 0)
    if answer.stopped_after is not None:
        counted = answer.usage if isinstance(answer.usage, dict) else {}  # so far
        prompt = counted.get("prompt_tokens") or await _prompt_tokens(answer.model, answer.chat)
        completion = counted.get("completion_tokens") or answer.stopped_after
        answer.usage, answer.stopped_after = {**counted, **_usage(prompt, completion)}, None
        if answer.record is not None:
            answer.record.counted = answer.usage
    return answer.usage


def _usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _prompt_tokens(model: Model, chat: ChatRequest) -> int:
    if Feature.TOKENS in model.features:
        with suppress(ProxyError, TimeoutError):
            async with asyncio.timeout(COUNT_S):
                return await _counted(model, chat)
    return estimate(chat.body)


async def _counted(model: Model, chat: ChatRequest) -> int:
    """By llama-server. Source: llama.cpp tools/server, b11434. Raises: ProxyError."""
    path, body = UPSTREAM_CODECS[model.codec].encode(chat)
    if chat.is_text:
        path, body = "/tokenize", {"content": body.get("prompt") or "", "add_special": True, "model": model.name}
    else:
        path = f"{path}/input_tokens"
    prepared = model.prepare(body)
    request = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS, slot=False, wait=False, prepared=prepared)
    counts = await fetch_json(model, request)
    found = counts.get("tokens") if chat.is_text else counts.get("input_tokens")
    return len(found) if isinstance(found, list) else found if isinstance(found, int) else estimate(chat.body)
