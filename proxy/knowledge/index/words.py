"""Words of a text as numbers: what text search and the sparse vectors of a server have in common.

A term is the CRC-32 of a word's stem, so no vocabulary is kept. Two of a million words have the same number by chance
about a hundred times, which costs less rank than a stop word does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from zlib import crc32

_WORD = re.compile(r"[^\W_]+")
_LETTERS = bytes(byte if chr(byte).isalnum() else 32 for byte in range(128)).ljust(256)
"""ASCII's letters and digits, and blanks for all else."""
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")
"""Scripts that are written without spaces, or whose words have endings: they are cut into pairs of characters."""
LONGEST = 40
"""Bytes of a word that count: base64 and the like have no use for a search."""
KEPT = 100_000
"""Words whose terms are remembered."""


def terms(text: str) -> list[int]:
    """The terms of a text, in order, each below 2**32."""
    lower = text.lower()
    if lower.isascii():
        words = lower.encode().translate(_LETTERS).split()
    else:
        words = [part.encode(errors="replace") for word in _WORD.findall(lower) for part in _parts(word)]
    if len(_known) > KEPT:
        _known.clear()
    return list(map(_known.__getitem__, words))


def question_terms(question: str) -> list[int]:
    """The terms of a question, without the words that only make it one, unless there are no others."""
    found = terms(question)
    return [term for term in found if term not in _QUESTION] or found


class _Terms(dict[bytes, int]):
    def __missing__(self, word: bytes) -> int:
        term = self[word] = crc32(stem(word[:LONGEST]))
        return term


_known = _Terms()


def stem(word: bytes) -> bytes:
    """A word in lower case without its English endings; other languages keep theirs."""
    if len(word) < 4 or not word.isascii():
        return word
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: len(word) - len(ending)] + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in b"aeiouls":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1:] == b"e" else word


_ENDINGS = (
    (b"sses", b"ss"), (b"ies", b"y"), (b"ied", b"y"), (b"ings", b""), (b"ing", b""), (b"edly", b""), (b"ed", b""),
    (b"ss", b"ss"), (b"us", b"us"), (b"is", b"is"), (b"s", b""),
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


_QUESTION = frozenset(
    terms(
        "a about all also am an and any anyone are as at be been being but by can could did do does doing "
        "done for from get give had has have having help hers here him his how i if in into is it its just "
        "know let like make may me might mine must my need no not of on one or other our out over please "
        "shall she should show since so some such tell than that the their them then there these they this "
        "those to too under up us use used using very want was way we were what when where which while who "
        "whom whose why will with without would you your"
    )
)
"""English words of questions: texts that answer one do not contain them more often than others."""
