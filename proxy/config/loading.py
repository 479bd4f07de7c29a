"""From a file, the environment and the command line to a `Config`, or to the whole list of what is wrong."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llama_smart_proxy.proxy.config import environment, legacy, text
from llama_smart_proxy.proxy.config.checks import cross_checks
from llama_smart_proxy.proxy.config.expansion import expand_all
from llama_smart_proxy.proxy.config.problems import Loc, Problem, dotted
from llama_smart_proxy.proxy.config.schema import Config, Section
from llama_smart_proxy.proxy.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Reading:
    """The outcome of reading a configuration; `config` is None exactly when there are problems."""

    config: Config | None
    problems: list[str]
    warnings: list[str]


def load_config(path: Path | None, *, env: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Config:
    """The configuration in the file `path` (None: the defaults), under `LSP_*` of `env`, under `overrides`.

    `overrides` maps dotted paths to values: `{"server.port": 8080}`. Relative paths in it become absolute, from the
    folder of the file (None: the current one). Raises `ConfigError` with all problems at once, each
    `file: path.to.field: problem`; `environment: LSP_X: problem` for variables. Remarks are in `Config.warnings`.
    """
    reading = read_config(path, env=env, overrides=overrides)
    if reading.config is None:
        raise ConfigError(reading.problems)
    return reading.config


def read_config(path: Path | None, *, env: Mapping[str, str], overrides: Mapping[str, object] | None = None) -> Reading:
    """As `load_config`, but never raises: for reports that show problems and warnings together."""
    draft = _Draft(source="defaults" if path is None else str(path))
    if path is not None:
        draft.read_file(path, env)
        if not draft.readable:
            return Reading(None, list(map(draft.render, draft.problems)), [])
    draft.apply(environment.from_environment(env, draft.data))
    draft.apply(environment.from_flags(overrides or {}))
    config = draft.validate()
    warnings = [draft.render(remark) for remark in draft.remarks]
    if config is None or draft.problems:
        return Reading(None, list(dict.fromkeys(map(draft.render, draft.problems))), warnings)
    folder = Path.cwd() if path is None else path.absolute().parent
    _resolve_paths(config, folder)
    config.enabled_dirs.extend(_absolute(Path(old), folder) for old in legacy.plugin_folders(draft.plugins_dir, env))
    if path is not None and (folder / legacy.PLUGINS).is_dir():
        config.set_plugins_dir(folder / legacy.PLUGINS)
    config.warnings.extend(warnings)
    return Reading(config, [], warnings)


@dataclass
class _Draft:
    """A configuration while it is being put together: plain data, where each part came from, what is wrong."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Loc, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    plugins_dir: object = None

    @property
    def readable(self) -> bool:
        """Whether the file could be read; if not, other problems would only be consequences."""
        return all(problem.loc for problem in self.problems)

    def read_file(self, path: Path, env: Mapping[str, str]) -> None:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            self.problems.append(Problem((), f"is not UTF-8 text (at byte {error.start})"))
            return
        except (OSError, ValueError) as error:
            self.problems.append(Problem((), f"cannot be read: {getattr(error, 'strerror', None) or error}"))
            return
        parsed = text.parse(content, json_only=path.suffix.lower() == ".json")
        self.problems += parsed.problems
        if isinstance(parsed.data, dict):
            self.data = expand_all(parsed.data, env, self.problems)
            self.plugins_dir = self.data.get("plugins_dir")
            self.remarks += legacy.translate(self.data, self._moved)
        elif parsed.data is not None:
            self.problems.append(Problem((), "must be a mapping of fields to values"))

    def _moved(self, new: Loc, old: Loc) -> None:
        """What was said of the old place holds for the new one, under its old name."""
        self.origins[new] = f"{self.source}: {dotted(old)}"
        self.problems += [Problem((*new, *p.loc[len(old) :]), p.message) for p in self.problems if _within(p.loc, old)]

    def apply(self, settings: Iterable[environment.Setting]) -> None:
        """Lays the settings over what is there; one that fits no field is a problem."""
        for setting in settings:
            if not setting.append:
                self.origins = {loc: label for loc, label in self.origins.items() if not _within(loc, setting.loc)}
                self.problems = [problem for problem in self.problems if not _within(problem.loc, setting.loc)]
            self.origins[setting.loc] = setting.label
            message = setting.problem
            if _type_at(Config, setting.loc) is None:
                message = f"unknown field{_hint(setting.loc)}"
            elif message is None and not _put(self.data, setting):
                message = "cannot be set: what holds it is not a mapping"
            if message is not None:
                self.problems.append(Problem(setting.loc, message))

    def render(self, problem: Problem) -> str:
        """`file: path: message`; for what came from elsewhere, its own name in place of the file's."""
        cut = next((n for n in range(len(problem.loc), 0, -1) if problem.loc[:n] in self.origins), 0)
        label = self.origins[problem.loc[:cut]] if cut else self.source
        return ": ".join(filter(None, (label, dotted(problem.loc[cut:]), problem.message)))

    def validate(self) -> Config | None:
        """The config, or None. Faulty parts are cut out, so that the rest can be checked as well."""
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
    """Lays a value over `data`; False if something on the way there is not a mapping."""
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
    """A copy of `data` without the innermost existing node on each of the paths."""
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
    """A pydantic error in plain words, without the value it is about."""
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
    """The type of what stands at `loc` below a value of type `annotation`; None if nothing can stand there."""
    if not loc:
        return annotation
    if _is_section(annotation):
        info = annotation.model_fields.get(str(loc[0]))
        return _type_at(info.annotation, loc[1:]) if info else None
    inside = dict if isinstance(loc[0], str) else list
    return _type_at(get_args(annotation)[-1], loc[1:]) if get_origin(annotation) is inside else None


def _resolve_paths(config: Config, folder: Path) -> None:
    """Makes every path absolute: `~` is the home folder, relative ones start at `folder`."""
    llama_cpp = config.llama_cpp
    for model in config.models.values():
        model.path = model.path and _absolute(model.path, folder)
    llama_cpp.models_dir = llama_cpp.models_dir and _absolute(llama_cpp.models_dir, folder)
    config.agents_dirs = [_absolute(path, folder) for path in config.agents_dirs]
    config.modules = [_absolute(path, folder) for path in config.modules]
    # A bare name is looked up on PATH, as a shell would.
    if llama_cpp.server and (os.sep in llama_cpp.server or llama_cpp.server.startswith("~")):
        llama_cpp.server = str(_absolute(Path(llama_cpp.server), folder))


def _absolute(path: Path, folder: Path) -> Path:
    return folder / os.path.expanduser(path)
