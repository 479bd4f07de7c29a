"""Finds patterns in a text that arrives in pieces, delaying only what may be the beginning of a match."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import regex

T = TypeVar("T")

HOLD = 256
"""Maximum number of characters that are delayed for a possible match."""
GROWTH = 16
"""For a match that may still grow, the maximum is multiplied by this factor."""
BEHIND = 256
"""Characters already returned that look-behinds can still see."""
TIMEOUT_S = 1.0
"""Time limit in seconds for one search, of a million characters at most: some patterns take exponential time."""
PATIENT = 512
"""With more characters delayed, a search is repeated only when there are an eighth more of them: with one for each
token, the time would grow with the square of the length."""
PIECE = 1024
"""Characters of a long text that are added at a time."""
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
"""Zero-width assertions about the next character, in a form for which `regex` reports partial matches."""
_JSON_VALUE = regex.compile(r'"(?:[^"\\]|\\.)*+"|-?\d[\d.eE+-]*+')


class PatternTooSlow(TimeoutError):
    """A search exceeded its time limit."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """One pattern. `check` validates a match: it returns the length to use, 0 to reject it."""

    name: str
    pattern: Any
    replacement: str
    check: Callable[[str], int] = len
    open: Any = field(init=False)
    """Never matches, but has a partial match wherever `pattern` depends on characters beyond the end of the text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "open", regex.compile(_open(self.pattern)))

    def find(self, text: str, start: int, end: int) -> tuple[int, int] | None:
        """The first match in `text[start:end]`, as if the text ended there. Raises: PatternTooSlow."""
        while (found := self._search(self.pattern, text, start, end)) is not None:
            size = self.check(found[0]) if found[0] else 0
            if size:
                return found.start(), found.start() + size
            start = found.start() + 1
        return None

    def undecided(self, text: str, start: int, end: int) -> int:
        """The first position from `start` on where text after `end` may change the result; `end` if there is none.
        Raises: PatternTooSlow."""
        found = self._search(self.open, text, start, end, partial=True)
        return end if found is None else int(found.start())

    def _search(self, pattern: Any, text: str, start: int, end: int, *, partial: bool = False) -> Any:
        limit_s = TIMEOUT_S * max(1.0, (end - start) / 1e6)
        try:
            return pattern.search(text, start, end, partial=partial, timeout=limit_s)
        except TimeoutError:
            raise PatternTooSlow(f"the pattern {self.name} took over {limit_s:g} s for one text") from None


def _open(pattern: Any) -> str:
    verbose, multiline = pattern.flags & regex.VERBOSE, pattern.flags & regex.MULTILINE
    known = _LOOKAHEADS | ({"$": r"(?![^\n])"} if multiline else {})
    token = (r"#[^\n]*|" if verbose else "") + _TOKEN
    source = regex.sub(token, lambda found: known.get(found[0], found[0]), pattern.pattern, flags=regex.DOTALL)
    return f"(?:{source}\n)(*FAIL)" if verbose else f"(?:{source})(*FAIL)"


def compiled(name: str, pattern: str, replacement: str | None = None) -> Matcher:
    """A matcher; its replacement defaults to its name in brackets. Raises: ValueError for an invalid pattern, one that
    matches the empty text, and one that does not search forward."""
    try:
        found = regex.compile(pattern)
    except regex.error as exc:
        raise ValueError(f"the pattern {name} is not a regular expression: {exc}") from None
    if found.search("") is not None:
        raise ValueError(f"the pattern {name} matches the empty text")
    if found.flags & regex.REVERSE or {r"\K", r"\G"} & set(regex.findall(_TOKEN, pattern)):
        raise ValueError(rf"the pattern {name} has (?r), \K or \G, which require a complete text")
    return Matcher(name, found, f"[{name}]" if replacement is None else replacement)


Naming = Callable[[Matcher, str], str]
"""Returns the replacement of a match."""


def by_replacement(matcher: Matcher, found: str) -> str:
    """The matcher's replacement."""
    return matcher.replacement


def matches(matchers: Sequence[Matcher], text: str, start: int, end: int) -> Iterator[tuple[int, int, Matcher]]:
    """The matches in `text[start:end]`, as if the text ended there: from left to right, without overlaps; of two at the
    same position, the one of the first matcher."""
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


Steps = Generator[None, None, T]
"""Work in small steps, each of which ends at a `yield`, so that others can go on in between; it returns the result."""


def result_of(steps: Steps[T]) -> T:
    """The result of `steps`, which are all done now."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


def scrubbing(matchers: Sequence[Matcher], text: str, naming: Naming = by_replacement) -> Steps[str]:
    """Replace the matches in a complete text; they may have any length."""
    written, position = [], 0
    for start, end, matcher in matches(matchers, text, 0, len(text)):
        written += [text[position:start], naming(matcher, text[start:end])]
        position = end
        yield
    return "".join([*written, text[position:]])


def scrubbed(matchers: Sequence[Matcher], text: str, naming: Naming = by_replacement) -> str:
    """`scrubbing`, at once."""
    return result_of(scrubbing(matchers, text, naming))


def scrubbing_json(matchers: Sequence[Matcher], text: str, naming: Naming = by_replacement) -> Steps[str]:
    """Replace the matches within the strings and numbers of a JSON text, which stays valid; else as `scrubbing`."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return (yield from scrubbing(matchers, text, naming))
    written, position = [], 0
    for found in _JSON_VALUE.finditer(text):
        value: str = found[0]
        plain = json.loads(value) if value[0] == '"' else value
        clean = yield from scrubbing(matchers, plain, naming)
        if clean != plain:
            written += [text[position : found.start()], json.dumps(clean, ensure_ascii=value.isascii())]
            position = found.end()
        yield
    return "".join([*written, text[position:]])


def _patience(held: int) -> int:
    return held + held // 8 if held > PATIENT else 0


class Scrubber:
    """Replaces matches in a text that arrives in pieces: `feed` returns what is decided, `end` the rest. The result
    does not depend on how the text is split, and equals that of `scrubbed` unless a match takes over `hold` characters.

    A possible match of more than `hold` characters is passed, beginning with its first character; an actual match that
    still grows is cut at `GROWTH` times that. `feeding` and `ending` are the same in steps, for long texts. All of them
    raise: PatternTooSlow.
    """

    def __init__(self, matchers: Sequence[Matcher], hold: int, naming: Naming = by_replacement) -> None:
        self._matchers = matchers
        self._hold = hold
        self._naming = naming
        self._text = ""
        self._position = 0  # text before it was returned, and is kept for look-behinds
        self._enough = 0  # characters delayed, below which a search would find no more than the last one

    @property
    def holds(self) -> bool:
        """Whether any text is delayed."""
        return self._position < len(self._text)

    @property
    def held(self) -> int:
        """The number of characters that are delayed."""
        return len(self._text) - self._position

    def feed(self, text: str) -> str:
        self._add(text)
        return "".join(self._steps(ended=False))

    def end(self) -> str:
        return "".join(self._steps(ended=True))

    def feeding(self, text: str) -> Steps[str]:
        written = []
        for start in range(
            0, len(text), PIECE
        ):  # a search takes longer in a longer text, also if it is in a part of it
            self._add(text[start : start + PIECE])
            for piece in self._steps(ended=False):
                written.append(piece)
                yield
        return "".join(written)

    def ending(self) -> Steps[str]:
        written = []
        for piece in self._steps(ended=True):
            written.append(piece)
            yield
        return "".join(written)

    def _add(self, text: str) -> None:
        behind = min(self._position, BEHIND)
        self._text = self._text[self._position - behind :] + text
        self._position = behind

    def _steps(self, *, ended: bool) -> Iterator[str]:
        """No step looks further than `hold` ahead: otherwise the result would depend on how much has arrived."""
        if not ended and self.held < self._enough:
            return
        self._enough = 0
        while self.holds:
            window = min(len(self._text), self._position + self._hold)
            whole = ended and window == len(self._text)
            decided = window if whole else self._decided(window)
            found = next(matches(self._matchers, self._text, self._position, window), None)
            if found is not None and found[0] < decided:
                yield self._replaced(*found)
            elif decided > self._position:
                yield self._passed(decided)
            elif window < self._position + self._hold:
                self._enough = _patience(self.held)
                return
            elif found is None or found[0] > self._position:
                yield self._passed(self._position + 1)
            elif (grown := self._grown(ended)) is None:
                self._enough = _patience(self.held)
                return
            else:
                yield grown

    def _decided(self, end: int) -> int:
        """The position up to which text after `end` cannot change the result."""
        return min((matcher.undecided(self._text, self._position, end) for matcher in self._matchers), default=end)

    def _grown(self, ended: bool) -> str | None:
        """The output for a match that begins here and may grow; None if that is undecided."""
        longest = self._position + self._hold * GROWTH
        window = min(len(self._text), longest)
        whole = window == longest or ended
        if not whole and self._decided(window) == self._position:
            return None
        found = next(matches(self._matchers, self._text, self._position, window), None)
        here = found is not None and found[0] == self._position
        return self._replaced(*found) if found is not None and here else self._passed(self._position + 1)

    def _passed(self, position: int) -> str:
        text, self._position = self._text[self._position : position], position
        return text

    def _replaced(self, start: int, end: int, matcher: Matcher) -> str:
        return self._passed(start) + self._naming(matcher, self._passed(end))
