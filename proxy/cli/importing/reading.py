"""Reads llama-swap's configuration: its YAML, and its macros, which are expanded.

Source: llama-swap's docs/configuration.md, config.example.yaml and config-schema.json (August 2026). `${name}` is a
macro of the file or of a model, `${env.NAME}` a variable of the environment, `${MODEL_ID}` the model's name; `${PORT}`
and `${PID}` are known only when a process is started. A value that is nothing but a macro has the macro's type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_smart_proxy.proxy.config.commands import PLACEHOLDERS
from llama_smart_proxy.proxy.config.problems import dotted
from llama_smart_proxy.proxy.config.text import parse

Json = dict[str, Any]

_REFERENCE = re.compile(r"\$\{(?:env\.(?P<env>[A-Za-z_][A-Za-z0-9_]*)|(?P<macro>[A-Za-z0-9_-]+))\}|\$\{")
_RUNTIME = frozenset({"PORT", "PID"})
_DEEPEST = 20
"""Macros within macros."""
MOST_REFERENCES = 100_000
"""Most references of a file that are replaced, with those within macros."""
LONGEST = 1_000_000
"""Characters of a text with its macros."""


class Unreadable(Exception):
    """The file is no configuration of llama-swap; `problems` say why."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def read(source: Path) -> Json:
    """The content of the file, with all macros expanded, in `models` with those of each model. References to the
    environment and to `${PORT}` and `${PID}` are as our configuration has them.

    Raises: Unreadable.
    """
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:
        raise Unreadable([f"cannot be read: {getattr(exc, 'strerror', None) or 'it is not UTF-8 text'}"]) from exc
    parsed = parse(text)
    if parsed.problems:
        raise Unreadable([": ".join(filter(None, (dotted(p.loc), p.message))) for p in parsed.problems])
    data = parsed.data
    if not isinstance(data, dict) or not ({"models", "peers"} & set(data)):
        raise Unreadable(["is no configuration of llama-swap: it has neither models nor peers"])
    return _Expansion(data).expanded()


def command_text(text: str) -> str:
    """A command without its lines of comments."""
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))


class _Expansion:
    """Collects the problems of one file."""

    def __init__(self, data: Json) -> None:
        self._data = data
        self._problems: list[str] = []
        self._references = 0

    def expanded(self) -> Json:
        own = self._macros(self._data.get("macros"), "macros")
        found = {
            key: self._value(value, own, key) for key, value in self._data.items() if key not in ("macros", "models")
        }
        models = self._data.get("models")
        if isinstance(models, dict):
            found["models"] = {str(name): self._model(str(name), model, own) for name, model in models.items()}
        elif models is not None:
            self._problems.append("models: must be a mapping of names to models")
        if self._problems:
            raise Unreadable(self._problems)
        return found

    def _model(self, name: str, model: object, own: Json) -> object:
        where = f"models.{name}"
        if not isinstance(model, dict):
            self._problems.append(f"{where}: must be a mapping of fields to values")
            return {}
        macros = {"MODEL_ID": name, **own, **self._macros(model.get("macros"), f"{where}.macros")}
        model = {key: value for key, value in model.items() if key != "macros"}
        for key in ("cmd", "cmdStop"):  # before a macro in a comment can expand to several lines
            if isinstance(model.get(key), str):
                model[key] = command_text(model[key])
        return self._value(model, macros, where)

    def _macros(self, value: object, where: str) -> Json:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._problems.append(f"{where}: must be a mapping of names to values")
            return {}
        for name, macro in value.items():
            if isinstance(macro, dict | list):
                self._problems.append(f"{where}.{name}: must be a text, a number or a boolean")
        return {str(name): macro for name, macro in value.items()}

    def _value(self, value: Any, macros: Mapping[str, Any], where: str) -> Any:
        if isinstance(value, dict):
            named = {str(self._text(str(key), macros, where, 0)): inner for key, inner in value.items()}
            return {key: self._value(inner, macros, f"{where}.{key}") for key, inner in named.items()}
        if isinstance(value, list):
            return [self._value(inner, macros, f"{where}.{number}") for number, inner in enumerate(value)]
        return self._text(value, macros, where, 0) if isinstance(value, str) else value

    def _text(self, text: str, macros: Mapping[str, Any], where: str, depth: int) -> Any:
        whole = _REFERENCE.fullmatch(text)
        if whole is not None and whole["macro"] in macros and not isinstance(macros[whole["macro"]], str):
            return macros[whole["macro"]]
        text = _REFERENCE.sub(lambda found: self._replaced(found, macros, where, depth), text)
        if len(text) > LONGEST:
            raise Unreadable([f"{where}: has more than {LONGEST} characters with its macros"])
        return text

    def _replaced(self, found: re.Match[str], macros: Mapping[str, Any], where: str, depth: int) -> str:
        self._references += 1
        if self._references > MOST_REFERENCES:
            raise Unreadable([f"{where}: macros refer to more than {MOST_REFERENCES} others"])
        env, name = found.group("env", "macro")
        if env is not None:
            return f"${{{env}:-}}" if env in PLACEHOLDERS else f"${{{env}}}"
        if name is None:  # no reference for llama-swap, but one for us
            return "$${"
        if name in macros and depth < _DEEPEST:
            value = macros[name]
            inner = self._text(value, macros, where, depth + 1) if isinstance(value, str) else value
            return str(inner).lower() if isinstance(inner, bool) else str(inner)
        if name not in _RUNTIME:
            self._problems.append(
                f"{where}: unknown macro ${{{name}}}"
                if name not in macros
                else f"{where}: the macro {name} contains itself"
            )
        return found.group()
