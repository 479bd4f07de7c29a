"""Keys of the config.json of the earlier llama-smart-proxy and of ollama-smart-proxy: renamed, or ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_smart_proxy.proxy.config.problems import Loc, Problem, dotted

MOVED: dict[Loc, tuple[Loc, ...]] = {
    ("server_host",): (("server", "host"),),
    ("server_port",): (("server", "port"),),
    ("ollama_host",): (("ollama", "host"),),
    ("ollama_port",): (("ollama", "port"),),
    ("plugins_dir",): (("agents_dirs",),),
    ("server_pool", "request_timeout"): (("server_pool", "idle_timeout_s"),),
    ("ollama", "timeout"): (("ollama", "idle_timeout_s"), ("ollama", "first_byte_timeout_s")),
    ("remotes", "*", "timeout"): (("remotes", "*", "idle_timeout_s"), ("remotes", "*", "first_byte_timeout_s")),
}
IGNORED: tuple[Loc, ...] = (
    ("gpu",),
    ("simulation",),
    ("server_pool", "health_timeout"),
    ("model_cache_ttl",),
    ("agent_command_pattern",),
    ("database_type",),
    ("database_path",),
    ("postgres_connection_string",),
    ("library_log_levels",),
    ("proxy_host_url",),
)
AGENT_MOVED: dict[str, dict[str, tuple[str, ...]]] = {
    "rag": {"rag_threshold": ("upper",), "timeout": ("time_s",), "llm_model": ("grader_model", "rewrite_model")}
}
"""Options of agents that have other names here."""
AGENT_IMPLIED = {("rag", "llm_model"): ("grader", "llm")}
"""Options of agents that stood for another one as well, and its value."""
AGENT_IGNORED = {
    ("rag", "lightrag_host"): "documents are in the proxy's own knowledge base: llama-smart-proxy kb add PATH",
    ("rag", "lightrag_api_key"): "documents are in the proxy's own knowledge base: llama-smart-proxy kb add PATH",
    ("rag", "ollama_base_url"): "models are those of this proxy",
}
"""Options of agents that have no effect, and why."""
PLUGINS = "plugins"
"""The folder where llama-smart-proxy had its plugins, beside its configuration."""
DEFAULT_PLUGINS = "src/plugins"
"""The folder where ollama-smart-proxy had its plugins, if no setting named another one."""
_KEYS = {loc[0] for loc in (*MOVED, *IGNORED)} | {"backend", "server", "server_pool", "ollama", "llama_cpp", "models"}


def is_old_form(data: Mapping[str, Any]) -> bool:
    """Whether a JSON file with agents could be one of the replaced projects: it has only their keys, and names its
    agents without options."""
    agents = data.get("agents")
    names = isinstance(agents, list) and agents and all(isinstance(agent, str) for agent in agents)
    return bool(names) and data.keys() <= _KEYS | {"agents"}


def plugin_folders(plugins_dir: object, env: Mapping[str, str], folder: Path, agents_dirs: Sequence[Path]) -> list[str]:
    """The folders of plugins that the settings of a replaced project name: `plugins_dir` as it stood in the file, and
    the variable of `env`; without any setting, its default, if that is in `folder`. Every plugin in them was enabled
    there."""
    named = (plugins_dir, env.get("OLLAMA_PROXY_PLUGINS_DIR"))
    found = [path for path in named if isinstance(path, str) and path]
    if not found and not agents_dirs and any((folder / DEFAULT_PLUGINS).glob("*/agent.py")):
        return [DEFAULT_PLUGINS]
    return found


def translate(data: dict[str, Any], moved: Callable[[Loc, Loc], None]) -> list[Problem]:
    """Rename keys of `data` in place; `moved(new, old)` is called for each. Returns warnings.

    A value that exists at the new path as well takes precedence.
    """
    remarks: list[Problem] = []
    for pattern in IGNORED:
        for old in _matches(data, pattern):
            _take(data, old)
            remarks.append(Problem(old, "has no effect here and can be removed"))
    for pattern, targets in MOVED.items():
        for old in _matches(data, pattern):
            value = _take(data, old)
            news = [(*old[: len(target) - 1], target[-1]) if "*" in target else target for target in targets]
            for new in news:
                if _put(data, new, [value] if new == ("agents_dirs",) else value):
                    moved(new, old)
            remarks.append(Problem(old, f"is now called {' and '.join(map(dotted, news))}"))
    return remarks + [remark for loc, name, options in _agents(data) for remark in _renamed(loc, name, options)]


def _agents(data: Mapping[str, Any]) -> Iterator[tuple[Loc, str, dict[str, Any]]]:
    """Path, name and options of each entry in `agents`, of all models and of one."""
    models = data.get("models")
    places: list[tuple[Loc, Any]] = [((), data)]
    places += [(("models", name), model) for name, model in models.items()] if isinstance(models, dict) else []
    for loc, holder in places:
        entries = holder.get("agents") if isinstance(holder, dict) else None
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            for name, options in entry.items() if isinstance(entry, dict) else ():
                if isinstance(options, dict):
                    yield (*loc, "agents", number, name), name, options


def _renamed(loc: Loc, name: str, options: dict[str, Any]) -> Iterator[Problem]:
    for old, news in AGENT_MOVED.get(name, {}).items():
        if old in options:
            value = options.pop(old)
            implied = AGENT_IMPLIED.get((name, old))
            for new, given in (*((new, value) for new in news), *((implied,) if implied is not None else ())):
                options.setdefault(new, given)
            also = f", with {implied[0]}: {implied[1]}" if implied is not None else ""
            yield Problem((*loc, old), f"is now called {' and '.join(news)}{also}")
    for (agent, old), why in AGENT_IGNORED.items():
        if agent == name and options.pop(old, None) is not None:
            yield Problem((*loc, old), f"has no effect here and can be removed: {why}")


def _matches(data: Any, pattern: Loc) -> list[Loc]:
    """Every path in `data` that matches `pattern`, where `*` is any key."""
    if not pattern:
        return [()]
    if not isinstance(data, dict):
        return []
    keys = list(data) if pattern[0] == "*" else [pattern[0]]
    return [(key, *rest) for key in keys if key in data for rest in _matches(data[key], pattern[1:])]


def _take(data: Any, loc: Loc) -> Any:
    for part in loc[:-1]:
        data = data[part]
    return data.pop(loc[-1])


def _put(data: dict[str, Any], loc: Loc, value: Any) -> bool:
    for part in loc[:-1]:
        if data.get(str(part)) is None:
            data[str(part)] = {}
        data = data[str(part)]
        if not isinstance(data, dict):
            return False
    key = str(loc[-1])
    if isinstance(value, list) and isinstance(data.get(key), list):
        data[key] = [*data[key], *value]
        return False
    if data.get(key) is not None:
        return False
    data[key] = value
    return True
