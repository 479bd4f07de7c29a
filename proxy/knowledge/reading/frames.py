"""The messages between the proxy and the worker: a length of four bytes, then so many bytes.

The proxy sends two for each document: a JSON object, and the content where there is no file. The worker returns JSON
arrays of pieces (`[text, heading]`), then one JSON object: empty, or with the `error` for users.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

HEAD = struct.Struct(">I")
MAX_FRAME = 4 * 1024 * 1024
"""A larger one of the worker is a fault."""
FRAME_BYTES = 64 * 1024
"""Pieces are collected up to so many bytes: a few milliseconds of work for the event loop."""


def framed(payload: bytes) -> bytes:
    """One message."""
    return HEAD.pack(len(payload)) + payload


def received(source: BinaryIO) -> bytes | None:
    """The next message, or None at the end."""
    head = source.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    (length,) = HEAD.unpack(head)
    payload = source.read(length)
    return payload if len(payload) == length else None
