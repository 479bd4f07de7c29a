"""Embeddings of a model, for any API of its server."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.chat import Json, Timing
from llama_smart_proxy.proxy.dialects.embeddings import EMBEDDING_SERVERS, Embedded, EmbeddingRequest, cut
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.upstream import post_json

PostJson = Callable[[str, Json], Awaitable[Json]]
"""Sends a JSON body to a path of the model's server and returns its JSON answer."""
_Embed = Callable[[Sequence[Any]], Awaitable[Embedded]]

TOO_LONG = "the input length exceeds the context length"
NOTHING_LEFT = "input after truncation exceeds maximum context length"
NOT_ENOUGH = "input exceeds maximum context length and cannot be truncated further"
"""Ollama's error messages. Source: its server/routes.go and runner."""
_SPECIAL = 2
"""Most tokens that a model adds to a text."""
_WORD_END = re.compile(r"(?<=\S)(?=\s)")
_LONGEST_TOKEN = 1024
"""No vocabulary has a token of so many characters."""


async def embed(
    model: Model, request: EmbeddingRequest, post: PostJson | None = None, timing: Timing | None = None
) -> Embedded:
    """One vector per input. With no input the model is only loaded, as Ollama does. `timing` is that of the client's
    request.

    Raises: BadRequest for an input that is too long if `request.truncate` is False, or if nothing of it could be kept;
    as `post_json`.
    """
    started_ns = time.monotonic_ns()
    if not request.inputs:
        await model.load()
        spent_ns = time.monotonic_ns() - started_ns
        return Embedded([], spent_ns=spent_ns, loaded_ns=spent_ns)
    server = EMBEDDING_SERVERS[model.codec]
    timing = timing or Timing(time.monotonic())
    post = post or partial(post_json, model, slot=True, timing=timing)

    async def vectors_of(inputs: Sequence[Any]) -> Embedded:
        return server.decode(await post(server.path, server.encode(model.name, list(inputs), request)))

    if server.complete:
        embedded = await vectors_of(request.inputs)
        if request.num_ctx is not None and embedded.tokens > request.num_ctx:
            embedded = await _limited(vectors_of, request, request.num_ctx)
    else:
        embedded = await _shortened(model, request, vectors_of, server.limit)
        embedded.vectors = [cut(vector, request.dimensions) for vector in embedded.vectors]
    embedded.spent_ns = time.monotonic_ns() - started_ns
    embedded.loaded_ns += max(0, round((timing.sent_s - timing.arrived_s) * 1e9))
    return embedded


async def _shortened(
    model: Model, request: EmbeddingRequest, vectors_of: _Embed, limit_of: Callable[[str], int | None]
) -> Embedded:
    """The vectors of the inputs, cut to the limit of the client and of the server."""
    inputs: list[Any] = request.inputs
    if request.num_ctx is not None and Feature.TOKENS in model.features:
        inputs = [await _beginning(model, text, request.num_ctx, truncate=request.truncate) for text in inputs]
    try:
        return await vectors_of(inputs)
    except UpstreamRefused as exc:
        limit = limit_of(exc.message)
        if limit is None:
            raise
    if not request.truncate:
        raise BadRequest(TOO_LONG)
    limit -= 1  # servers differ in whether the limit itself is allowed
    limit = min(limit, request.num_ctx) if request.num_ctx is not None else limit
    inputs = [await _beginning(model, text, limit, truncate=True) for text in request.inputs]
    try:
        return await vectors_of(inputs)
    except UpstreamRefused as exc:
        raise (exc if limit_of(exc.message) is None else BadRequest(NOT_ENOUGH)) from None


async def _beginning(model: Model, text: str, limit: int, *, truncate: bool) -> str | list[int]:
    """`text` if it has at most `limit` tokens, else the first ones of it, between those that the model adds.

    Raises: BadRequest if that is not allowed, or if there is no room.
    """
    if len(text.encode(errors="replace")) + _SPECIAL <= limit:  # a token is at least a byte
        return text
    whole = await _tokens(model, text, special=True)
    if len(whole) <= limit:
        return text
    if not truncate:
        raise BadRequest(TOO_LONG)
    plain = await _tokens(model, text, special=False)
    added = len(whole) - len(plain)
    if limit <= added:
        raise BadRequest(NOTHING_LEFT)
    start = next((at for at in range(added + 1) if whole[at : at + len(plain)] == plain), 0)
    return whole[:start] + plain[: limit - added] + whole[start + len(plain) :]


async def _tokens(model: Model, text: str, *, special: bool) -> list[int]:
    tokens = (await post_json(model, "/tokenize", {"content": text, "add_special": special})).get("tokens")
    if not isinstance(tokens, list):
        raise UpstreamFailed("the model server's answer contains no tokens", code="upstream_error")
    return tokens


async def _limited(vectors_of: _Embed, request: EmbeddingRequest, limit: int) -> Embedded:
    """The vectors of the inputs, each cut to `limit` tokens, from a server that counts tokens but cannot be asked for
    them. A text is cut between words, if it has any."""
    result = Embedded([])
    for text in request.inputs:
        one = await vectors_of([text])
        if one.tokens > limit and not request.truncate:
            raise BadRequest(TOO_LONG)
        if one.tokens > limit:
            text = text[: limit * _LONGEST_TOKEN]
            found = await _longest(vectors_of, text, _word_end, limit) or await _longest(vectors_of, text, _any, limit)
            if found is None:
                raise BadRequest(NOTHING_LEFT)
            one = found
        result.vectors += one.vectors
        result.tokens += one.tokens
        result.loaded_ns += one.loaded_ns
    return result


async def _longest(
    vectors_of: _Embed, text: str, end_in: Callable[[str, int, int], int | None], limit: int
) -> Embedded | None:
    """The vector of the longest beginning of `text` with at most `limit` tokens. It ends where `end_in`, called with
    the text, the first and behind the last position, says that one may."""
    found, low, high = None, 1, len(text)
    while low < high:
        middle = (low + high) // 2
        end = end_in(text, middle, high)
        tried = await vectors_of([text[:end]]) if end is not None else None
        if end is not None and tried is not None and tried.tokens <= limit:
            found, low = tried, end + 1
        else:
            high = middle
    return found


def _word_end(text: str, start: int, end: int) -> int | None:
    """The first end of a word from `start` on; not a list of all of them, of which a text may have millions."""
    found = _WORD_END.search(text, start, end)
    return found.start() if found is not None else None


def _any(text: str, start: int, end: int) -> int | None:
    return start
