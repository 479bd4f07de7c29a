"""Text that is not valid Unicode: cut emoji and other lone surrogates, and broken UTF-8.

Chat UIs cut texts at any UTF-16 unit, and tools read files in any encoding. Ollama and llama-server accept such texts,
so a chat must not fail for them.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

from llama_smart_proxy.proxy.errors import BadRequest

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES = ("model", "name", "source", "destination", "from")
"""Fields of the APIs that name a model. A name with another character in it would be another model's."""
_ESCAPES = (b"\\ud", b"\\uD")
"""How the escape of a surrogate begins, lone or not."""

MARK = "\udcff"
"""What `decoded` puts in place of invalid UTF-8: unlike U+FFFD, it cannot come from the client's own text."""
MAX_INVALID = 1_000_000
"""Most bytes of invalid UTF-8 in a body. Each takes a call of Python: 32 MiB of them would take the thread for large
bodies a quarter of a minute."""
_HANDLER = "llama_smart_proxy.mark"
codecs.register_error(_HANDLER, lambda error: (MARK, error.end))  # type: ignore[attr-defined]


def decoded(raw: bytes) -> tuple[str, bool]:
    """`raw` as text, with `MARK` for each invalid sequence of UTF-8, and whether it may have lone surrogates once it is
    parsed as JSON. Raises: BadRequest for over `MAX_INVALID` invalid bytes."""
    try:
        return raw.decode(), any(escape in raw for escape in _ESCAPES)
    except UnicodeDecodeError:
        if len(raw) - len(raw.decode(errors="ignore").encode()) > MAX_INVALID:
            raise BadRequest("the request body is not valid UTF-8", code="invalid_json") from None
        return raw.decode(errors=_HANDLER), True


def repaired(value: Any) -> Any:
    """The JSON `value` with U+FFFD for each lone surrogate in its texts. Raises: BadRequest if a key has any."""
    if isinstance(value, str):
        return value if _is_whole(value) else _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [repaired(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not all(map(_is_whole, filter(lambda key: isinstance(key, str), value))):
        raise BadRequest("the request body has a key that is not valid Unicode", code="invalid_json")
    return {key: repaired(item) for key, item in value.items()}


def repaired_body(body: dict[str, Any]) -> dict[str, Any]:
    """`repaired` for a whole request. Raises: BadRequest also if the name of a model has lone surrogates."""
    if not all(_is_whole(name) for key in _NAMES if isinstance(name := body.get(key), str)):
        raise BadRequest("the name of the model is not valid Unicode", code="invalid_json", param="model")
    result: dict[str, Any] = repaired(body)
    return result


def _is_whole(text: str) -> bool:
    return text.isascii() or _SURROGATE.search(text) is None
