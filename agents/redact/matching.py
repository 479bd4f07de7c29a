"""Finds patterns in a text that arrives piece by piece, holding back no more than may be the beginning of a match."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

HOLD = 256
"""Characters that are held back at most for a match that is only possible."""
GROWTH = 16
"""A match that is there already, and may still grow, is waited for so many times as long."""
BEHIND = 256
"""Characters that have left, and that patterns still see by look-behinds."""
TIMEOUT_S = 1.0
"""Seconds that one pattern may take for one look: some take time in the power of a text's length."""
_TOKEN = r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|."
_LOOKAHEADS = {
    r"\b": r"(?:(?<=\w)(?!\w)|(?<!\w)(?=\w))",
    r"\B": r"(?:(?<=\w)(?=\w)|(?<!\w)(?!\w))",
    r"\m": r"(?:(?<!\w)(?=\w))",
    r"\M": r"(?:(?<=\w)(?!\w))",
    r"\Z": r"(?!(?s:.))",
    r"\z": r"(?!(?s:.))",
    "$": r"(?=\n?(?!(?s:.)))",
}
"""What looks at the next character without taking it, in a form that `regex` finds partial matches for."""
_JSON_VALUE = regex.compile(r'"(?:[^"\\]|\\.)*+"|-?\d[\d.eE+-]*+')


class PatternTooSlow(TimeoutError):
    """A pattern took longer for one text than it may."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """One pattern. `check` has the last word about what it finds: how much of that is meant, 0 for nothing."""

    name: str
    pattern: Any
    replacement: str
    check: Callable[[str], int] = len
    open: Any = field(init=False)
    """Never matches, and has a partial match wherever `pattern` looks beyond the end of the text: on its way to a
    match, or to a longer one, or to see that there is none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "open", regex.compile(_open(self.pattern)))

    def find(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """The first match in `text[start:end]`, as if nothing came behind. Raises: PatternTooSlow."""
        while (found := self._search(self.pattern, text, start, end)) is not None:
            size = self.check(found[0]) if found[0] else 0
            if size:
                return found.start(), found.start() + size
            start = found.start() + 1
        return None

    def undecided(self, text: str, start: int, end: int) -> int:
        """The first place from `start` on where what comes behind `text[:end]` may change what is found there; `end` if
        there is none before. Raises: PatternTooSlow."""
        found = self._search(self.open, text, start, end, partial=True)
        return end if found is None else int(found.start())

    def _search(self, pattern: Any, text: str, start: int, end: int, *, partial: bool = False) -> Any:
        try:
            return pattern.search(text, start, end, partial=partial, timeout=TIMEOUT_S)
        except TimeoutError:
            raise PatternTooSlow(f"the pattern {self.name} took over {TIMEOUT_S:g} s for one text") from None


def _open(pattern: Any) -> str:
    verbose, multiline = pattern.flags & regex.VERBOSE, pattern.flags & regex.MULTILINE
    known = _LOOKAHEADS | ({"$": r"(?![^\n])"} if multiline else {})
    token = (r"#[^\n]*|" if verbose else "") + _TOKEN
    source = regex.sub(token, lambda found: known.get(found[0], found[0]), pattern.pattern, flags=regex.DOTALL)
    return f"(?:{source}\n)(*FAIL)" if verbose else f"(?:{source})(*FAIL)"


def compiled(name: str, pattern: str, replacement: str | None = None) -> Matcher:
    """A matcher whose replacement, unless given, is its name in brackets. Raises: ValueError with the text of `regex`,
    also for a pattern that matches the empty text, which is everywhere, and for one that does not go forward."""
    try:
        found = regex.compile(pattern)
    except regex.error as exc:
        raise ValueError(f"the pattern {name} is no regular expression: {exc}") from None
    if found.search("") is not None:
        raise ValueError(f"the pattern {name} matches the empty text")
    if found.flags & regex.REVERSE or {r"\K", r"\G"} & set(regex.findall(_TOKEN, pattern)):
        raise ValueError(rf"the pattern {name} has (?r), \K or \G, for which a text must have ended")
    return Matcher(name, found, f"[{name}]" if replacement is None else replacement)


Naming = Callable[[Matcher, str], str]
"""What stands in the place of a match."""


def by_replacement(matcher: Matcher, found: str) -> str:
    """The matcher's replacement."""
    return matcher.replacement


def matches(matchers: Sequence[Matcher], text: str, start: int, end: int) -> Iterator[tuple[int, int, Matcher]]:
    """The matches in `text[start:end]`, as if nothing came behind: from left to right, none within another; of two that
    begin together that of the first matcher."""
    found = {matcher: span for matcher in matchers if (span := matcher.find(text, start, end)) is not None}
    while found:
        first = min(found, key=lambda matcher: found[matcher][0])
        begin, stop = found[first]
        yield begin, stop, first
        for matcher in [matcher for matcher, span in found.items() if span[0] < stop]:
            if (span := matcher.find(text, stop, end)) is None:
                del found[matcher]
            else:
                found[matcher] = span


def scrubbed(matchers: Sequence[Matcher], text: str, naming: Naming = by_replacement) -> str:
    """A text that is there as a whole; matches may be of any length."""
    written, place = [], 0
    for start, end, matcher in matches(matchers, text, 0, len(text)):
        written += [text[place:start], naming(matcher, text[start:end])]
        place = end
    return "".join([*written, text[place:]])


def scrubbed_json(matchers: Sequence[Matcher], text: str, naming: Naming = by_replacement) -> str:
    """The same within the texts and numbers of a JSON text, which stays one; what is no JSON is just a text."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return scrubbed(matchers, text, naming)

    def value(found: Any) -> str:
        written: str = found[0]
        text = json.loads(written) if written[0] == '"' else written
        clean = scrubbed(matchers, text, naming)
        return written if clean == text else json.dumps(clean, ensure_ascii=written.isascii())

    return str(_JSON_VALUE.sub(value, text))


class Scrubber:
    """One text on its way: `feed` gives what can leave, `end` the rest. However it is cut into pieces, the same comes
    out; and the same as of the whole, as long as there is nothing longer than `hold` that might have become a match.

    What may become a match for longer than `hold` characters is let go, from its first character on; one that is there
    already and still grows is cut at `GROWTH` times that. Raises: PatternTooSlow.
    """

    def __init__(self, matchers: Sequence[Matcher], hold: int, naming: Naming = by_replacement) -> None:
        self._matchers = matchers
        self._hold = hold
        self._naming = naming
        self._text = ""
        self._place = 0  # what is before it has left, and is kept as far as patterns may look back

    @property
    def holds(self) -> bool:
        """Whether anything is held back."""
        return self._place < len(self._text)

    def feed(self, text: str) -> str:
        behind = min(self._place, BEHIND)
        self._text = self._text[self._place - behind :] + text
        self._place = behind
        return "".join(self._steps(ended=False))

    def end(self) -> str:
        return "".join(self._steps(ended=True))

    def _steps(self, *, ended: bool) -> Iterator[str]:
        """No step looks further than `hold` from where it stands: else it would depend on how much is there already."""
        while self.holds:
            window = min(len(self._text), self._place + self._hold)
            whole = ended and window == len(self._text)
            decided = window if whole else self._decided(window)
            found = next(matches(self._matchers, self._text, self._place, window), None)
            if found is not None and found[0] < decided:
                yield self._replaced(*found)
            elif decided > self._place:
                yield self._passed(decided)
            elif window < self._place + self._hold:
                return
            elif found is None or found[0] > self._place:
                yield self._passed(self._place + 1)
            elif (grown := self._grown(ended)) is None:
                return
            else:
                yield grown

    def _decided(self, end: int) -> int:
        """Up to where it does not matter what comes behind `end`."""
        return min((matcher.undecided(self._text, self._place, end) for matcher in self._matchers), default=end)

    def _grown(self, ended: bool) -> str | None:
        """What becomes of a match that begins here and may grow; None if that is still open."""
        longest = self._place + self._hold * GROWTH
        window = min(len(self._text), longest)
        whole = window == longest or ended
        if not whole and self._decided(window) == self._place:
            return None
        found = next(matches(self._matchers, self._text, self._place, window), None)
        here = found is not None and found[0] == self._place
        return self._replaced(*found) if found is not None and here else self._passed(self._place + 1)

    def _passed(self, place: int) -> str:
        text, self._place = self._text[self._place : place], place
        return text

    def _replaced(self, start: int, end: int, matcher: Matcher) -> str:
        return self._passed(start) + self._naming(matcher, self._passed(end))
