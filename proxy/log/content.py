"""What is in chats: it is in the log only if `log_content` says so.

An exception in the code that handles requests may quote what a user has written, or a model: an agent raises
`ValueError(text)`, a server's error repeats its input. In records of that code only what cannot quote is shown of an
exception. With `log_content` everything is, and `Exchange` makes one line of each request and its answer.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import orjson

from llama_smart_proxy.proxy.errors import AgentError, Overloaded, ProxyError, StartFailed, UpstreamFailed
from llama_smart_proxy.proxy.log.streams import shortened

HINT = "log_content: true shows what it says"
MOST_TEXT = 1900
"""Characters of a prompt, and of an answer: both are in one line."""
MOST_BYTES = 64 * 1024
"""Bytes of an answer's beginning that are kept for that."""
_ROOMS = ("api", "dialects", "http", "middleware", "stream", "log.beside")
_QUOTING = ("agents", "aiohttp", "asyncio", *(f"proxy.{room}" for room in _ROOMS))
"""Loggers of the code that handles requests."""
_OWN_WORDS = (AgentError, Overloaded, StartFailed, UpstreamFailed)
"""Errors whose messages are the proxy's own, or are of a process that has no request yet."""
_DEEPEST = 10

logger = logging.getLogger(__name__)
Trace = tuple[Any, BaseException | None, TracebackType | None]


def may_quote(name: str) -> bool:
    """Whether exceptions in the records of this logger may quote a chat."""
    return name.startswith(_QUOTING)


def without_quotes(args: Any) -> Any:
    """The arguments of a record, with exceptions as `described` shows them."""
    if isinstance(args, Mapping):
        return args
    return tuple(described(arg) if isinstance(arg, BaseException) else arg for arg in args)


def described(exc: BaseException) -> str:
    """What kind of exception it is, with its message if that cannot quote a chat."""
    if isinstance(exc, _OWN_WORDS):
        return str(exc)
    if isinstance(exc, ProxyError):
        return f"{type(exc).__name__} {exc.status} {exc.code} ({HINT})"
    if isinstance(exc, OSError) and exc.strerror:
        return f"{type(exc).__name__}: {exc.strerror}"
    return f"{type(exc).__name__} ({HINT})"


def frames_of(exc: BaseException | None, depth: int = 0) -> str:
    """The traceback of an exception and its causes, with the lines of the program and without messages."""
    if exc is None or depth > _DEEPEST:
        return ""
    cause = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    text = f"{before}\nwhich led to:\n" if (before := frames_of(cause, depth + 1)) else ""
    text += f"Traceback (most recent call last):\n{''.join(traceback.format_tb(exc.__traceback__))}{described(exc)}"
    for inner in exc.exceptions if isinstance(exc, BaseExceptionGroup) else ():
        text += f"\nwith:\n{frames_of(inner, depth + 1)}"
    return text


class Exchange:
    """The prompt and the answer of one request, as far as they are logged."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        asked = {name: body[name] for name in _ASKED if name in body}
        self.prompt = orjson.dumps(asked, default=str).decode() if len(asked) != 1 else _text(*asked.values())
        self._data = bytearray()

    def heard(self, write: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """`write`, which passes on what the client gets."""

        def written(data: bytes) -> Any:
            self.add(data)
            return write(data)

        return written

    def add(self, data: bytes | None) -> None:
        """A part of the answer, in any API, in frames or whole."""
        if data and len(self._data) < MOST_BYTES:
            self._data += data

    def log(self, request_id: str) -> None:
        """Write the line."""
        answer = "".join(_texts_in(bytes(self._data)))
        logger.info("%s %s -> %s", request_id, shortened(self.prompt, MOST_TEXT), shortened(answer, MOST_TEXT))


_ASKED = ("system", "instructions", "messages", "prompt", "input", "query", "documents", "input_prefix", "input_suffix")
_SAID = frozenset({"content", "text", "thinking", "reasoning_content", "reasoning", "response", "arguments", "message"})
_WITHIN = frozenset(
    {"choices", "delta", "message", "content", "content_block", "output", "tool_calls", "function", "error"}
)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _texts_in(data: bytes) -> Iterator[str]:
    """The texts of an answer's frames, or of a whole one."""
    for line in data.split(b"\n"):
        line = line.removeprefix(b"data:").strip()
        if line.startswith(b"{"):
            try:
                yield from _texts_of(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue


def _texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _texts_of(item)
    elif isinstance(value, dict):
        if str(value.get("type", "")).startswith("response."):  # which repeats all of it at its end
            yield value["delta"] if isinstance(value.get("delta"), str) else ""
            return
        for name, item in value.items():
            if isinstance(item, str):
                yield item if name in _SAID else ""
            elif name in _WITHIN:
                yield from _texts_of(item)
