"""What this machine lacks for the configured models of llama.cpp: the program, the folder, the files.

Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress

from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.backends.llamacpp.command import EMBEDDED, server_command
from llama_smart_proxy.backends.threads import within
from llama_smart_proxy.backends.weights import hub_cache
from llama_smart_proxy.backends.weights.files import check, locate
from llama_smart_proxy.proxy.config import Config, ModelConfig, missing_paths
from llama_smart_proxy.proxy.errors import ConfigError, StartFailed

FOLDER_S = 2.0
"""Longest wait in seconds for the disk with the folder of models."""


def problems(config: Config) -> list[Problem]:
    """Those of the program and of the configured models."""
    local = {name: model for name, model in config.models.items() if config.backend_of(name) == "llama.cpp"}
    found = list(_program_problems(config, used=bool(local)))
    found += _args_problems("llama_cpp.args", config.llama_cpp.args)
    for name, model in local.items():
        found += _model_problems(config.path_of(name), name, model)
        found += _args_problems(f"{config.path_of(name)}.args", model.args)
    return found


def machine_problems(config: Config) -> list[Problem]:
    """Those of the program and of the folder of models."""
    return [*_program_problems(config, used=True), *_folder_problems(config)]


def _program_problems(config: Config, *, used: bool) -> Iterator[Problem]:
    where = "llama_cpp.server"
    try:
        command = server_command(config.llama_cpp.server)
    except ConfigError as exc:
        yield Problem(where, exc.problems[0].removeprefix(f"{where}: "), fatal=True)
        return
    if used and command == list(EMBEDDED) and importlib.util.find_spec("xllamacpp") is None:
        remedy = "pip install 'llama-smart-proxy[embedded]', or install llama-server"
        yield Problem(where, f"there is no llama-server on PATH, and xllamacpp is not installed: {remedy}")


def _folder_problems(config: Config) -> Iterator[Problem]:
    folder = config.llama_cpp.models_dir
    with suppress(TimeoutError):  # it may answer later
        if folder is not None and not within(FOLDER_S, folder.is_dir):
            yield Problem("llama_cpp.models_dir", f"{folder}: no such folder", fatal=True)


def _model_problems(where: str, name: str, model: ModelConfig) -> Iterator[Problem]:
    if model.repo is not None:
        if not hub_cache.REPO.fullmatch(model.repo):
            yield Problem(f"{where}.repo", "is not the name of a Hugging Face repository, which is like org/name-GGUF")
        elif _offline() and locate(name, model) is None:
            yield Problem(f"{where}.repo", "is not in the local Hugging Face cache, and HF_HUB_OFFLINE is set")
        return
    try:
        check(name, model)
    except StartFailed as exc:
        source = "path" if model.path is not None else "package"
        yield Problem(f"{where}.{source}", exc.message.removeprefix(f"Model '{name}': "))


def _args_problems(where: str, args: Sequence[str]) -> Iterator[Problem]:
    return (Problem(where, f"{missing}: no such file or folder") for missing in missing_paths(args))


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
