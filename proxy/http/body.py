"""The client's JSON, parsed once and strictly.

What we check must be what the model server parses. Python takes duplicate keys, `NaN` and lone surrogates; Go matches
keys in any case; C++ libraries differ again. So a body that two parsers could read differently is refused, and what
goes upstream is serialised anew from what was checked.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import orjson
from aiohttp import web

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.server import FrontConnection

A = TypeVar("A")
R = TypeVar("R")

MAX_VALUES = 1_000_000
"""Most commas in a body. Parsing holds the interpreter's lock, so millions of numbers would stop every stream for
seconds; long texts and images, which are what makes bodies large, are no trouble."""
OFF_LOOP_BYTES = 1024 * 1024
"""Larger bodies are parsed in a thread, so that other streams go on."""


async def read_json(http: web.BaseRequest, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object.

    Raises: BadRequest 413 over `max_bytes`, 415 for a content encoding, 400 for anything that is not one JSON object.
    """
    if http.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadRequest("compressed request bodies are not accepted", status=415, code="unsupported_media_type")
    if (http.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)
    if http.content.is_eof():
        raw = http.content.read_nowait()  # small bodies are there already
    else:
        raw = await _upload(http, max_bytes)
    if len(raw) > OFF_LOOP_BYTES:
        return await asyncio.get_running_loop().run_in_executor(None, parse_object, raw)
    return parse_object(raw)


async def to_bytes(http: web.BaseRequest, value: dict[str, Any]) -> bytes:
    """`serialise(value)`, the body of `http`; in a thread if it is large."""
    return serialise(value) if http.content.total_bytes <= OFF_LOOP_BYTES else await aside(http, serialise, value)


async def aside(http: web.BaseRequest, work: Callable[[A], R], value: A) -> R:
    """`work(value)`, which takes time in proportion to the body of `http`: in a thread if that is large."""
    if http.content.total_bytes <= OFF_LOOP_BYTES:
        return work(value)
    return await asyncio.get_running_loop().run_in_executor(None, work, value)


async def _upload(http: web.BaseRequest, max_bytes: int) -> bytes:
    if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
        http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # curl waits for it before it sends a large body
    connection = http.protocol
    raw = bytearray()
    with connection.receiving_body() if isinstance(connection, FrontConnection) else nullcontext():
        async for piece in http.content.iter_any():  # http.read() would keep a copy as long as the request lives
            raw += piece
            if len(raw) > max_bytes:
                raise _too_large(max_bytes)
    return bytes(raw)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object; same result in every JSON parser, or BadRequest."""
    if not raw.strip():
        raise BadRequest("missing request body", code="missing_body")
    if raw.count(b",") > MAX_VALUES:
        raise BadRequest("the request body holds too many values", status=413, code="request_too_large")
    try:
        value = _decoder.decode(raw.decode())
    except UnicodeDecodeError:
        raise BadRequest("the request body is not valid UTF-8", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the request body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as exc:
        raise BadRequest(
            f"the request body is not valid JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}",
            code="invalid_json",
        ) from None
    except ValueError as exc:
        raise BadRequest(f"the request body is not valid JSON: {exc}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest("the request body must be a JSON object", code="invalid_json")
    if len({key.lower() for key in value}) != len(value):
        raise BadRequest("the request body has keys that differ only in case", code="invalid_json")
    return value


def _too_large(max_bytes: int) -> BadRequest:
    message = f"the request body is larger than {max_bytes // 2**20} MiB"
    return BadRequest(message, status=413, code="request_too_large")


def serialise(value: dict[str, Any]) -> bytes:
    """The JSON bytes to send upstream.

    Raises: BadRequest for what JSON cannot carry faithfully: lone surrogates, integers past 64 bits, deep nesting.
    """
    try:
        return orjson.dumps(value)
    except TypeError as exc:  # orjson.JSONEncodeError
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


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_no_constant)
