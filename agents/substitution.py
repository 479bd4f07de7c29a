"""`substitute`: replaces matches of a pattern in an answer while it streams."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import regex

from llama_smart_proxy.agents.redact.matching import HOLD, PIECE, Matcher, Scrubber, compiled
from llama_smart_proxy.proxy.chat import Chunk, ChunkStream


async def substitute(
    stream: ChunkStream, pattern: str | re.Pattern[str], replacement: str | Callable[[str], str], *, hold: int = HOLD
) -> AsyncIterator[Chunk]:
    """The answer `stream` with `replacement` for each match of `pattern` in its text; thoughts and tool calls stay.

    The result does not depend on where the pieces of the text end: what may be the beginning of a match is held back,
    up to `hold` characters. `replacement` is a text, or a function of the matched text. Raises: ValueError for a
    pattern that is no regular expression or matches the empty text.
    """
    matchers = [compiled("substitute", _source(pattern), replacement if isinstance(replacement, str) else "")]

    def naming(matcher: Matcher, found: str) -> str:
        return matcher.replacement if isinstance(replacement, str) else replacement(found)

    scrubbers: dict[int, Scrubber] = {}
    async for chunk in stream:
        if not chunk.choice:
            yield chunk
            continue
        scrubber = scrubbers.setdefault(chunk.index, Scrubber(matchers, hold, naming))
        held, text = scrubber.holds, chunk.text
        clean = await _fed(scrubber, text) if text else ""
        if scrubber.holds and (chunk.finish_reason or chunk.tool_calls or chunk.reasoning):
            clean += scrubber.end()
        if text and (held or clean != text):
            chunk.text = clean
        elif clean and not text:
            yield Chunk.of(clean, index=chunk.index)
        if chunk.text or not text or chunk.finish_reason or chunk.delta.keys() - {"content"}:
            yield chunk
    for index, scrubber in scrubbers.items():
        if rest := scrubber.end():
            yield Chunk.of(rest, index=index)


async def _fed(scrubber: Scrubber, text: str) -> str:
    if len(text) <= PIECE:
        return scrubber.feed(text)
    written = []
    for start in range(0, len(text), PIECE):
        written.append(scrubber.feed(text[start : start + PIECE]))
        await asyncio.sleep(0)  # others go on
    return "".join(written)


def _source(pattern: Any) -> str:
    """The pattern as a text, with the flags of a compiled one."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter in "aimsx" if pattern.flags & getattr(re, letter.upper()))
    if isinstance(pattern, regex.Pattern):
        flags = "".join(letter for letter in "aimsx" if pattern.flags & getattr(regex, letter.upper()))
    return f"(?{flags}){pattern.pattern}" if flags else str(pattern.pattern)
