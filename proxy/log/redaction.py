"""Keeps secrets out of the log: the values of those that are known, and what has the form of one.

All of it takes linear time, and is bounded: the log may quote what a client has sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

SECRET = "***"
SHORTEST = 6
"""Shorter values are no secrets: blanking them would blank words."""
SHORTEST_WORD = 8
"""The same for values of letters alone, such as `ollama`, which servers get that check no key."""
MOST_KNOWN = 1000
"""Most values that are known at one time; the newest ones."""

_NAMES = r"(?:[\w-]{0,40}[-_])?(?:api[-_]?key|secret|password|passwd)|[\w-]{0,40}[-_](?:token|auth|assertion)"
_SHAPES = re.compile(
    # a header: all that follows, or all in the same quotes
    r"""(?P<line>(?<![\w-])(?:(?:proxy-)?authorization|(?:set-)?cookie2?)["']?\x20{0,4}[:=]\x20{0,4}(?P<mark>["'])?)"""
    r"""(?(mark)(?:(?!(?P=mark))[^\r\n])+|[^\r\n]+)"""
    # a field or a setting: its name, and what separates it from its value
    rf"""|(?P<name>(?<![\w-])(?:{_NAMES})["']?\x20{{0,4}}[:=]\x20{{0,4}}["']?)[^\s"',;&}})\]]+"""
    # a parameter in a URL
    r"|(?P<parameter>[?&](?:key|keys|token|sig|signature|auth|jwt|pass|credential)=)[^\s&\"'#]+"
    # a value behind its scheme
    r"|(?P<scheme>(?<!\w)(?:bearer|basic)[\s\0:]{1,8})[\w.~+/=-]{6,}"
    # user and password in a URL
    r"|(?P<user>://)[^\s/@\"']{1,400}@"
    # what providers begin their keys with
    r"|(?<![\w])(?:sk|pk|rk|gsk|xai|lsp)-[\w-]{8,}|(?<!\w)(?:hf|gsk|ghp|gho|glpat|github_pat|lsp|nvapi)[_-][\w-]{8,}"
    r"|(?<!\w)eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?|(?<!\w)AIza[\w-]{20,}",
    re.IGNORECASE,
)

_known: dict[str, None] = {}


def hide(secrets: Iterable[str]) -> None:
    """Blank these values in all that is logged from now on, as they are and as they are in a URL."""
    for secret in secrets:
        for form in (secret.strip(), quote(secret.strip(), safe="")):
            if len(form) >= (SHORTEST_WORD if form.isalpha() else SHORTEST):
                _known.pop(form, None)
                _known[form] = None
    for oldest in list(_known)[:-MOST_KNOWN]:
        del _known[oldest]


def redacted(text: str) -> str:
    """`text` without secrets."""
    for secret in list(_known):
        if secret in text:
            text = text.replace(secret, SECRET)
    return _SHAPES.sub(_blanked, text)


def _blanked(found: re.Match[str]) -> str:
    kind = found.lastgroup
    if kind is None:
        return SECRET
    return f"{found[kind]}{SECRET}" + ("@" if kind == "user" else "")
