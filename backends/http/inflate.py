"""Decompresses the body of an answer as it arrives."""

from __future__ import annotations

import zlib
from typing import ClassVar

LIMIT = 8 * 1024 * 1024
"""Largest result of one piece in bytes: a small piece can be made to decompress to a thousand times its size."""


class Inflater:
    """Decompresses gzip (also several members, as servers that compress each event send them) and zlib's `deflate`."""

    ENCODINGS: ClassVar[frozenset[str]] = frozenset({"gzip", "x-gzip", "deflate"})

    def __init__(self) -> None:
        self._stream = self._new()

    def inflate(self, data: bytes) -> bytes:
        """The bytes that `data` adds. Raises: ValueError for invalid data, and over `LIMIT`."""
        pieces, left = [], LIMIT
        try:
            while data:
                if self._stream.eof:
                    self._stream = self._new()
                pieces.append(self._stream.decompress(data, left))
                left -= len(pieces[-1])
                if self._stream.unconsumed_tail or left <= 0:
                    raise ValueError(f"a piece of it is over {LIMIT // 2**20} MiB")
                data = self._stream.unused_data
        except zlib.error as exc:
            raise ValueError(str(exc)) from None
        return b"".join(pieces)

    @staticmethod
    def _new() -> zlib._Decompress:
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # detects gzip and zlib by their headers
