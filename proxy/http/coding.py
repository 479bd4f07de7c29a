"""Compressed request bodies, decompressed within limits."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Protocol

from llama_smart_proxy.proxy.errors import BadRequest

MAX_RATIO = 100
"""Largest ratio of a body to its compressed form. JSON reaches 20; what exceeds 1000 is made to exhaust memory."""
FREE_BYTES = 2**20
"""Bodies up to that size may have any ratio."""


class _Decompressor(Protocol):
    """What `zlib`, `bz2` and `compression.zstd` have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _gzip(raw: bytes) -> _Decompressor:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def _deflate(raw: bytes) -> _Decompressor:
    """With zlib's header, as RFC 9110 requires, or without it, as some clients send it."""
    has_header = raw[:1] and raw[0] & 0x0F == zlib.DEFLATED
    return zlib.decompressobj(wbits=zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)


CODINGS: dict[str, Callable[[bytes], _Decompressor]] = {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate}
"""By name in `Content-Encoding`."""
_INVALID: tuple[type[Exception], ...] = (zlib.error, EOFError)
with suppress(ImportError):  # Python 3.14
    _zstd = import_module("compression.zstd")
    CODINGS["zstd"] = lambda raw: _zstd.ZstdDecompressor()
    _INVALID = (*_INVALID, _zstd.ZstdError)

ACCEPTED = ", ".join(name for name in CODINGS if not name.startswith("x-"))


def coding_of(value: str) -> str | None:
    """The coding that the header `Content-Encoding` names; None if the body is not compressed.

    Raises: BadRequest 415 for a coding that is not in `CODINGS`, and for several of them.
    """
    names = [name for name in (item.strip().lower() for item in value.split(",")) if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > 1 or names[0] not in CODINGS:
        message = f"request bodies of this Content-Encoding are not accepted; accepted are {ACCEPTED} and none"
        raise BadRequest(message, status=415, code="unsupported_media_type")
    return names[0]


def decompressed(raw: bytes, coding: str, max_bytes: int) -> bytes:
    """The body `raw` without its coding.

    Raises: BadRequest 413 if it is larger than `max_bytes` or than `MAX_RATIO` permits, 400 if it is not valid.
    """
    limit = min(max_bytes, max(FREE_BYTES, MAX_RATIO * len(raw)))
    stream = CODINGS[coding](raw)
    try:
        body = stream.decompress(raw, limit + 1)
    except _INVALID:
        raise _invalid(coding) from None
    if len(body) > limit:
        raise BadRequest(_too_large(limit, max_bytes), status=413, code="request_too_large")
    if not stream.eof or stream.unused_data:
        raise _invalid(coding)
    return body


def _invalid(coding: str) -> BadRequest:
    return BadRequest(f"the request body is not valid {coding} data", code="invalid_body")


def _too_large(limit: int, max_bytes: int) -> str:
    if limit < max_bytes:
        return f"the request body is compressed by more than 1:{MAX_RATIO}"
    return f"the request body is larger than {max_bytes // 2**20} MiB; server.max_body_mib sets the limit"
