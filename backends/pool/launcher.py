"""How a server program is started and prepared for requests: what the pool requires of the code that knows one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.pool.readiness import is_up, prove_ours, wait_until
from llama_smart_proxy.backends.weights.downloads import Work

# Where things are, the language, and how to find and drive an accelerator. Anything else stays out, so that no key,
# proxy or setting of ours (HF_TOKEN, AIP_*, LLAMA_ARG_*, LSP_*) reaches a server.
INHERITED = re.compile(
    r"""PATH | HOME | USER | LOGNAME | SHELL | LANG | LANGUAGE | LC_\w+ | TZ | TMPDIR | TERM | NO_COLOR
    | LD_LIBRARY_PATH | DYLD_\w+ | XDG_\w+
    | CUDA_\w+ | NVIDIA_\w+ | NCCL_\w+ | HIP_\w+ | ROCR?_\w+ | HSA_\w+ | AMD_\w+ | GPU_\w+
    | VK_\w+ | GGML_\w+ | OMP_\w+ | GOMP_\w+ | KMP_\w+ | OPENBLAS_\w+ | ONEAPI_\w+ | SYCL_\w+ | ZE_\w+ | MKL_\w+
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: its argument list, its whole environment, and where its server will be reached.

    `listens`: the process itself, or one that it starts, listens there. Only then can the system prove that the server
    is this one, and how busy it is. It is False for a command that has its server started elsewhere: in a container, on
    another machine.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    endpoint: Endpoint
    listens: bool = True


CommandFor = Callable[[Endpoint, str], Command]
"""Makes the command of a server that listens at an address of the pool and accepts the API key. A command that starts
its server on another host names that host in `Command.endpoint`."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a server reports of its own work. `work` changes with every step that it takes, such as a token; `free` is
    whether a slot is free, None if it does not report that."""

    work: object
    free: bool | None


class Launcher(Protocol):
    """Starts the server of one model. It is shared by all processes of that model, one after another."""

    by_socket: bool
    """Whether its commands have unix sockets as their endpoints; no port is then reserved for them."""
    elsewhere: str
    """A clause on what an operator can do who has a program that starts its server elsewhere; may be empty."""

    def prepare(self) -> CommandFor:
        """Find the program and its files. Blocks: called in a thread, before each start. Raises: `StartFailed`."""

    async def ready(self, connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
        """Return once the server accepts requests, with the number of requests it processes in parallel.

        `connections` carry the API key. Call `patience_s` before each attempt: it returns how many seconds that may
        take, and raises when the time is over. Raises: `NotOurs` if another process listens there.
        """

    async def report(self, connections: ConnectionPool, timeout_s: float) -> Report | None:
        """What the server reports of its work, asked while requests wait for it in vain; None if it does not answer
        within `timeout_s` seconds, or cannot be asked."""

    async def probe(self, connections: ConnectionPool, timeout_s: float) -> bool:
        """Whether the server generates one token within `timeout_s` seconds. Called only if it reports a free slot."""

    async def after_ready(self, connections: ConnectionPool) -> None:
        """Runs after `ready`, before the first request is sent. A failure is logged and ignored."""

    async def before_stop(self, connections: ConnectionPool) -> None:
        """Runs before a server that was ready is stopped, while it still accepts requests; not after a crash. It may
        take half of `stop_timeout_s`. A failure is logged and ignored."""


class HttpLauncher:
    """`Launcher` for any program with an HTTP API. A subclass defines `command`, and what differs of the rest:

        class Vllm(HttpLauncher):
            slots = 64
            keyed_path = "/v1/models"

            def command(self, listen: Endpoint, key: str) -> Command:
                argv = ["vllm", "serve", "org/model", "--host", listen.host, "--port", str(listen.port)]
                return Command(argv, {**inherited(os.environ), "VLLM_API_KEY": key}, listen)

    The server is ready when `GET health_path` returns 200. Set `keyed_path` if the server requires its API key there: a
    process of others that took the port is then recognised, as it does not require our key.
    """

    slots: int = 1
    """How many requests the server processes in parallel."""
    health_path: str = "/health"
    keyed_path: str | None = None
    by_socket: bool = False
    elsewhere: str = "a command that starts its server elsewhere has `Command.listens` False"

    def command(self, listen: Endpoint, key: str) -> Command:
        """The command of a server that listens at `listen` and accepts the API key `key`."""
        raise NotImplementedError

    def prepare(self) -> CommandFor:
        return self.command

    async def ready(self, connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
        if self.keyed_path is None:
            await wait_until(lambda timeout_s: is_up(connections, self.health_path, timeout_s), patience_s)
        else:
            await prove_ours(connections, patience_s, health_path=self.health_path, keyed_path=self.keyed_path)
        return self.slots

    async def report(self, connections: ConnectionPool, timeout_s: float) -> Report | None:
        """None: it cannot be asked."""
        return None

    async def probe(self, connections: ConnectionPool, timeout_s: float) -> bool:
        """Not called without a report."""
        return False

    async def after_ready(self, connections: ConnectionPool) -> None:
        """Does nothing."""

    async def before_stop(self, connections: ConnectionPool) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the files of a model are downloaded from when they are not on this machine.

    `download` identifies the download among all others. `find` returns where the files are, None if they are not
    (complete) here; it blocks. `fetch` downloads them.
    """

    download: str
    find: Callable[[], Path | None]
    fetch: Work


@dataclass(frozen=True, slots=True)
class PoolModel:
    """What the pool knows of a model. `name` is unique in the pool.

    `keep_alive_s`: seconds that its process stays loaded when idle, None for the pool's default. A pinned model is
    never stopped to make room. A model without `source` requires no download.
    """

    name: str
    launcher: Launcher
    pinned: bool = False
    keep_alive_s: float | None = None
    source: Source | None = None


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a server process may have."""
    return {name: value for name, value in environ.items() if INHERITED.fullmatch(name)}
