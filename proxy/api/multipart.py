"""Forms with files (`multipart/form-data`), of which one field is read and replaced, and the rest kept byte for byte.

Source: RFC 7578; RFC 2046 5.1.1.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import Self

from llama_smart_proxy.proxy.errors import BadRequest

_NAME = re.compile(rb'^content-disposition:\s*form-data;.*?\bname="?([^";\r\n]*)', re.IGNORECASE | re.MULTILINE)


class Form:
    """A form as a list of parts, each from behind the line break that follows its boundary to the next boundary."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._parts: list[bytes] = []

    @classmethod
    def of(cls, content_type: str) -> Self:
        """An empty form with the boundary of this header. Raises: BadRequest if it is no form."""
        header = Message()
        header["Content-Type"] = content_type
        boundary = header.get_boundary("")
        if header.get_content_type() != "multipart/form-data" or not boundary:
            raise BadRequest("the request body must be multipart/form-data", code="invalid_form")
        return cls(boundary.encode("utf-8", "surrogateescape"))

    def parse(self, body: bytes) -> Self:
        """Read `body`. Raises: BadRequest if it is not a complete form."""
        self._parts = (b"\r\n" + body).split(b"\r\n" + self._delimiter)
        if len(self._parts) < 2 or not self._parts[-1].startswith(b"--"):
            raise BadRequest("the form in the request body is not complete", code="invalid_form")
        return self

    def text(self, name: str) -> str:
        """The text of the first field of that name; empty if there is none."""
        for part in self._parts[1:-1]:
            head, _, value = part.partition(b"\r\n\r\n")
            if _named(head) == name:
                return value.decode(errors="replace")
        return ""

    def with_text(self, name: str, value: str) -> bytes:
        """The whole body, with this text in each field of that name, which is added if there is none."""
        parts = [self._replaced(part, name, value) for part in self._parts[1:-1]]
        if not any(_named(part.partition(b"\r\n\r\n")[0]) == name for part in parts):
            parts.append(f'\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
        return (b"\r\n" + self._delimiter).join([self._parts[0], *parts, self._parts[-1]]).removeprefix(b"\r\n")

    @staticmethod
    def _replaced(part: bytes, name: str, value: str) -> bytes:
        head, end, _ = part.partition(b"\r\n\r\n")
        return head + end + value.encode() if _named(head) == name else part


def _named(head: bytes) -> str:
    """The name of the field with these headers."""
    found = _NAME.search(head)
    return found[1].decode(errors="replace") if found else ""
