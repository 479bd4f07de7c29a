"""How the pool starts the server of a model by the command that the configuration has for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.pool.launcher import Command, CommandFor, HttpLauncher, inherited
from llama_smart_proxy.backends.pool.readiness import is_up, wait_until
from llama_smart_proxy.proxy.config import ModelConfig, fill
from llama_smart_proxy.proxy.errors import StartFailed

AT_ONCE = 10
"""Requests that a server gets at one time unless `concurrent` is set; it is not known how many it can process."""
NO_CHECK = "none"


@dataclass(frozen=True)
class CommandLauncher(HttpLauncher):
    """`Launcher` of any server with an HTTP API. `argv`, `stop`, `url` and `env` have placeholders, as in the
    configuration; `endpoint` answers 200 once the server is ready. `passthrough` are further variables of ours that it
    may have."""

    name: str
    argv: Sequence[str]
    stop: Sequence[str] = ()
    url: str = ""
    env: Mapping[str, str | None] = field(default_factory=dict)
    endpoint: str = "/health"
    is_elsewhere: bool = False
    slots: int = AT_ONCE
    passthrough: Sequence[str] = ()
    elsewhere = "a cmd that starts its server elsewhere, as in a container, requires cmd_stop"

    @classmethod
    def of(cls, name: str, model: ModelConfig, passthrough: Sequence[str] = ()) -> CommandLauncher:
        """The one for a model of the configuration."""
        return cls(
            name, tuple(model.cmd), tuple(model.cmd_stop), model.url or "", model.env, model.check_endpoint,
            model.is_elsewhere, model.concurrent or AT_ONCE, tuple(passthrough),
        )  # fmt: skip

    def prepare(self) -> CommandFor:
        """Raises: `StartFailed` if there is no such program."""
        if (missing := self.missing()) is not None:
            raise StartFailed(f"Model '{self.name}' failed to load: {missing}.")
        return self.command

    def preview(self) -> CommandFor:
        return self.command

    def missing(self) -> str | None:
        """That its program, or the one that ends it, cannot be run; None if both can."""
        own = self.env.get("PATH", os.environ.get("PATH"))
        for setting, argv in (("cmd", self.argv), ("cmd_stop", self.stop)):
            if argv and shutil.which(argv[0], path=own) is None:
                return f"{setting}: {argv[0]}: no such program, or not executable"
        return None

    def command(self, listen: Endpoint, key: str) -> Command:
        values = {"PORT": str(listen.port), "HOST": listen.host, "MODEL_ID": self.name, "API_KEY": key}
        env = {**inherited(os.environ, self.passthrough), **self.env}
        return Command(
            [fill(word, values) for word in self.argv],
            {name: fill(value, values) for name, value in env.items() if value is not None},
            _endpoint(fill(self.url, values)) if self.url else listen,
            listens=not self.is_elsewhere,
            confined=not self.is_elsewhere,
            stop=(lambda pid: [fill(word, {**values, "PID": str(pid)}) for word in self.stop]) if self.stop else None,
        )

    async def ready(self, connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
        if self.endpoint != NO_CHECK:
            await wait_until(lambda timeout_s: is_up(connections, self.endpoint, timeout_s), patience_s)
        return self.slots


def _endpoint(url: str) -> Endpoint:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return Endpoint(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path)
