"""Requests and answers for embeddings, of clients and of servers. Pure functions, no I/O.

Source: Ollama's `/api/embed` and `/api/embeddings`; the OpenAI API reference; llama.cpp tools/server, b11434, for its
errors about inputs that are too long.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.ollama.fields import keep_alive_s
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed

Vectors = list[list[float]]
_TOO_LONG = re.compile(r"batch size: (\d+)|context size \((\d+)|n_ctx_slot = (\d+)|maximum context length is (\d+)")


@dataclass(slots=True)
class EmbeddingRequest:
    """Texts to be embedded. `truncate`: texts that are too long are truncated to the model's limit, otherwise they are
    an error. `num_ctx` is a limit of the client's, in tokens for each text. `fields` is the client's body; of its other
    fields an Ollama server is sent those it supports. `keep_alive_s`: seconds that the model stays loaded when idle."""

    inputs: list[str]
    truncate: bool = True
    num_ctx: int | None = None
    dimensions: int | None = None
    base64: bool = False
    fields: Json = field(default_factory=dict)
    keep_alive_s: float | None = None


@dataclass(slots=True)
class Embedded:
    """A vector for each input, in order, the number of tokens of all inputs, the time taken, and how much of it passed
    until the model was loaded and free."""

    vectors: Vectors
    tokens: int = 0
    spent_ns: int = 0
    loaded_ns: int = 0


@dataclass(frozen=True, slots=True)
class EmbeddingClient:
    """A client's endpoint for embeddings: `decode` raises BadRequest; `encode` takes the model's name as well.
    `num_ctx` reads the client's limit from an undecoded body."""

    decode: Callable[[Json], EmbeddingRequest]
    encode: Callable[[str, EmbeddingRequest, Embedded], Json]
    num_ctx: Callable[[Json], int | None] = lambda body: None


@dataclass(frozen=True, slots=True)
class EmbeddingServer:
    """A server's endpoint for embeddings. `decode` raises UpstreamFailed; `limit` parses the most tokens of an input
    from an error message, None if it is about something else. `complete`: the server supports every field of a request
    itself, truncation included."""

    path: str
    encode: Callable[[str, list[Any], EmbeddingRequest], Json]
    decode: Callable[[Json], Embedded]
    limit: Callable[[str], int | None]
    complete: bool = False


# -- clients -----------------------------------------------------------------------------------------------------------


def _decode_openai(body: Json) -> EmbeddingRequest:
    given = body.get("input")
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not all(isinstance(item, str) for item in inputs):
        raise BadRequest("input must be a string or a list of strings for a model run by Ollama", param="input")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    return EmbeddingRequest(inputs, base64=encoding == "base64", fields=body)


def _encode_openai(model: str, request: EmbeddingRequest, embedded: Embedded) -> Json:
    vectors = map(_base64, embedded.vectors) if request.base64 else embedded.vectors
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)],
        "model": model,
        "usage": {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens},
    }


def _decode_ollama(body: Json) -> EmbeddingRequest:
    given = body.get("input")
    inputs = [given] if isinstance(given, str) and given else given or []
    if not isinstance(inputs, list) or not all(isinstance(item, str) for item in inputs):
        raise BadRequest("invalid input type")
    dimensions = body.get("dimensions")
    request = _of_ollama(inputs, body)
    request.dimensions = dimensions if isinstance(dimensions, int) else None
    return request


def _decode_legacy(body: Json) -> EmbeddingRequest:
    prompt = body.get("prompt", "")
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be a string")
    return _of_ollama([prompt] if prompt else [], body)


def _of_ollama(inputs: list[str], body: Json) -> EmbeddingRequest:
    if not isinstance(body.get("options") or {}, dict):
        raise BadRequest("options must be an object")
    request = EmbeddingRequest(inputs, fields=body, keep_alive_s=keep_alive_s(body.get("keep_alive")))
    request.truncate = body.get("truncate", True) is not False
    request.num_ctx = _num_ctx(body)
    return request


def _num_ctx(body: Json) -> int | None:
    options = body.get("options")
    size = options.get("num_ctx") if isinstance(options, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _encode_ollama(model: str, request: EmbeddingRequest, embedded: Embedded) -> Json:
    answer: Json = {"model": model, "embeddings": embedded.vectors, "total_duration": embedded.spent_ns}
    answer["load_duration"] = embedded.loaded_ns  # required by the provider of Vercel's AI SDK
    return answer | ({"prompt_eval_count": embedded.tokens} if embedded.tokens else {})


def _encode_legacy(model: str, request: EmbeddingRequest, embedded: Embedded) -> Json:
    return {"embedding": embedded.vectors[0] if embedded.vectors else []}


OPENAI_EMBEDDINGS = EmbeddingClient(_decode_openai, _encode_openai)
"""`POST /v1/embeddings`. Extra fields that Ollama supports are passed on."""
OLLAMA_EMBED = EmbeddingClient(_decode_ollama, _encode_ollama, _num_ctx)
"""`POST /api/embed`."""
OLLAMA_EMBEDDINGS = EmbeddingClient(_decode_legacy, _encode_legacy)
"""`POST /api/embeddings`, for one prompt."""

# -- servers -----------------------------------------------------------------------------------------------------------


def _encode_for_ollama(model: str, inputs: list[Any], request: EmbeddingRequest) -> Json:
    supported = ("dimensions", "truncate", "keep_alive", "options")
    return {"model": model, "input": inputs, **{key: request.fields[key] for key in supported if key in request.fields}}


def _read_ollama(answer: Json) -> Embedded:
    counted, loaded = (
        value if isinstance(value := answer.get(name), int) else 0 for name in ("prompt_eval_count", "load_duration")
    )
    return Embedded(_checked(answer.get("embeddings")), counted, loaded_ns=loaded)


def _encode_for_openai(model: str, inputs: list[Any], request: EmbeddingRequest) -> Json:
    return {"model": model, "input": inputs}


def _read_openai(answer: Json) -> Embedded:
    items = answer.get("data")
    if not isinstance(items, list):
        raise UpstreamFailed("the model server's answer holds no embeddings", code="upstream_error")
    vectors: list[object] = [None] * len(items)
    for place, item in enumerate(items):
        if isinstance(item, dict) and item.get("index", place) in range(len(items)):
            vectors[item.get("index", place)] = item.get("embedding")
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else 0
    return Embedded(_checked(vectors), tokens if isinstance(tokens, int) else 0)


def _limit_openai(message: str) -> int | None:
    found = _TOO_LONG.search(message)
    return int(next(filter(None, found.groups()))) if found is not None else None


_OPENAI = EmbeddingServer("/v1/embeddings", _encode_for_openai, _read_openai, _limit_openai)
_OLLAMA = EmbeddingServer("/api/embed", _encode_for_ollama, _read_ollama, lambda message: None, complete=True)
EMBEDDING_SERVERS = {"llama.cpp": _OPENAI, "openai": _OPENAI, "ollama": _OLLAMA}
"""By the `codec` of the model."""


def cut(vector: list[float], dimensions: int | None) -> list[float]:
    """The first `dimensions` numbers of `vector`, normalized to length 1."""
    if dimensions is None or not 0 < dimensions < len(vector):
        return vector
    numbers = vector[:dimensions]
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return [number / length for number in numbers]


def _checked(value: object) -> Vectors:
    if not isinstance(value, list) or not all(map(_is_vector, value)):
        raise UpstreamFailed("the model server's answer holds no embeddings", code="upstream_error")
    return value


def _is_vector(value: object) -> bool:
    """Whether `value` is a list of numbers within the range of 32-bit floats."""
    try:
        return isinstance(value, list) and struct.pack(f"<{len(value)}f", *value) is not None
    except (struct.error, OverflowError):
        return False


def _base64(vector: list[float]) -> str:
    """OpenAI's encoding: 32-bit floats, little-endian, as base64."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
