"""Checks across fields: sources, names, ports and flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llama_smart_proxy.proxy.config.access import SHORTEST_KEY
from llama_smart_proxy.proxy.config.command_line import spelled
from llama_smart_proxy.proxy.config.commands import CommandConfig, placeholders
from llama_smart_proxy.proxy.config.problems import Loc, Problem, dotted
from llama_smart_proxy.proxy.config.providers import CardConfig, ModelConfig
from llama_smart_proxy.proxy.config.schema import Config

Clean = Callable[[Loc], bool]
"""Whether there is no problem yet at or below a path; a check of invalid fields would only report consequences."""

_REASONS = {
    ("--host",): "set server_pool.host instead",
    ("--port",): "set server_pool.port_start and port_end instead",
    ("--api-key", "--api-key-file"): "the proxy gives every process a key of its own",
    ("-a", "--alias"): "use the model's name and aliases instead",
    ("-m", "--model"): "use path instead",
    ("-mu", "--model-url"): "use path or repo instead",
    ("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file"): "use repo and variant instead",
}
_OF_LLAMA_SERVER = ("args", "ctx", "parallel", "resumable_streams", "backend")
"""Settings that a model with `cmd` does not have: its command has them, if its server does."""
_OF_COMMAND = (*CommandConfig.model_fields,)
_OF_PROCESSES = (
    *("args", "env", "parallel", "concurrent", "keep_alive", "load_timeout_s", "stop_timeout_s"),
    *("preload", "pinned", "helper", "resumable_streams", *_OF_COMMAND),
)
"""Settings of a model that apply only to a process of the pool."""
_SOURCES = ("backend", "path", "package", "file", "repo", "variant", "cmd", "url", "env")
"""Settings that decide what runs a model."""
_OF_VIRTUAL = {"model", "agents", "aliases", "title", "filters", *CardConfig.model_fields}
"""Settings that a virtual model can have."""
OWNED_FLAGS = {flag: reason for flags, reason in _REASONS.items() for flag in flags}


def cross_checks(config: Config, clean: Clean) -> Iterator[Problem]:
    """Every problem between fields of `config`, except where one of the fields is already invalid."""
    yield from _key_clashes(config)
    yield from _twice_declared(config)
    yield from _name_clashes(config)
    yield from _virtual_problems(config)
    for name, model in config.models.items():
        loc = model_loc(config, name)
        if all(clean((*loc, field)) for field in _SOURCES):
            yield from (Problem(loc, message) for message in _source_problems(config, name, model))
            yield from _without_effect(config, name, model)
        yield from _owned_flags((*loc, "args"), model.args)
    yield from _owned_flags(("llama_cpp", "args"), config.llama_cpp.args)
    if clean(("server_pool",)):
        yield from _port_problems(config)
        if all(clean((*model_loc(config, name), "pinned")) for name in config.models):
            yield from _pin_problems(config)


def key_remarks(config: Config) -> Iterator[Problem]:
    """A warning for each API key that is too short."""
    for position, key in enumerate(config.server.api_keys):
        if key.is_short:
            message = f"has under {SHORTEST_KEY} characters and can be guessed; `llama-smart-proxy key new` makes one"
            yield Problem(("server", "api_keys", position), message)


def _key_clashes(config: Config) -> Iterator[Problem]:
    """A key has one entry, and a name one key."""
    names, digests = set[str](), set[bytes]()
    for position, key in enumerate(config.server.api_keys):
        loc = ("server", "api_keys", position)
        if key.digest in digests:
            yield Problem(loc, "is the same key as an earlier one")
        elif key.name in names:
            yield Problem((*loc, "name"), f"is also the name of an earlier key: {key.name}")
        names.add(key.name)
        digests.add(key.digest)


def model_loc(config: Config, name: str) -> Loc:
    """The path of the model in the file: in one of two sections."""
    return ("llama_cpp", "models", name) if name in config.llama_cpp.models else ("models", name)


def _twice_declared(config: Config) -> Iterator[Problem]:
    known = config.models | config.virtual
    for name, model in config.llama_cpp.models.items():
        if known[name] is not model:
            yield Problem(("models", name), f"is also given as {dotted(('llama_cpp', 'models', name))}")


def _name_clashes(config: Config) -> Iterator[Problem]:
    """Names that clients may send must be unique, ignoring case."""
    owner: dict[str, str] = {}
    known = config.models | config.virtual
    for name in known:
        other = owner.setdefault(name.lower(), name)
        if other != name:
            yield Problem(model_loc(config, name), f"differs only in case from the model {other}")
    remote_names = {
        model.lower(): f"a model of the remote {remote}"
        for remote, settings in config.remotes.items()
        for model in settings.models or ()
    }
    for name in known:
        if name.lower() in remote_names:
            yield Problem(model_loc(config, name), f"is also {remote_names[name.lower()]}")
    taken = {key: f"the name of the model {name}" for key, name in owner.items()} | remote_names
    for name, model in known.items():
        for alias in model.aliases:
            if alias.lower() in taken:
                message = f"the alias {alias} is also {taken[alias.lower()]}"
                yield Problem((*model_loc(config, name), "aliases"), message)
            taken.setdefault(alias.lower(), f"an alias of the model {name}")


def _virtual_problems(config: Config) -> Iterator[Problem]:
    """A virtual model must name one with weights, and has no settings that only such a model can have."""
    names = {key.lower() for name, model in config.virtual.items() for key in (name, *model.aliases)}
    for name, model in config.virtual.items():
        loc = model_loc(config, name)
        if (model.model or "").lower() in names:
            yield Problem((*loc, "model"), "must not name another virtual model")
        elif not _may_exist(config, model.model or ""):
            yield Problem((*loc, "model"), "names a model that does not exist")
        for field in sorted(model.model_fields_set - _OF_VIRTUAL):
            if getattr(model, field) != ModelConfig.model_fields[field].get_default(call_default_factory=True):
                yield Problem((*loc, field), "has no effect with `model`; set it on the model that is named there")


def _may_exist(config: Config, name: str) -> bool:
    """Whether a model of that name is configured, or may be found at run time."""
    if config.remotes or config.uses_ollama or config.llama_cpp.models_dir is not None or "/" in name:
        return True
    names = {key.lower() for known, model in config.models.items() for key in (known, *model.aliases)}
    return name.lower().removesuffix(":latest") in names or name.lower() in names


def _source_problems(config: Config, name: str, model: ModelConfig) -> Iterator[str]:
    given = [field for field in ("cmd", "path", "package", "repo") if getattr(model, field)]
    if config.backend_of(name) == "ollama":
        if model.has_source:
            yield "a model of backend ollama has no path, package or repo: Ollama finds it by its name"
        if model.ctx == 0:
            yield "ctx 0 has no meaning for Ollama; give a number of tokens, or leave it out"
        return
    if model.file is not None and model.package is None:
        yield "file requires package, the installed package that contains it"
    if model.package is not None and model.file is None:
        yield "package requires file, the name of the GGUF in it"
    if model.variant is not None and model.repo is None and not model.is_converted:
        yield "variant requires repo, the Hugging Face repository that contains it, or a file of safetensors"
    if len(given) > 1:
        yield f"has more than one source ({', '.join(given)}); keep one"
    if not given and not model.has_source:
        yield "has no source; give one of: path, package and file, repo (and variant), cmd"
    if model.cmd and name in config.llama_cpp.models:
        yield "cmd is no setting of llama.cpp's models; move the model to the top-level models"
    if model.cmd and not model.url and "PORT" not in placeholders(*model.cmd, *model.env.values()):
        yield "cmd must have its server listen at ${PORT}, or url must say where it listens"
    if "PID" in placeholders(*model.cmd, model.url, *model.env.values()):
        yield "${PID} has a value in cmd_stop only"


def _without_effect(config: Config, name: str, model: ModelConfig) -> Iterator[Problem]:
    """Settings that have no effect with the model's backend."""
    kind = config.backend_of(name)
    fields, of = {
        "ollama": (_OF_PROCESSES, "of backend ollama"),
        "command": (_OF_LLAMA_SERVER, "with cmd"),
        "llama.cpp": (_OF_COMMAND, "without cmd"),
    }[kind]
    for field in fields:
        if getattr(model, field) != ModelConfig.model_fields[field].get_default(call_default_factory=True):
            yield Problem((*model_loc(config, name), field), f"has no effect on a model {of}; leave it out")


def _owned_flags(loc: Loc, args: list[str]) -> Iterator[Problem]:
    for arg in args:
        flag = arg.split("=", 1)[0]
        if spelled(flag) in OWNED_FLAGS:
            yield Problem(loc, f"must not contain {flag}: {OWNED_FLAGS[spelled(flag)]}")


def _port_problems(config: Config) -> Iterator[Problem]:
    pool = config.server_pool
    if pool.port_end is not None and pool.port_end < pool.port_start:
        yield Problem(("server_pool", "port_end"), f"is less than port_start ({pool.port_start})")
    elif len(pool.ports) < (most := pool.size + config.helpers):
        message = f"{len(pool.ports)} ports ({pool.port_start}-{pool.port_end}) are too few for {most} processes"
        yield Problem(("server_pool",), message)


def _pin_problems(config: Config) -> Iterator[Problem]:
    """Pinned models must leave at least one process for the others, and so must pinned helpers for other helpers."""
    pool = config.server_pool
    local = [(name, model) for name, model in config.models.items() if config.is_pooled(name)]
    helping = [bool(pool.helpers) and config.is_helper(name, model) for name, model in local]
    for setting, size, is_helper in (("size", pool.size, False), ("helpers", pool.helpers, True)):
        models = [model for (_, model), helps in zip(local, helping, strict=True) if helps is is_helper]
        pinned = sum(model.pinned for model in models)
        others = len(models) > pinned or (not is_helper and config.llama_cpp.models_dir is not None)
        if pinned > size or (pinned and pinned == size and others):
            room = " and leave no room for the models that are not" if pinned == size else ""
            yield Problem(("server_pool", setting), f"{pinned} pinned models take all {size} processes{room}")
