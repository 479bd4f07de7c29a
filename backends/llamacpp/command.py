"""From a model's configuration to the command that serves it: which program, its arguments, its environment.

Pure functions; the spawning is done elsewhere. Nothing here comes from a request: the program, its arguments and its
environment are the local configuration's alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_smart_proxy.backends.pool.launcher import inherited
from llama_smart_proxy.proxy.errors import ConfigError

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.config import ModelConfig

EMBEDDED = (sys.executable, "-P", "-m", "llama_smart_proxy.backends.llamacpp.embedded")
SOURCE_ROOT = Path(__file__).absolute().parents[3]
"""The folder on which `import llama_smart_proxy` depends; not resolved, as in a checkout it holds links."""


def server_command(server: str | None) -> list[str]:
    """The program to spawn for `llama_cpp.server`, as the head of an argument list.

    `embedded` is the llama.cpp of the wheel; None is the llama-server on PATH, or else the embedded one; anything else
    is a path (`~` allowed) or the name of a program on PATH.

    Raises: `ConfigError` when that program is missing or not executable.
    """
    if server == "embedded":
        return list(EMBEDDED)
    if server is None:
        found = shutil.which("llama-server")
        return [os.path.abspath(found)] if found else list(EMBEDDED)
    found = shutil.which(os.path.expanduser(server))
    if found is None:
        raise ConfigError([f"llama_cpp.server: {server}: no such program, or not executable"])
    return [os.path.abspath(found)]


def build_argv(
    command: Sequence[str],
    *,
    name: str,
    model: ModelConfig,
    gguf: Path | str,
    host: str,
    port: int,
    required_args: Sequence[str] = (),
    default_args: Sequence[str] = (),
) -> list[str]:
    """The whole argument list that serves `gguf`, a path or a name for display, as `name` on `host:port`.

    Each value is an element of its own, no shell is involved, and the API key is not among them. llama-server takes the
    last of two equal flags, so `default_args` beat ours and those that the file requires, and the model's own `args`
    beat all.
    """
    file = os.path.abspath(gguf) if isinstance(gguf, Path) else gguf
    argv = [*command, "--model", file, "--host", host, "--port", str(port), "--alias", name]
    if model.ctx is not None:
        argv += ["--ctx-size", str(model.ctx)]
    if model.parallel is not None:
        argv += ["--parallel", str(model.parallel)]
    ours = ["--jinja", "--metrics", "--slots", "--no-webui", *required_args]
    return [*argv, *ours, *default_args, *model.args]


def child_env(
    environ: Mapping[str, str], model_env: Mapping[str, str | None], key: str, passthrough: Sequence[str] = ()
) -> dict[str, str]:
    """The environment of a server: what of ours it may have, then the model's own `env`, then its API `key`.

    `passthrough` are names and patterns of what it may have too. None in the model's `env` removes a variable.
    `PYTHONPATH` is for the embedded server, which is started without the working directory on its path; a native one
    does not look at it.
    """
    env = {**inherited(environ, passthrough), "PYTHONPATH": str(SOURCE_ROOT), **model_env, "LLAMA_API_KEY": key}
    return {name: value for name, value in env.items() if value is not None}
