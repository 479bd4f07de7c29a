"""Parses YAML, and JSON with comments, into dicts and lists; reports duplicate keys and syntax errors with their lines.

YAML is parsed by the rules of YAML 1.2: only `true` and `false` are booleans, so `--flash-attn on` stays text, and
`12:30` and `010` are not numbers. Keys are always text. Values of which the spelling matters stay text too, such as
`1.10` in the environment of a process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from llama_smart_proxy.proxy.config.problems import Loc, Problem

_NULL = re.compile(r"(?:~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_HIDDEN_FLAG = re.compile(r"(?:^|\s)#.*\s--?[A-Za-z]")
_PLAIN_TAGS = {"tag:yaml.org,2002:" + kind for kind in ("null", "bool", "int", "float", "timestamp", "merge", "value")}
_JSON_TOKEN = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/|,(?=(?:\s|//[^\n]*|/\*.*?\*/)*+[}\]])', re.DOTALL)

MOST_VALUES = 200_000
"""Most values of a YAML file, of which each alias repeats some: a few lines can stand for any number of them."""

Verbatim = Callable[[Loc], bool]


@dataclass
class Parsed:
    """The parsed data, and the problems found."""

    data: Any = None
    problems: list[Problem] = field(default_factory=list)


def _nowhere(loc: Loc) -> bool:
    return False


def parse(text: str, *, json_only: bool = False, at: Loc = (), verbatim: Verbatim = _nowhere) -> Parsed:
    """Parse `text`. A syntax error is a problem at the root, and `data` is then None.

    A text that begins with `{` is first parsed as JSON with comments: YAML would treat `// why` as part of a key. `at`
    is the path of the text itself; numbers and booleans at paths that are `verbatim` are returned as they are written.
    """
    if json_only or text.lstrip().startswith("{"):
        parsed = _parse_json(text, at, verbatim)
        if json_only or not any(problem.loc == () for problem in parsed.problems):
            return parsed
    return _parse_yaml(text, at, verbatim)


def _parse_yaml(text: str, at: Loc, verbatim: Verbatim) -> Parsed:
    parsed = Parsed()
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _values_of(node, {}) > MOST_VALUES:
            parsed.problems.append(Problem((), f"has more than {MOST_VALUES} values, as aliases repeat them"))
        elif node is not None:
            parsed.data = _build(node, at, parsed.problems, verbatim)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        unquoted = mark is not None and "${" in text.split("\n")[mark.line]
        hint = "; put a text with ${...} in quotes" if unquoted else ""
        parsed.problems.append(Problem((), f"{where}{error.problem or error.context}{hint}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        parsed.problems.append(Problem((), f"line {line}: a character that YAML does not allow ({error.reason})"))
    except RecursionError:
        parsed.problems.append(Problem((), "is nested too deeply"))
    return parsed


def _values_of(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there are below `node`, those behind aliases each time; `known` are those of nodes, by id."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        items = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
        known[id(node)] = 1 + sum(_values_of(item, known) for item in items)
    return known[id(node)]


def _build(node: yaml.Node, loc: Loc, problems: list[Problem], verbatim: Verbatim) -> Any:
    if not node.tag.startswith("tag:yaml.org,2002:"):
        problems.append(Problem(loc, f"the tag {node.tag} has no meaning here"))
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, loc, problems, verbatim)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*loc, index), problems, verbatim) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.style == ">" and verbatim((*loc, 0)) and _HIDDEN_FLAG.search(node.value):
        problems.append(Problem(loc, "a comment in a folded text hides all flags behind it; write | in place of >"))
    value = _scalar(node.value) if node.style is None and node.tag in _PLAIN_TAGS else node.value
    return value if value is None or not verbatim(loc) else node.value


def _build_mapping(node: yaml.MappingNode, loc: Loc, problems: list[Problem], verbatim: Verbatim) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(loc, f"line {key_node.start_mark.line + 1}: a key must be text"))
            continue
        key, line = key_node.value, key_node.start_mark.line + 1
        if key == "<<":
            for source_node in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                source = _build(source_node, loc, problems, verbatim)
                merged = {**(source if isinstance(source, dict) else {}), **merged}
        elif key in own:
            problems.append(Problem((*loc, key), f"given twice (lines {lines[key]} and {line})"))
        else:
            own[key], lines[key] = _build(value_node, (*loc, key), problems, verbatim), line
    return {**merged, **own}


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text) if len(text) < 20 else text
    return float(text) if _FLOAT.fullmatch(text) else text


class _Pairs(list[tuple[str, Any]]):
    """The items of a JSON object, in which keys may occur twice."""


class _Integer(str):
    """A number in JSON, as it is written."""


class _Fraction(str):
    """Likewise, with a decimal point or an exponent."""


def _parse_json(text: str, at: Loc, verbatim: Verbatim) -> Parsed:
    parsed = Parsed()
    try:
        raw = json.loads(
            _JSON_TOKEN.sub(_blank, text),
            object_pairs_hook=_Pairs,
            parse_constant=_no_constant,
            parse_int=_Integer,
            parse_float=_Fraction,
        )
        parsed.data = _unpaired(raw, at, parsed.problems, verbatim)
    except json.JSONDecodeError as error:
        parsed.problems.append(Problem((), f"line {error.lineno}, column {error.colno}: {error.msg}"))
    except ValueError as error:
        parsed.problems.append(Problem((), str(error)))
    except RecursionError:
        parsed.problems.append(Problem((), "is nested too deeply"))
    return parsed


def _blank(token: re.Match[str]) -> str:
    """Replace comments and trailing commas by spaces, so that lines and columns in error messages stay correct."""
    return token.group(1) or re.sub(r"[^\n]", " ", token.group())


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unpaired(value: Any, loc: Loc, problems: list[Problem], verbatim: Verbatim) -> Any:
    if isinstance(value, _Pairs):
        result: dict[str, Any] = {}
        for key, item in value:
            if key in result:
                problems.append(Problem((*loc, key), "given twice"))
            else:
                result[key] = _unpaired(item, (*loc, key), problems, verbatim)
        return result
    if isinstance(value, list):
        return [_unpaired(item, (*loc, index), problems, verbatim) for index, item in enumerate(value)]
    if isinstance(value, _Integer | _Fraction):
        return str(value) if verbatim(loc) else int(value) if isinstance(value, _Integer) else float(value)
    return json.dumps(value) if isinstance(value, bool) and verbatim(loc) else value
