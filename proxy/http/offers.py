"""Requests that offer another protocol, among the bytes of a client.

aiohttp loses what follows such a request within one piece. So what may contain one is passed on in pieces of which one
begins wherever a request may begin.
"""

from __future__ import annotations

import re
from itertools import pairwise

_METHODS = b"(?:DELETE|GET|HEAD|OPTIONS|PATCH|POST|PUT)"
_REQUEST = re.compile(_METHODS + rb" +[^ \r\n]++ +HTTP/1")
_CUT_REQUEST = re.compile(_METHODS + rb" +[^ \r\n]*+(?: +[HTP/]*)?\Z")
_LONGEST_METHOD = len("OPTIONS")
_NAMES = (b"pgrade", b"PGRADE")
_LETTERS = frozenset(b"pgradPGRAD")


class Offers:
    """Whether one client may have made an offer; once it may have, that stays so."""

    def __init__(self) -> None:
        self.found = False
        self._in_body = False
        self._end = b""  # which may be the beginning of the name

    def body_begins(self) -> None:
        """All that came belongs to the request whose body is being received: a next one has a line end in front of its
        headers, which JSON and base64 seldom have; and that is found twenty times as fast as the name."""
        self._in_body = not self.found

    def look(self, data: bytes) -> bool:
        """Whether there is one in `data`, or was one before."""
        if self.found:
            return True
        if self._in_body and b"\r" not in data:
            return False
        self._in_body = False
        seen, self._end = self._end + data if self._end else data, data[-5:] if data[-1] in _LETTERS else b""
        self.found = _NAMES[0] in seen or _NAMES[1] in seen
        return self.found


def split_before_requests(data: bytes, longest: int) -> list[bytes]:
    """`data` in pieces, of which one begins wherever a request may begin; further cuts do no harm. The end of `data`
    may cut the first line of a request in two, even its method, and so may its last `longest` bytes."""
    end = len(data)
    cuts = {0, end, *range(max(0, end - _LONGEST_METHOD), end)}
    cuts.update(found.start() for found in _CUT_REQUEST.finditer(data, max(0, end - longest)))
    if b" HTTP/1" in data:
        cuts.update(found.start() for found in _REQUEST.finditer(data))
    return [data[start:stop] for start, stop in pairwise(sorted(cuts))]
