"""How the pool starts llama-server, native or embedded, for one model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.llamacpp.arguments import required_by, takes_projector
from llama_smart_proxy.backends.llamacpp.command import build_argv, child_env, server_command
from llama_smart_proxy.backends.llamacpp.notices import FAREWELL, ROUTER, Notices, reports
from llama_smart_proxy.backends.pool.launcher import (
    Command,
    CommandFor,
    HttpLauncher,
    Launcher,
    PoolModel,
    Report,
    Source,
    settings_of,
)
from llama_smart_proxy.backends.pool.readiness import is_up, prove_ours, wait_until
from llama_smart_proxy.backends.pool.sockets import SocketFolder
from llama_smart_proxy.backends.weights import hub, projectors
from llama_smart_proxy.backends.weights.filenames import all_parts
from llama_smart_proxy.backends.weights.files import locate, resolve
from llama_smart_proxy.backends.weights.gguf import GgufError, read_info
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import ConfigError, StartFailed, UpstreamFailed

REMEDY = (
    "llama-server reads it from LLAMA_API_KEY; to accept a server that does not, which any process of this machine can "
    "then use, set llama_cpp.allow_unauthenticated: true"
)

PROBE = UpstreamRequest(
    "POST",
    "/completion",
    b'{"prompt":"a","n_predict":1,"cache_prompt":false}',
    [("Content-Type", "application/json")],
    slot=False,
)
"""Generates one token. No part of an answer to a client, so it is none that shows progress."""

PROCESS = ("path", "package", "file", "repo", "variant", "args", "env", "ctx", "parallel")
"""The fields of a model that its process depends on."""

COUNTED = ("id_task", "is_processing", "n_prompt_tokens", "n_prompt_tokens_processed", "next_token", "n_decoded")
"""What `/slots` reports of the work of a slot; `n_decoded` is in `next_token`, in older versions beside it."""

ECHOES = re.compile(
    r"failed to (?:load model|create[_ ]context)|exiting due to model loading error|load model from\b|"
    r"encountered an error while trying to fit params|please consider|without GPU support|security: no API key"
)
"""Lines that llama-server (b11434) prints for every failed start, and warnings that are no reason for one."""


class LlamaCppLauncher(HttpLauncher):
    """`Launcher` of llama-server. `server` is `llama_cpp.server` of the configuration; `default_args` are the flags
    that every model gets. Servers listen on unix sockets in `sockets`, if that is given. With `unauthenticated`, a
    server that does not enforce its API key is accepted, and one that another process than ours has started.
    `passthrough` are further variables of ours that it may have."""

    echoes: re.Pattern[str] | None = ECHOES
    elsewhere = "a llama_cpp.server that starts it in a container requires llama_cpp.allow_unauthenticated: true"

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        server: str | None,
        default_args: Sequence[str] = (),
        *,
        unauthenticated: bool = False,
        sockets: SocketFolder | None = None,
        passthrough: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._model = model
        self._server = server
        self._default_args = default_args
        self._unauthenticated = unauthenticated
        self._sockets = sockets
        self.by_socket = sockets is not None
        self._passthrough = passthrough
        self._how = (name, server, [*default_args], unauthenticated, self.by_socket, [*passthrough])

    def same(self, other: Launcher) -> bool:
        """Whether the command, the environment and the weights are the same; all else that the configuration has for a
        model may differ."""
        if not isinstance(other, LlamaCppLauncher) or self._how != other._how:
            return False
        return all(getattr(self._model, name) == getattr(other._model, name) for name in PROCESS)

    def prepare(self) -> CommandFor:
        return self._command_for(resolve(self._name, self._model), self._sockets.path if self._sockets else None)

    def preview(self) -> CommandFor:
        """As `prepare`; a file that is not here has the name that the configuration has for it."""
        model = self._model
        expected = model.path or model.file or (hub.download_name(model.repo, model.variant) if model.repo else "")
        return self._command_for(
            locate(self._name, model) or expected, self._sockets.example if self._sockets else None
        )

    def _command_for(self, gguf: Path | str, new_socket: Callable[[], str] | None) -> CommandFor:
        try:
            program = server_command(self._server)
        except ConfigError as exc:
            raise StartFailed(str(exc)) from exc
        required_args = self._required_by(gguf) if isinstance(gguf, Path) else []
        size = _size(gguf) if isinstance(gguf, Path) else 0
        asked = {ROUTER: "1"} if reports(program[0]) else {}

        def command_for(listen: Endpoint, key: str) -> Command:
            if new_socket is not None:
                listen = Endpoint("localhost", 0, socket=new_socket())
            argv = build_argv(
                program,
                name=self._name,
                model=self._model,
                gguf=gguf,
                host=listen.socket or listen.host,
                port=listen.port,
                required_args=required_args,
                default_args=self._default_args,
            )
            env = child_env(os.environ, {**asked, **self._model.env}, key, self._passthrough)
            farewell = FAREWELL if ROUTER in env else b""
            return Command(argv, env, listen, not self._unauthenticated, size, farewell)

        return command_for

    def _required_by(self, gguf: Path) -> list[str]:
        """The flags for what the file says of itself, and for the projector beside it; none for a broken one, which the
        server itself reports."""
        args = [*self._default_args, *self._model.args]
        flags = _projector(gguf) if takes_projector(args, self._model.env) else []
        try:
            return required_by(read_info(gguf).metadata, self._model.ctx, args) + flags
        except GgufError:
            return flags

    def reader(self, on_share: Callable[[float], None]) -> Callable[[bytes], bytes] | None:
        return Notices(on_share)

    async def ready(self, connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
        if self._unauthenticated:
            return _slots(await wait_until(lambda timeout_s: _props(connections, timeout_s), patience_s))
        paths = {"health_path": "/health", "keyed_path": "/props"}
        return _slots(await prove_ours(connections, patience_s, **paths, remedy=REMEDY))

    async def report(self, connections: ConnectionPool, timeout_s: float) -> Report | None:
        """From `/slots`. Its answer comes from the loop that generates, so it waits for the batch under way."""
        try:
            status, body = await connections.fetch(UpstreamRequest("GET", "/slots", slot=False), timeout_s=timeout_s)
        except UpstreamFailed:
            return None
        return _report(body) if status == 200 else Report(status, None)

    async def probe(self, connections: ConnectionPool, timeout_s: float) -> bool:
        """False also for a server that generates no texts: of that only the report and the processor time are known."""
        try:
            return (await connections.fetch(PROBE, timeout_s=timeout_s))[0] == 200
        except UpstreamFailed:
            return False


def pool_model(
    name: str,
    model: ModelConfig,
    server: str | None,
    default_args: Sequence[str] = (),
    *,
    unauthenticated: bool = False,
    sockets: SocketFolder | None = None,
    passthrough: Sequence[str] = (),
    helper: bool = False,
) -> PoolModel:
    """A configured model as the pool knows it; the other arguments but `helper` are those of its launcher."""
    how: dict[str, Any] = {"unauthenticated": unauthenticated, "sockets": sockets, "passthrough": passthrough}
    launcher = LlamaCppLauncher(name, model, server, default_args, **how)
    source = None
    if model.repo is not None:
        download = hub.download_name(model.repo, model.variant)
        source = Source(download, partial(locate, name, model), hub.work(model.repo, model.variant))
    return PoolModel(name, launcher, source=source, helper=helper, **settings_of(model))


def _size(gguf: Path) -> int:
    """Bytes of all parts of a model; 0 if they cannot be looked at."""
    try:
        return sum(gguf.with_name(part).stat().st_size for part in all_parts(gguf.name))
    except OSError:
        return 0


def _projector(gguf: Path) -> list[str]:
    found = projectors.beside(gguf)
    return ["--mmproj", str(found)] if found is not None else []


async def _props(connections: ConnectionPool, timeout_s: float) -> bytes | None:
    """The answer to `GET /props` once the server is ready."""
    if not await is_up(connections, "/health", timeout_s):
        return None
    return (await connections.fetch(UpstreamRequest("GET", "/props", slot=False), timeout_s=timeout_s))[1]


def _slots(props: bytes) -> int:
    """`total_slots` of `/props`. Source: llama.cpp tools/server/README.md, GET /props."""
    try:
        return max(1, int(json.loads(props)["total_slots"]))
    except (ValueError, KeyError, TypeError):
        return 1


def _report(slots: bytes) -> Report:
    """Source: `server_slot::to_json` in llama.cpp tools/server/server-context.cpp, b11434."""
    try:
        entries = json.loads(slots)
        work = [[entry.get(name) for name in COUNTED] for entry in entries]
        return Report(work, not all(entry.get("is_processing") for entry in entries))
    except (ValueError, TypeError, AttributeError):
        return Report(None, None)
