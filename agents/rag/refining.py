"""Refinement: passages are decomposed into strips, of which those that concern the query are kept. No I/O.

The default grade of a strip is the share of the query's words that it has: that costs microseconds, where a model would
cost a call for each passage. A passage that shares no word with the query was found by its meaning, and is kept whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from llama_smart_proxy import strips

SHORT = 400
"""Characters of a passage that is not worth taking apart."""
STEM = 6
"""Characters of a word that are compared: `install` and `installing` are the same."""
GAP = "[...]"
"""What stands for strips that were left out."""
_WORD = re.compile(r"\w+")
_FILLERS = frozenset(
    [
        *("a", "an", "and", "are", "as", "at", "be", "by", "can", "could", "did", "do", "does", "for", "from", "get"),
        *("has", "have", "how", "i", "if", "in", "is", "it", "its", "me", "my", "of", "on", "or", "please", "should"),
        *("tell", "that", "the", "their", "them", "there", "this", "to", "use", "was", "we", "what", "when", "where"),
        *("which", "who", "why", "will", "with", "would", "you", "your"),
        *("auf", "das", "dem", "den", "der", "die", "ein", "eine", "es", "ich", "im", "ist", "mit", "oder", "und"),
        *("von", "was", "welche", "wer", "wie", "wo", "wird", "zu"),
        *("comment", "de", "des", "est", "et", "la", "le", "les", "que", "qui", "un", "une"),
        *("como", "cual", "el", "en", "las", "los", "para", "por", "se", "una", "y"),
    ]
)
"""Words that do not say what a question is about, in English, German, French and Spanish."""


@lru_cache(maxsize=256)
def words_of(text: str) -> frozenset[str]:
    """The words of a query that say what it is about, shortened to be compared; all of them if there are no such."""
    found = [word.lower() for word in _WORD.findall(text)]
    telling = [word for word in found if word not in _FILLERS and len(word) > 1]
    return frozenset(word[:STEM] for word in telling or found)


def coverage(query: str, text: str) -> float:
    """The share of the query's words that are in `text`, 0 to 1."""
    wanted = words_of(query)
    if not wanted:
        return 0.0
    return len(wanted & {word[:STEM].lower() for word in _WORD.findall(text)}) / len(wanted)


def recomposed(heading: str, parts: Sequence[str], kept: Sequence[bool]) -> str:
    """The text of the strips that are kept, and of those beside them, as a sentence is often understood with its
    neighbours only; behind the heading, if that would be lost."""
    written: list[str] = []
    for at, part in enumerate(parts):
        if any(kept[max(0, at - 1) : at + 2]):
            written.append(part)
        elif not written or written[-1] != GAP:
            written.append(GAP)
    text = "\n".join(written)
    return text if not heading or text.startswith(heading) else f"{heading}\n{text}"


def refined(query: str, heading: str, text: str, grade: Callable[[str], float] | None = None) -> str:
    """The parts of a passage that concern the query; `grade` of a strip is 0 if it does not."""
    if len(text) <= SHORT:
        return text
    parts = strips(text)
    graded = grade or (lambda part: coverage(query, part))
    kept = [graded(part) > 0 for part in parts]
    return text if all(kept) or not any(kept) else recomposed(heading, parts, kept)
