"""Loads a `Config` from a file, the environment and the command line, or reports all problems."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llama_smart_proxy.proxy.config import environment, legacy, text
from llama_smart_proxy.proxy.config.checks import cross_checks, key_remarks
from llama_smart_proxy.proxy.config.command_line import absolute_paths
from llama_smart_proxy.proxy.config.expansion import expand_all
from llama_smart_proxy.proxy.config.problems import Loc, Problem, dotted
from llama_smart_proxy.proxy.config.schema import Config, ServerConfig, is_verbatim
from llama_smart_proxy.proxy.config.section import Section
from llama_smart_proxy.proxy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of reading a configuration; `config` is None exactly if there are problems."""

    config: Config | None
    problems: list[str]
    warnings: list[str]


def load_config(path: Path | None, *, env: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Config:
    """The configuration in the file `path` (None: the defaults), overridden by `LSP_*` of `env`, then by `overrides`.

    `overrides` maps dotted paths to values: `{"server.port": 8080}`. Relative paths become absolute, starting at the
    folder of the file (None: the current one). Warnings are in `Config.warnings`.

    Raises: ConfigError with all problems, each `file: path.to.field: problem`, or `environment: LSP_X: problem`.
    """
    reading = read_config(path, env=env, overrides=overrides)
    if reading.config is None:
        raise ConfigError(reading.problems)
    return reading.config


def read_config(path: Path | None, *, env: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Reading:
    """Like `load_config`, but returns problems instead of raising, together with the warnings."""
    draft = _Draft(source="defaults" if path is None else str(path))
    if path is not None:
        draft.read_file(path, env)
        if not draft.readable:
            return Reading(None, list(map(draft.render, draft.problems)), [])
    draft.apply(environment.from_environment(env, draft.data))
    draft.apply(environment.from_flags(overrides or {}))
    config = draft.validate()
    remarks = [*draft.remarks, *(key_remarks(config) if config is not None else ())]
    warnings = [*map(draft.render, remarks), *environment.without_effect(env)]
    if config is None or draft.problems:
        return Reading(None, list(dict.fromkeys(map(draft.render, draft.problems))), warnings)
    folder = Path.cwd() if path is None else path.absolute().parent
    _resolve_paths(config, folder)
    _find_plugins(config, draft, env, folder, beside_file=path is not None)
    config.warnings.extend(warnings)
    return Reading(config, [], warnings)


def read_address(path: Path | None, *, env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of `server` in the configuration of `load_config`, also if other parts of it are invalid.

    Raises: ConfigError with the problems of the file as a whole or of these fields.
    """
    draft = _Draft(source="defaults" if path is None else str(path))
    if path is not None:
        draft.read_file(path, env)
        if not draft.readable:
            raise ConfigError(list(map(draft.render, draft.problems)))
    draft.apply(environment.from_environment(env, draft.data))
    server = draft.data.get("server")
    server = {} if server is None else server
    if not isinstance(server, dict):
        raise ConfigError([draft.render(Problem(("server",), "should be a mapping of fields to values"))])
    try:
        address = ServerConfig.model_validate({k: server[k] for k in ("host", "port") if k in server})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        problems = [_explain({**detail, "loc": ("server", *detail["loc"])}) for detail in details]
        raise ConfigError(list(map(draft.render, problems))) from None
    return address.host, address.port


@dataclass
class _Draft:
    """A configuration under construction: plain data, the source of each part, and the problems found."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Loc, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    plugins_dir: object = None
    is_old_form: bool = False

    @property
    def readable(self) -> bool:
        """Whether the file could be parsed; if not, other problems would only be consequences."""
        return all(problem.loc for problem in self.problems)

    def read_file(self, path: Path, env: Mapping[str, str]) -> None:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self.problems.append(Problem((), f"is not UTF-8 text (at byte {error.start})"))
            return
        except FileNotFoundError:
            command = shlex.join(["llama-smart-proxy", "init", "--config", str(path)])
            self.problems.append(Problem((), f"does not exist; `{command}` writes one"))
            return
        except (OSError, ValueError) as error:
            self.problems.append(Problem((), f"cannot be read: {getattr(error, 'strerror', None) or error}"))
            return
        json_only = path.suffix.lower() == ".json"
        parsed = text.parse(content, json_only=json_only, verbatim=is_verbatim)
        self.problems += parsed.problems
        if isinstance(parsed.data, dict):
            self.data = expand_all(parsed.data, env, self.problems)
            self.plugins_dir = self.data.get("plugins_dir")
            is_json = json_only or content.lstrip().startswith("{")
            self.is_old_form = is_json and legacy.is_old_form(self.data)
            self.remarks += legacy.translate(self.data, self._moved)
        elif parsed.data is not None:
            self.problems.append(Problem((), "must be a mapping of fields to values"))

    def _moved(self, new: Loc, old: Loc) -> None:
        """Copy the problems of the old path to the new one; messages name the old path, which is in the file."""
        self.origins[new] = f"{self.source}: {dotted(old)}"
        self.problems += [Problem((*new, *p.loc[len(old) :]), p.message) for p in self.problems if _within(p.loc, old)]

    def apply(self, settings: Iterable[environment.Setting]) -> None:
        """Apply the settings over the data; one that matches no field is a problem."""
        for setting in settings:
            if not setting.append:
                self.origins = {loc: label for loc, label in self.origins.items() if not _within(loc, setting.loc)}
                self.problems = [problem for problem in self.problems if not _within(problem.loc, setting.loc)]
            self.origins[setting.loc] = setting.label
            message = setting.problem
            if _type_at(Config, setting.loc) is None:
                message = f"unknown field{_hint(setting.loc)}"
            elif message is None and not _put(self.data, setting):
                message = "cannot be set: a part of its path is not a mapping"
            if message is not None:
                self.problems.append(Problem(setting.loc, message))

    def render(self, problem: Problem) -> str:
        """`file: path: message`; for a value from elsewhere, with its label in place of the file's name."""
        cut = next((n for n in range(len(problem.loc), 0, -1) if problem.loc[:n] in self.origins), 0)
        label = self.origins[problem.loc[:cut]] if cut else self.source
        return ": ".join(filter(None, (label, dotted(problem.loc[cut:]), problem.message)))

    def validate(self) -> Config | None:
        """The config, or None. Invalid parts are removed so that the rest can be checked as well; as that can cause new
        errors (missing fields), only those of the first attempt are reported."""
        data, known = self.data, [problem.loc for problem in self.problems if problem.loc]
        found: list[Problem] = []
        config: Config | None = None
        for _ in range(4):
            try:
                config = Config.model_validate(data)
                break
            except ValidationError as error:
                details = error.errors(include_url=False, include_input=False)
            if data is self.data:
                found = [problem for problem in map(_explain, details) if problem.loc not in known]
                known += [problem.loc for problem in found]
            data = _without(data, [detail["loc"] for detail in details])
        self.problems += found
        if config is not None:
            self.problems += cross_checks(config, lambda loc: not any(_within(bad, loc) for bad in known))
        return None if self.problems else config


def _within(loc: Loc, outer: Loc) -> bool:
    return loc[: len(outer)] == outer


def _put(data: dict[str, Any], setting: environment.Setting) -> bool:
    """Set a value in `data`; False if a part of its path is not a mapping."""
    for part in setting.loc[:-1]:
        if data.get(str(part)) is None:
            data[str(part)] = {}
        data = data[str(part)]
        if not isinstance(data, dict):
            return False
    key = str(setting.loc[-1])
    there = data.get(key)
    data[key] = [*there, *setting.value] if setting.append and isinstance(there, list) else setting.value
    return True


def _without(data: Any, locs: list[Loc]) -> Any:
    """A copy of `data` without the innermost existing node of each path."""
    cuts = {loc[0] for loc in locs if loc}
    deeper = {key: [loc[1:] for loc in locs if loc and loc[0] == key] for key in cuts}
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data))
    kept: list[tuple[Any, Any]] = []
    for key, value in items:
        if key not in cuts:
            kept.append((key, value))
        elif isinstance(value, dict | list) and all(rest and _has(value, rest[0]) for rest in deeper[key]):
            kept.append((key, _without(value, deeper[key])))
    return dict(kept) if isinstance(data, dict) else [value for _, value in kept]


def _has(value: dict[str, Any] | list[Any], key: str | int) -> bool:
    return key in value if isinstance(value, dict) else isinstance(key, int) and key < len(value)


def _explain(error: ErrorDetails) -> Problem:
    """The problem of a pydantic error, without the value, which may be a secret."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    match error["type"]:
        case "extra_forbidden":
            return Problem(loc, f"unknown field{_hint(loc)}")
        case "missing":
            return Problem(loc, "is required")
        case "model_type" | "dict_type":
            return Problem(loc, "should be a mapping of fields to values")
        case "value_error":
            return Problem(loc, error["msg"].removeprefix("Value error, "))
    return Problem(loc, error["msg"].replace("Input should", "should", 1))


def _hint(loc: Loc) -> str:
    section = _type_at(Config, loc[:-1])
    names = list(section.model_fields) if _is_section(section) else []
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_at(annotation: Any, loc: Loc) -> Any:
    """The type of the value at `loc` in a value of type `annotation`; None if there is no such path."""
    if not loc:
        return annotation
    if _is_section(annotation):
        info = annotation.model_fields.get(str(loc[0]))
        return _type_at(info.annotation, loc[1:]) if info else None
    inside = dict if isinstance(loc[0], str) else list
    return _type_at(get_args(annotation)[-1], loc[1:]) if get_origin(annotation) is inside else None


def _resolve_paths(config: Config, folder: Path) -> None:
    """Make every path absolute: `~` is the home folder, relative paths start at `folder`."""
    llama_cpp = config.llama_cpp
    for model in config.models.values():
        model.path = model.path and _absolute(model.path, folder)
        for command in (model.cmd, model.cmd_stop):
            if command and (os.sep in command[0] or command[0].startswith("~")):
                command[0] = str(_absolute(Path(command[0]), folder))
        model.args = absolute_paths(model.args, lambda path: os.path.join(folder, os.path.expanduser(path)))
    llama_cpp.args = absolute_paths(llama_cpp.args, lambda path: os.path.join(folder, os.path.expanduser(path)))
    llama_cpp.models_dir = llama_cpp.models_dir and _absolute(llama_cpp.models_dir, folder)
    config.agents_dirs = [_absolute(path, folder) for path in config.agents_dirs]
    config.state_dir = config.state_dir and _absolute(config.state_dir, folder)
    config.modules = [_absolute(path, folder) for path in config.modules]
    # A bare name is looked up on PATH, as a shell would.
    if llama_cpp.server and (os.sep in llama_cpp.server or llama_cpp.server.startswith("~")):
        llama_cpp.server = str(_absolute(Path(llama_cpp.server), folder))


def _find_plugins(config: Config, draft: _Draft, env: Mapping[str, str], folder: Path, *, beside_file: bool) -> None:
    """Add the plugins of the replaced projects."""
    found = legacy.plugin_folders(draft.plugins_dir, env, folder, config.agents_dirs)
    config.enabled_dirs.extend(_absolute(Path(path), folder) for path in found)
    config.agents_dirs.extend(path for path in config.enabled_dirs if path not in config.agents_dirs)
    if beside_file and (folder / legacy.PLUGINS).is_dir():
        config.set_plugins_dir(folder / legacy.PLUGINS)
    if draft.is_old_form:
        config.set_old_form()


def _absolute(path: Path, folder: Path) -> Path:
    return folder / os.path.expanduser(path)
