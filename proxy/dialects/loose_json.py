"""JSON as servers written in Python, JavaScript or C++ send it."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

_SURROGATE = re.compile("[\ud800-\udfff]")


def loose_json(data: bytes) -> Any:
    """The value of `data`, in which NaN and Infinity are null, half an emoji is U+FFFD, and texts may have line ends:
    Python's `json.dumps` writes the first ones, such as the log-probability of an impossible token.

    Raises: ValueError for anything else that is not JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(data, strict=False, parse_constant=lambda _: None)
            return orjson.loads(_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False)))
        except RecursionError as exc:
            raise ValueError("nested too deeply") from exc
