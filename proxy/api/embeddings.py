"""Embeddings in one dialect from a server that speaks another.

Source: Ollama's `/api/embed` and `/api/embeddings`; the OpenAI API reference; llama.cpp tools/server, b11434, for its
errors about inputs that are too long.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.proxy.api.ollama_chat import set_keep_alive
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.translate import question

Convert = Callable[[Model, str, Json], Awaitable[Json]]
"""Makes the answer of one endpoint from the backend, the model's name there and the client's body."""
Vectors = list[list[float]]
MANY = 64
"""More vectors than are turned into text while others wait."""
_TOO_LONG = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx_slot = (\d+)|maximum context length is (\d+)")


async def openai_from_ollama(backend: Model, model: str, body: Json) -> Json:
    """Answer `POST /v1/embeddings` from `/api/embed`. Extra fields that Ollama knows are passed on."""
    wanted = body.get("input")
    inputs = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(inputs, list) or not all(isinstance(item, str) for item in inputs):
        raise BadRequest("input must be a string or a list of strings for a model run by Ollama", param="input")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    passed: Json = {key: body[key] for key in ("dimensions", "truncate", "keep_alive", "options") if key in body}
    answer = await question(backend, "/api/embed", {"model": model, "input": inputs, **passed}, slot=True)
    vectors = _vectors(answer.get("embeddings"))
    counted = answer.get("prompt_eval_count")
    tokens = counted if isinstance(counted, int) else 0
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if encoding == "base64" else vector}
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def ollama_from_openai(backend: Model, model: str, body: Json) -> Json:
    """Answer `POST /api/embed` from `/v1/embeddings`."""
    started_ns = time.monotonic_ns()
    wanted = body.get("input")
    inputs = [wanted] if isinstance(wanted, str) and wanted else wanted or []
    if not isinstance(inputs, list) or not all(isinstance(item, str) for item in inputs):
        raise BadRequest("invalid input type")
    _obey(backend, body)
    vectors, tokens = await _embed(backend, model, inputs, body.get("truncate", True))
    answer: Json = {"model": model, "embeddings": [_cut(vector, body.get("dimensions")) for vector in vectors]}
    answer["total_duration"] = time.monotonic_ns() - started_ns
    return answer | ({"prompt_eval_count": tokens} if tokens else {})


async def vectors_of(backend: Model, model: str, texts: Sequence[str]) -> Vectors:
    """A vector for each text, by whatever API the backend's server speaks; one that is too long counts to its limit."""
    if "openai" in backend.speaks:
        return (await _embed(backend, model, list(texts), truncate=True))[0] if texts else []
    answer = await question(backend, "/api/embed", {"model": model, "input": list(texts)}, slot=True)
    return _vectors(answer.get("embeddings"))


async def legacy_from_openai(backend: Model, model: str, body: Json) -> Json:
    """Answer `POST /api/embeddings`, of one prompt."""
    prompt = body.get("prompt", "")
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be a string")
    _obey(backend, body)
    vectors, _ = await _embed(backend, model, [prompt] if prompt else [], truncate=True)
    return {"embedding": vectors[0] if vectors else []}


def _obey(backend: Model, body: Json) -> None:
    """Check the `options` of a good request, none of which means anything here, and heed its `keep_alive`."""
    if not isinstance(body.get("options") or {}, dict):
        raise BadRequest("options must be an object")
    set_keep_alive(backend, body)


async def _embed(backend: Model, model: str, inputs: list[str], truncate: object) -> tuple[Vectors, int]:
    """The vectors of `inputs`, in order, and how many tokens they had."""
    if not inputs:
        await backend.load()
        return [], 0
    try:
        return await _ask(backend, model, inputs)
    except UpstreamRefused as exc:
        limit = _TOO_LONG.search(exc.message)
        if limit is None:
            raise
        if truncate is False:
            raise BadRequest("the input length exceeds the context length") from None
    most = int(next(filter(None, limit.groups())))
    return await _ask(backend, model, [await _shortened(backend, text, most) for text in inputs])


async def _ask(backend: Model, model: str, inputs: list[Any]) -> tuple[Vectors, int]:
    answer = await question(backend, "/v1/embeddings", {"model": model, "input": inputs}, slot=True)
    items = answer.get("data")
    if not isinstance(items, list):
        raise UpstreamFailed("the model server's answer holds no embeddings", code="upstream_error")
    vectors: list[object] = [None] * len(items)
    for place, item in enumerate(items):
        if isinstance(item, dict) and item.get("index", place) in range(len(items)):
            vectors[item.get("index", place)] = item.get("embedding")
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return _vectors(vectors), tokens if isinstance(tokens, int) else 0


async def _shortened(backend: Model, text: str, most: int) -> list[int]:
    """The first tokens of `text`, so many that the server takes them."""
    tokens = (await question(backend, "/tokenize", {"content": text, "add_special": True})).get("tokens")
    if not isinstance(tokens, list):
        raise UpstreamFailed("the model server's answer holds no tokens", code="upstream_error")
    return tokens[: most - 1]  # to stay below the limit, whether or not the server counts it in


def _vectors(value: object) -> Vectors:
    if not isinstance(value, list) or not all(map(_is_vector, value)):
        raise UpstreamFailed("the model server's answer holds no embeddings", code="upstream_error")
    return value


def _is_vector(value: object) -> bool:
    """Whether it is a list of numbers that 32 bits can hold."""
    try:
        return isinstance(value, list) and struct.pack(f"<{len(value)}f", *value) is not None
    except (struct.error, OverflowError):
        return False


def _cut(vector: list[float], dimensions: object) -> list[float]:
    """The first `dimensions` numbers, of length 1 again."""
    if not isinstance(dimensions, int) or not 0 < dimensions < len(vector):
        return vector
    cut = vector[:dimensions]
    length = math.sqrt(sum(number * number for number in cut)) or 1.0
    return [number / length for number in cut]


def _base64(vector: list[float]) -> str:
    """As OpenAI's API encodes it: 32-bit floats, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def as_response(answer: Json) -> web.Response:
    """The HTTP answer that carries it. Thousands of vectors are made text in a thread."""
    many = len(answer.get("data") or answer.get("embeddings") or ()) > MANY
    body = (
        await asyncio.get_running_loop().run_in_executor(None, orjson.dumps, answer) if many else orjson.dumps(answer)
    )
    return web.Response(body=body, content_type="application/json")
