"""The client's JSON, parsed once and strictly.

What we check must be what the model server parses. Python takes duplicate keys and `NaN`; Go matches keys in any case;
C++ libraries differ again. So a body that two parsers could read differently is refused, and what goes upstream is
serialised anew from what was checked: or is the very bytes that came, where that would give the same. Texts that are
not valid Unicode are repaired (`proxy.http.text`), so what goes upstream is always valid UTF-8.

Any parser holds the interpreter's lock as long as it runs, and no stream goes on meanwhile. So what takes long is done
in a thread, one body after the other, with pauses.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson
from aiohttp import web

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.aside import in_thread
from llama_smart_proxy.proxy.http.coding import coding_of, decompressed
from llama_smart_proxy.proxy.http.server import FrontConnection
from llama_smart_proxy.proxy.http.text import MARK, decoded, repaired, repaired_body

A = TypeVar("A")
R = TypeVar("R")

MAX_VALUES = 1_000_000
"""Most commas in a body, and most lists and objects. Millions of numbers would stop every stream for seconds; long
texts and images, which are what makes bodies large, are no trouble."""
DEEPEST = 254
"""Most lists and objects within each other: orjson writes no more."""
ON_LOOP_BYTES = 64 * 1024
"""Larger bodies are parsed in a thread, so that other streams go on; and so are smaller ones with many values."""
ON_LOOP_VALUES = 2000
_FEW_BYTES = 16 * 1024
"""Bodies up to that size are parsed at once, with any content."""
_HEAVY = web.RequestKey("heavy", bool)
"""Whether work on the whole body of a request is done in a thread."""


class Body(NamedTuple):
    """A request's JSON object. `raw`, if there is one, is what `serialise` makes of it as long as it is unchanged."""

    value: dict[str, Any]
    raw: bytes | None

    def reusable(self) -> Reusable | None:
        """For a later decision on whether the bytes can be sent as they came."""
        return Reusable(self.raw, list(self.value.items())) if self.raw is not None else None


class Reusable(NamedTuple):
    """The bytes of a body, and its fields. A field is changed by giving it another value, never in place."""

    raw: bytes
    fields: list[tuple[str, Any]]

    def bytes_of(self, value: dict[str, Any]) -> bytes | None:
        """The bytes as they came, if `value` still has just these fields."""
        return self.raw if list(value.items()) == self.fields else None


async def read_json(http: web.BaseRequest, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object. Raises: as `read_body`."""
    return (await read_body(http, max_bytes)).value


async def read_body(http: web.BaseRequest, max_bytes: int) -> Body:
    """The request's JSON object, and the bytes it came as if they may be sent in its place.

    Raises: BadRequest 413 over `max_bytes`, 415 for an unknown content coding, 400 for anything that is not one JSON
    object.
    """
    raw, coding = await _received(http, max_bytes)
    if coding is not None:
        http[_HEAVY] = True
        return await in_thread(partial(_parse_compressed, coding=coding, max_bytes=max_bytes), raw, urgent=False)
    if len(raw) > _FEW_BYTES and (len(raw) > ON_LOOP_BYTES or _count(raw, b",[{") > ON_LOOP_VALUES):
        http[_HEAVY] = True
        return await in_thread(parse_body, raw, urgent=False)
    return parse_body(raw)


async def read_bytes(http: web.BaseRequest, max_bytes: int) -> bytes:
    """The request's body without its content coding, for one that is no JSON object. Raises: BadRequest 413 over
    `max_bytes`, 415 for an unknown content coding, 400 for data that is not valid in its coding."""
    raw, coding = await _received(http, max_bytes)
    if coding is None:
        return raw
    return await in_thread(partial(decompressed, coding=coding, max_bytes=max_bytes), raw, urgent=False)


async def _received(http: web.BaseRequest, max_bytes: int) -> tuple[bytes, str | None]:
    """The body as it came, and its content coding."""
    coding = coding_of(http.headers["Content-Encoding"]) if "Content-Encoding" in http.headers else None
    if (http.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    if http.content.is_eof():
        return http.content.read_nowait(), coding  # small bodies are there already
    return await _upload(http, max_bytes), coding


async def to_bytes(http: web.BaseRequest, value: dict[str, Any]) -> bytes:
    """`serialise(value)`, the body of `http`; in a thread if it takes long."""
    return await offload(http, serialise, value)


async def offload(http: web.BaseRequest, work: Callable[[A], R], value: A) -> R:
    """`work(value)`, which takes time in proportion to the body of `http`: in a thread if that is much."""
    if _HEAVY not in http:
        return work(value)
    return await in_thread(work, value, urgent=True)


async def _upload(http: web.BaseRequest, max_bytes: int) -> bytes:
    raw = bytearray()
    async with aclosing(arriving(http)) as pieces:
        async for piece in pieces:
            raw += piece
            if len(raw) > max_bytes:
                raise _too_large(max_bytes)
    return bytes(raw)


async def arriving(http: web.BaseRequest) -> AsyncGenerator[bytes, None]:
    """The body in pieces, as it arrives, within the limits of time. `http.read()` would keep a copy of it all."""
    if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
        http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # curl waits for it before it sends a large body
    connection = http.protocol
    with connection.receiving_body(http.content) if isinstance(connection, FrontConnection) else nullcontext():
        async for piece in http.content.iter_any():
            yield piece


def _parse_compressed(raw: bytes, coding: str, max_bytes: int) -> Body:
    """In one step, so that what waits for the thread is compressed."""
    return parse_body(decompressed(raw, coding, max_bytes))


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object; same result in every JSON parser, or BadRequest."""
    return parse_body(raw).value


def parse_body(raw: bytes) -> Body:
    """`parse_object`, and `raw` if it is what `serialise` would make of the object."""
    if len(raw) > MAX_VALUES and (_count(raw, b",") > MAX_VALUES or _count(raw, b"[{") > MAX_VALUES):
        raise BadRequest("the request body holds too many values", status=413, code="request_too_large")
    value = _parse_compact(raw)
    if value is not None:
        return Body(value, raw)
    return Body(parse_strictly(raw), None)


def _parse_compact(raw: bytes) -> dict[str, Any] | None:
    """The object of a body that orjson writes just as it came: then nothing of it was left out or read in a way of
    orjson's own, such as a second key of the same name, and an integer past 64 bits. That takes a quarter of the time
    of `parse_strictly`. None for any other body.
    """
    if not raw.startswith(b'{"') or raw.startswith(b'": ', raw.find(b'":')):
        return None  # with spaces, as Python writes it
    try:
        value = orjson.loads(raw)
        if value.__class__ is not dict or orjson.dumps(value) != raw:
            return None
    except (ValueError, TypeError):  # orjson's errors for what it cannot read, and cannot write
        return None
    return None if _has_twins(value) else value


def _has_twins(value: dict[str, Any]) -> bool:
    return len({key.casefold() for key in value}) != len(value)  # for Go, as for Unicode, a long s is an s


def parse_strictly(raw: bytes) -> dict[str, Any]:
    """`parse_object` for any body, by Python's own parser."""
    raw = raw.removeprefix(codecs.BOM_UTF8)  # RFC 8259 8.1; Windows tools write one
    if not raw.strip():
        raise BadRequest("missing request body", code="missing_body")
    text, has_surrogates = decoded(raw)
    try:
        value = _decoder.decode(text)
        if has_surrogates and isinstance(value, dict):
            value = repaired_body(value)
        if text.count("{") + text.count("[") > DEEPEST:
            _check_depth(value)
    except RecursionError:
        raise BadRequest("the request body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as exc:
        if MARK in text:
            raise BadRequest("the request body is not valid UTF-8", code="invalid_json") from None
        raise BadRequest(
            f"the request body is not valid JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}",
            code="invalid_json",
        ) from None
    except ValueError as exc:
        raise BadRequest(f"the request body is not valid JSON: {exc}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_json")
    if _has_twins(value):
        raise BadRequest("the request body has keys that differ only in case", code="invalid_json")
    return value


def _check_depth(value: Any) -> None:
    """Reject what could not be written again: an answer may repeat a part of it. Raises: RecursionError."""
    try:
        orjson.dumps(value)
    except TypeError as exc:
        raise RecursionError(str(exc)) from None


def _count(raw: bytes, characters: bytes) -> int:
    """How often any of these occurs."""
    return sum(raw.count(character) for character in characters)


def _too_large(max_bytes: int) -> BadRequest:
    message = f"the request body is larger than {max_bytes // 2**20} MiB"
    return BadRequest(message, status=413, code="request_too_large")


def serialise(value: Any) -> bytes:
    """The JSON bytes to send upstream.

    Raises: BadRequest for what JSON cannot carry faithfully: integers past 64 bits, deep nesting.
    """
    try:
        try:
            return orjson.dumps(value)
        except TypeError as exc:  # orjson.JSONEncodeError
            if "surrogates" not in str(exc):
                raise
            return orjson.dumps(repaired(value))  # a translation has parsed the JSON within a text
    except TypeError as exc:
        raise BadRequest(f"the request body cannot be passed on: {exc}", code="invalid_json") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


def _in_64_bits(text: str) -> int:
    number = int(text) if len(text) <= _LONGEST_INTEGER else math.inf
    if not _LOWEST <= number <= _HIGHEST:
        raise ValueError("an integer is out of range")
    return int(number)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_LOWEST, _HIGHEST = -(2**63), 2**64 - 1
_LONGEST_INTEGER = 20
_decoder = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_float=_finite, parse_int=_in_64_bits, parse_constant=_no_constant
)
