"""How the pool starts llama-server, native or embedded, for one model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.llamacpp.command import build_argv, child_env, server_command
from llama_smart_proxy.backends.pool.launcher import Command, CommandFor, HttpLauncher, PoolModel, Source
from llama_smart_proxy.backends.pool.readiness import prove_ours
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.files import locate, resolve
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import ConfigError, StartFailed


class LlamaCppLauncher(HttpLauncher):
    """`Launcher` of llama-server. `server` is `llama_cpp.server` of the configuration; `default_args` are the flags
    that every model gets."""

    def __init__(self, name: str, model: ModelConfig, server: str | None, default_args: Sequence[str] = ()) -> None:
        self._name = name
        self._model = model
        self._server = server
        self._default_args = default_args

    def prepare(self) -> CommandFor:
        try:
            program = server_command(self._server)
        except ConfigError as exc:
            raise StartFailed(str(exc)) from exc
        gguf = resolve(self._name, self._model)

        def command_for(listen: Endpoint, key: str) -> Command:
            argv = build_argv(
                program,
                name=self._name,
                model=self._model,
                gguf=gguf,
                host=listen.host,
                port=listen.port,
                default_args=self._default_args,
            )
            return Command(argv, child_env(os.environ, self._model.env, key), listen)

        return command_for

    async def ready(self, connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
        return _slots(await prove_ours(connections, patience_s, health_path="/health", keyed_path="/props"))


def pool_model(name: str, model: ModelConfig, server: str | None, default_args: Sequence[str] = ()) -> PoolModel:
    """A configured model as the pool knows it; the other arguments are those of its launcher."""
    launcher = LlamaCppLauncher(name, model, server, default_args)
    source = None
    if model.repo is not None:
        download = hub.download_name(model.repo, model.variant)
        source = Source(download, partial(locate, name, model), hub.work(model.repo, model.variant))
    return PoolModel(name, launcher, model.pinned, model.keep_alive, source)


def _slots(props: bytes) -> int:
    """`total_slots` of `/props`. Source: llama.cpp tools/server/README.md, GET /props."""
    try:
        return max(1, int(json.loads(props)["total_slots"]))
    except (ValueError, KeyError, TypeError):
        return 1
