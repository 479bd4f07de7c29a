"""Finds patterns in a text that arrives piece by piece, holding back no more than may be the beginning of a match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

HOLD = 256
"""Characters that are held back at most."""
CONTEXT = 64
"""Characters in front of what is looked at, which patterns see by `\\b` and look-behinds."""
TIMEOUT_S = 1.0
"""Seconds that one pattern may take for one look: some take time in the power of a text's length."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """One pattern. `check` has the last word about what it finds."""

    name: str
    pattern: Any
    replacement: str
    check: Callable[[str], bool] | None = None


def compiled(name: str, pattern: str, replacement: str | None = None) -> Matcher:
    """A matcher whose replacement, unless given, is its name in brackets. Raises: ValueError in the regex's own words,
    also for a pattern that matches the empty text, which is everywhere."""
    try:
        found = regex.compile(pattern)
    except regex.error as exc:
        raise ValueError(f"the pattern {name} is no regular expression: {exc}") from None
    if found.search("") is not None:
        raise ValueError(f"the pattern {name} matches the empty text")
    return Matcher(name, found, f"[{name}]" if replacement is None else replacement)


def _luhn(text: str) -> bool:
    """Whether these digits are the number of a card (ISO/IEC 7812: the Luhn algorithm)."""
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) >= 13 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _iban(text: str) -> bool:
    """Whether its check digits are right (ISO 13616: the number modulo 97 is 1)."""
    plain = text.replace(" ", "").upper()
    digits = "".join(str(int(char, 36)) for char in plain[4:] + plain[:4])
    return int(digits) % 97 == 1


def _preset(name: str, pattern: str, check: Callable[[str], bool] | None = None) -> Matcher:
    return Matcher(name, regex.compile(pattern), f"[{name}]", check)


PRESETS = {
    matcher.name: matcher
    for matcher in (
        _preset("email", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
        _preset("phone", r"(?<![\w+.])\+\d{1,3}(?:[ ./-]?(?:\(\d{1,4}\)|\d{1,4})){2,6}(?!\d)"),
        _preset("credit_card", r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])", _luhn),
        _preset("iban", r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}(?!\w)", _iban),
        _preset("ipv4", r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]\d)"),
        _preset(
            "api_key",
            r"(?<!\w)(?:sk-(?:[a-z]{2,10}-)?[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,80}"
            r"|github_pat_[A-Za-z0-9_]{22,100}|xox[abprs]-[A-Za-z0-9-]{10,100}|AKIA[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,50}"
            r"|AIza[A-Za-z0-9_-]{35}|glpat-[A-Za-z0-9_-]{20,50})(?![\w-])",
        ),
        _preset("jwt", r"(?<!\w)eyJ[\w-]{5,400}\.eyJ[\w-]{5,2000}\.[\w-]{10,1000}(?![\w-])"),
    )
}
"""Patterns by name. Where a format has check digits they are checked."""


class Scrubber:
    """One text on its way: `feed` gives what can leave, `end` the rest. However it is cut into pieces, the same comes
    out, as long as no match is longer than `hold` characters.

    `naming` says what stands in the place of a match, if not the matcher's replacement. Raises: TimeoutError for a
    pattern that takes too long.
    """

    def __init__(
        self, matchers: Sequence[Matcher], hold: int, naming: Callable[[Matcher, str], str] | None = None
    ) -> None:
        self._matchers = matchers
        self._hold = hold
        self._naming = naming
        self._before = ""  # what has left, as far as patterns may look back
        self._held = ""

    def feed(self, text: str) -> str:
        self._held += text
        return self._scrub(final=False)

    def end(self) -> str:
        return self._scrub(final=True) if self._held else ""

    def _scrub(self, *, final: bool) -> str:
        text, place = self._before + self._held, len(self._before)
        written: list[str] = []
        while place < len(text):
            matcher, start, end = self._next(text, place, final=final)
            start = max(start, place)
            written.append(text[place:start])
            place = start
            if matcher is not None:
                found = text[start:end]
                written.append(self._naming(matcher, found) if self._naming is not None else matcher.replacement)
                place = end
            elif len(text) - place > self._hold:
                written.append(text[place])  # it would be too long a match
                place += 1
            else:
                break
        self._before, self._held = text[max(0, place - CONTEXT) : place], text[place:]
        return "".join(written)

    def _next(self, text: str, place: int, *, final: bool) -> tuple[Matcher | None, int, int]:
        """The first match at or behind `place`; or no matcher, and where something begins that may become one."""
        best: tuple[Matcher | None, int, int] = (None, len(text), len(text))
        for matcher in self._matchers:
            at = place
            while True:
                found = matcher.pattern.search(text, at, partial=not final, timeout=TIMEOUT_S)
                if found is None or found.start() >= best[1]:
                    break
                open_end = not final and (found.partial or _may_grow(matcher, text, found))
                if not open_end and matcher.check is not None and not matcher.check(found.group()):
                    at = found.start() + 1
                    continue
                best = (None if open_end else matcher, found.start(), found.end())
                break
        return best


def _may_grow(matcher: Matcher, text: str, found: Any) -> bool:
    """Whether more text may make a match longer, or none: all there is from its start is the beginning of one."""
    if found.end() == len(text):
        return True
    return matcher.pattern.fullmatch(text, found.start(), partial=True, timeout=TIMEOUT_S) is not None
