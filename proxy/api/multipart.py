"""Forms with files (`multipart/form-data`), of which one field is read and replaced, and the rest kept byte for byte.

Source: RFC 7578; RFC 2046 5.1.1.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import Self

from llama_smart_proxy.proxy.errors import BadRequest

_NAME = re.compile(rb'^content-disposition:\s*form-data;.*?\bname="?([^";\r\n]*)', re.IGNORECASE | re.MULTILINE)
MAX_PARTS = 1000
_HEAD = 16 * 1024
"""Bytes in which the headers of a part are looked for."""


def boundary_of(content_type: str) -> bytes:
    """What separates the fields of a form. Raises: BadRequest if this header is not that of a form."""
    header = Message()
    header["Content-Type"] = content_type
    try:
        boundary = header.get_boundary("")
        is_form = header.get_content_type() == "multipart/form-data"
    except ValueError:  # both UTF-8 and other bytes
        is_form = False
    if not is_form or not boundary:
        raise BadRequest("the request body must be multipart/form-data", code="invalid_form")
    return boundary.encode("utf-8", "surrogateescape")


class Form:
    """A form as a list of parts, each from behind the line break that follows its boundary to the next boundary."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._parts: list[bytes] = []
        self._names: list[str] = []
        """Of the fields; those are all parts but the first and the last."""

    @classmethod
    def of(cls, content_type: str) -> Self:
        """An empty form with the boundary of this header. Raises: BadRequest if it is no form."""
        return cls(boundary_of(content_type))

    def parse(self, body: bytes) -> Self:
        """Read `body`. Raises: BadRequest if it is not a complete form, or has over `MAX_PARTS` fields."""
        self._parts = (b"\r\n" + body).split(b"\r\n" + self._delimiter, MAX_PARTS + 2)
        if len(self._parts) > MAX_PARTS + 2:
            raise BadRequest(f"the form has over {MAX_PARTS} fields", status=413, code="request_too_large")
        if len(self._parts) < 2 or not self._parts[-1].startswith(b"--"):
            raise BadRequest("the form in the request body is not complete", code="invalid_form")
        self._names = [_named(part) for part in self._parts[1:-1]]
        return self

    def text(self, name: str) -> str:
        """The text of the first field of that name; empty if there is none."""
        if name not in self._names:
            return ""
        return self._parts[1 + self._names.index(name)].partition(b"\r\n\r\n")[2].decode(errors="replace")

    def with_text(self, name: str, value: str) -> bytes:
        """The whole body, with this text in each field of that name, which is added if there is none."""
        named = zip(self._parts[1:-1], self._names, strict=True)
        parts = [self._replaced(part, value) if called == name else part for part, called in named]
        if name not in self._names:
            parts.append(f'\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
        return (b"\r\n" + self._delimiter).join([self._parts[0], *parts, self._parts[-1]]).removeprefix(b"\r\n")

    @staticmethod
    def _replaced(part: bytes, value: str) -> bytes:
        head, end, _ = part.partition(b"\r\n\r\n")
        return head + end + value.encode()


def _named(part: bytes) -> str:
    """The name of the field, from its headers."""
    found = _NAME.search(part[:_HEAD].partition(b"\r\n\r\n")[0])
    return found[1].decode(errors="replace") if found else ""
