"""Words of a text as numbers: what text search and the sparse vectors of a server have in common.

A term is the CRC-32 of a word's stem, so no vocabulary is kept. Two of a million words have the same number by chance
about a hundred times, which costs less rank than a stop word does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from zlib import crc32

_WORD = re.compile(r"[^\W_]+")
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")
"""Scripts that are written without spaces, or whose words have endings: they are cut into pairs of characters."""
LONGEST = 40
"""Characters of a word that count: base64 and the like have no use for a search."""


def terms(text: str) -> list[int]:
    """The terms of a text, in order, each below 2**32."""
    words = _WORD.findall(text.lower())
    if text.isascii():
        return [term(word) for word in words]
    return [term(part) for word in words for part in _parts(word)]


@lru_cache(maxsize=1 << 16)
def term(word: str) -> int:
    """The term of one word in lower case."""
    return crc32(stem(word[:LONGEST]).encode())


def stem(word: str) -> str:
    """A word without its English endings; other languages keep theirs."""
    if len(word) < 4 or not word.isascii():
        return word
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: len(word) - len(ending)] + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word


_ENDINGS = (
    ("sses", "ss"), ("ies", "y"), ("ied", "y"), ("ings", ""), ("ing", ""), ("edly", ""), ("ed", ""), ("ss", "ss"),
    ("us", "us"), ("is", "is"), ("s", ""),
)  # fmt: skip


def _parts(word: str) -> Iterator[str]:
    last = 0
    for run in _IDEOGRAPHS.finditer(word):
        if run.start() > last:
            yield word[last : run.start()]
        last = run.end()
        yield from (run[0][at : at + 2] for at in range(max(1, len(run[0]) - 1)))
    if last < len(word):
        yield word[last:]
