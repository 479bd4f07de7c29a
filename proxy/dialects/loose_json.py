"""JSON as servers written in Python, JavaScript or C++ send it."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

_CONSTANTS = {"-Infinity": -9999.0, "Infinity": 9999.0}
"""OpenAI's API sends -9999.0 as the log-probability of an impossible token; clients require a number."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def loose_json(data: bytes) -> Any:
    """The value of `data`, in which NaN is null, Infinity a number, half an emoji U+FFFD, and texts may have line ends.

    Raises: ValueError for anything else that is not JSON.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(data, strict=False, parse_constant=_CONSTANTS.get)
            return orjson.loads(_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False)))
        except RecursionError as exc:
            raise ValueError("nested too deeply") from exc
