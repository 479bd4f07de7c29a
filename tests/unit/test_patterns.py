"""Regular expressions: none takes more time than in proportion to the text, and what is not bounded is not nested."""

from __future__ import annotations

import ast
import importlib
import re
import re._constants as codes  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.unit.test_architecture import OURS, calls, ours

REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
NESTED = {
    "backends.pool.causes._FOLDERS": "lines of a log of at most 300 characters, and folders end with a slash",
    "backends.weights.filenames._QUANTISATION": "names of files in a repository or folder, of 255 characters",
    "agents.rag.citing._CITED": "numbers between brackets, of three digits, each begins behind a comma",
    "agents.rag.citing._RUN": "citations, each of which begins with a bracket",
    "proxy.chat.sources._LINES": "lines, each of which begins with a number in brackets",
    "proxy.knowledge.reading.kinds.HTML_START": "the first 4096 bytes of a document",
    "proxy.knowledge.reading.tables.RULE": "cells of dashes, each of which begins with a bar",
    "backends.weights.hub_http.FILE": "names of at most 512 characters, by `hub.parse_name`, and of files",
}
"""Patterns with a repetition within another one, and why that does no harm."""
TRUSTED = (
    *("proxy.config.text.", "proxy.config.expansion.", "proxy.config.environment.", "backends.openai.VERSION"),
    *("agents.loader.", "backends.pool.launcher."),
)
"""Patterns for texts of the owner of this machine alone: the configuration, names of agents, the environment."""
BOUNDED = {
    "backends.weights.hub_cache.REPO": 512,  # by `hub.parse_name`
    "backends.weights.filenames.SPLIT": 512,
    "backends.weights.filenames._QUANTISATION": 512,
    "proxy.config.shapes._NAME": 512,
    "proxy.config.shapes._OLLAMA_NAME": 512,
}
"""Characters of the longest text for a pattern whose time is not proportional to it."""
MADE_ELSEWHERE = {
    "agents/shield.py": "patterns of the configuration",
    "proxy/chat/background.py": "a constant that is joined from its parts",
    "proxy/api/dispatcher.py": "paths of endpoints, for request targets of at most 16 KiB",
    "backends/pool/launcher.py": "names of variables in the configuration",
    "agents/redact/matching.py": "patterns of the configuration, with a time limit for each search",
    "agents/redact/presets.py": "likewise",
}
"""Where patterns come from that are not constants of a module."""
LENGTH, TIMES = 6000, 16
"""Characters of a text, and of how many times the length it is compared with."""
LITTLE_S = 0.01
"""Of processor time, in which a text of `LENGTH` is not worth comparing; quadratic time is some 0.3 s."""


@cache
def patterns() -> dict[str, re.Pattern[Any]]:
    """The compiled patterns of all modules, by module and name."""
    found: dict[str, re.Pattern[Any]] = {}
    for module in ours():
        if not module.path.endswith("__main__.py"):
            values = vars(importlib.import_module(f"{OURS}{module.name}"))
            constants = {name: value for name, value in values.items() if isinstance(value, re.Pattern)}
            defined = {target.id for node in module.tree.body for target in _targets(node)}
            found |= {f"{module.name}.{name}": value for name, value in constants.items() if name in defined}
    return found


def _targets(node: ast.stmt) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


@cache
def methods() -> dict[str, set[str]]:
    """How patterns are used, by their name alone."""
    used: dict[str, set[str]] = defaultdict(set)
    for module in ours():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used[node.value.id].add(node.attr)
    return used


def parsed(pattern: re.Pattern[Any]) -> Any:
    return parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE if isinstance(pattern.pattern, bytes) else 0)


def parts(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every node, with those that are within others."""
    for code, value in tree:
        yield code, value
        for inner in _within(value):
            yield from parts(inner)


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _within(item)


def is_nested(tree: Any) -> bool:
    """Whether an unbounded repetition is within another repetition."""
    return any(
        code in REPEATS and value[1] > 1 and any(inner in REPEATS and at[1] > 100 for inner, at in parts(value[2]))
        for code, value in parts(tree)
    )


def test_no_pattern_repeats_a_repetition() -> None:
    nested = {
        name for name, pattern in patterns().items() if not name.startswith(TRUSTED) and is_nested(parsed(pattern))
    }
    assert nested == NESTED.keys()
    assert [re.compile(text) for text in (r"(a+)+", r"(?:a*b?){2,}") if not is_nested(parsed(re.compile(text)))] == []


def test_patterns_are_constants_of_modules() -> None:
    functions = {"compile", "search", "match", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
    wrong = [
        f"{module.path}:{node.lineno}: {ast.unparse(node)}"
        for module in ours()
        if module.path not in MADE_ELSEWHERE
        for node, called in calls(module)
        if called in {f"re.{name}" for name in functions} | {f"regex.{name}" for name in functions}
        and not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
    ]
    assert wrong == []


def sample(tree: Any, repeats: int) -> str:
    """A text that the pattern matches, more or less."""
    text = ""
    for code, value in tree:
        if code in REPEATS or code is codes.POSSESSIVE_REPEAT:
            low, high, inner = value
            text += sample(inner, repeats) * max(low, min(high, repeats))
        elif code is codes.SUBPATTERN:
            text += sample(value[3], repeats)
        elif code is codes.BRANCH:
            text += sample(value[1][repeats % len(value[1])], repeats)
        elif code is codes.LITERAL:
            text += chr(value)
        elif code in (codes.IN, codes.ANY, codes.NOT_LITERAL):
            text += _one_of(code, value, repeats)
    return text


def _one_of(code: Any, value: Any, repeats: int) -> str:
    """A character that this class of them contains: with another number of repeats another one."""
    single = parser.SubPattern(parser.State(), [(code, value)])
    matches = re._compiler.compile(single, 0).fullmatch  # type: ignore[attr-defined]
    fitting = [char for char in 'a0 -_./:"{\\,;=~!<\n\r]%' if matches(char)]
    return fitting[repeats % len(fitting)] if fitting else ""


def hostile(pattern: re.Pattern[Any], length: int) -> list[str]:
    """Texts made of what the pattern matches: all of it, or one of its parts, over and over, and then what does not
    fit. The same ones for every length."""
    made = [unit * (length // len(unit)) for unit in ("a", " ", "\n", "0", "a/", "\r\n", '\\"', "{", "a.")]
    for repeats in (1, 2, 3):
        text = sample(parsed(pattern), repeats)
        made += [text * (length // len(text)) + "\0"] if text else []
        for place in range(min(len(text), 40)):
            unit = text[place]
            made.append(text[:place] + unit * length + "\0")
            made.append((text[:place] + unit * 30) * (length // (place + 30)))
    return [text[: length + 100] for text in made]


def spent_s(pattern: re.Pattern[Any], method: str, text: str, runs: int) -> float:
    """The least processor time of so many searches."""
    data, found = text.encode() if isinstance(pattern.pattern, bytes) else text, []
    for _ in range(runs):
        begun = time.process_time()
        matches = getattr(pattern, method)(data)
        list(matches) if method == "finditer" else matches  # which is lazy
        found.append(time.process_time() - begun)
    return min(found)


@pytest.mark.parametrize("name", [name for name in patterns() if not name.startswith(TRUSTED)])
def test_the_time_of_a_pattern_is_proportional_to_its_text(name: str) -> None:
    pattern = patterns()[name]
    used = methods()[name.rpartition(".")[2]] & {"search", "match", "fullmatch", "finditer", "findall", "split", "sub"}
    length = BOUNDED.get(name, LENGTH)
    for text, short in dict(zip(hostile(pattern, length), hostile(pattern, length // TIMES), strict=True)).items():
        for method in sorted(used - {"sub"}) + (["finditer"] if "sub" in used else []):
            if spent_s(pattern, method, text, 1) > LITTLE_S:
                limit_s = 5 * TIMES * spent_s(pattern, method, short, 5)
                assert spent_s(pattern, method, text, 3) < max(LITTLE_S, limit_s), f"{method} in {text[:60]!r}"
