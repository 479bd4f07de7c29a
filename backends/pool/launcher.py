"""How a server program is started and prepared for requests: what the pool requires of the code that knows one."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.pool.readiness import is_up, prove_ours, wait_until
from llama_smart_proxy.backends.weights.downloads import Work
from llama_smart_proxy.proxy.config import OWN_VARIABLE, ModelConfig, PoolConfig

INHERITED = """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE LC_* TZ TMPDIR TMP TEMP TERM NO_COLOR XDG_* LD_LIBRARY_PATH DYLD_*
    CUDA* CUBLAS* CUDNN* NVIDIA_* NCCL_* __NV_*
    ROC* HIP* HSA_* HSAKMT_* AMD* RCCL_* MIOPEN_* TENSILE_* GPU_*
    VK_* VULKAN_* __VK_* DISABLE_LAYER_* DISABLE_VK_LAYER_* __GL* __EGL* MESA_* LIBGL_* DRI_PRIME GALLIUM_* RADV_*
    ACO_* ANV_* INTEL_* NVK_* NOUVEAU_* NAK_* NIR_* TU_* IR3_* V3D* PAN_* PANVK_* VN_* LP_* LVP_* ZINK_* MVK_*
    ONEAPI_* SYCL_* IPEX_* BIGDL_* DPCPP_* UR_* ZE_* ZES_* ZET_* IGC_* TBB* MKL* CMPLR_ROOT OPENVINO_* OV_*
    OCL_* OPENCL_* CL_* POCL_* RUSTICL_* MTL_* METAL_* MUSA_* MTHREADS_* ASCEND_* CANN_* ACL_* HCCL_* ATB_*
    HEXAGON_* ADSP_LIBRARY_PATH SPACEMIT_* ZENDNN_* DAWN_* UCX_*
    GGML_* MTMD_* LLGUIDANCE_* LLAMA_*_DEBUG LLAMA_*_DISABLE LLAMA_TRACE LLAMA_SET_ROWS
    OMP_* GOMP_* KMP_* LIBOMP_* LIBOMPTARGET_* OPENBLAS_* GOTO_* BLIS_* VECLIB_* ARMPL_*
"""
"""The variables of its environment that a server may have: where things are, the language, and how to find and drive an
accelerator. Anything else stays out, so that no proxy and no setting of ours (AIP_*, LLAMA_ARG_*, LSP_*) reaches it."""
_SECRET = re.compile(
    r"(^|.*_)(\w*(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?|AUTH|PASS|PWD)(_.*)?", re.IGNORECASE
)
"""Variables that no pattern matches."""
_serial = count(1)


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: its argument list, its whole environment, and where its server will be reached.

    `listens`: the process itself, or one that it starts, listens there. Only then can the system prove that the server
    is this one, and how busy it is. It is False for a command that has its server started elsewhere: in a container, on
    another machine. `size_bytes` is how large the model's files are, 0 if unknown: how long starts take is learned for
    that size. `farewell` is what is written to its standard input, beside the SIGTERM, to have it end; without one, its
    input is empty. `stop` makes the argument list of a command that ends it, given its pid, to be run before any
    signal. If it is `confined`, neither it nor what it starts can gain privileges, as by setuid programs.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    endpoint: Endpoint
    listens: bool = True
    size_bytes: int = 0
    farewell: bytes = b""
    stop: Callable[[int], Sequence[str]] | None = None
    confined: bool = True


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
    echoes: re.Pattern[str] | None
    """Matches lines of the server's log that only repeat that it has failed."""
    elsewhere: str
    """A clause on what an operator can do who has a program that starts its server elsewhere; may be empty."""

    def prepare(self) -> CommandFor:
        """Find the program and its files. Blocks: called in a thread, before each start. Raises: `StartFailed`."""

    def preview(self) -> CommandFor:
        """As `prepare`, for display: files may be missing."""

    def reader(self, on_share: Callable[[float], None]) -> Callable[[bytes], bytes] | None:
        """What reads the output of one process: it is called with each piece, returns what is to be logged, and calls
        `on_share` with how much is loaded, from 0 to 1. None if all is to be logged."""

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

    def same(self, other: Launcher) -> bool:
        """Whether `other`, made from an earlier configuration, starts the same server in the same way. Then the process
        that it has started goes on; else that is replaced once its answers are complete."""


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
    echoes: re.Pattern[str] | None = None
    elsewhere: str = "a command that starts its server elsewhere has `Command.listens` False"

    def command(self, listen: Endpoint, key: str) -> Command:
        """The command of a server that listens at `listen` and accepts the API key `key`."""
        raise NotImplementedError

    def prepare(self) -> CommandFor:
        return self.command

    def preview(self) -> CommandFor:
        return self.prepare()

    def reader(self, on_share: Callable[[float], None]) -> Callable[[bytes], bytes] | None:
        """None: all of it is to be logged."""
        return None

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

    def same(self, other: Launcher) -> bool:
        """Whether it is of the same class, with equal attributes."""
        return type(self) is type(other) and vars(self) == vars(other)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the files of a model are downloaded from when they are not on this machine.

    `download` identifies the download among all others. `find` returns where the files are, None if they are not
    (complete) here; it blocks. `fetch` downloads them.
    """

    download: str
    find: Callable[[], Path | None]
    fetch: Work

    def is_of(self, model: PoolModel) -> bool:
        """Whether `model` has this source, or an equal one."""
        return model.source is not None and model.source.download == self.download


def settings_of(model: ModelConfig) -> dict[str, Any]:
    """The fields of `PoolModel` that a model's configuration sets."""
    return {
        "pinned": model.pinned,
        "keep_alive_s": model.keep_alive,
        "title": model.title or "",
        "concurrent": model.concurrent,
        "load_timeout_s": model.load_timeout_s,
        "stop_timeout_s": model.stop_timeout_s,
    }


@dataclass(frozen=True, slots=True)
class PoolModel:
    """What the pool knows of a model. `name` is unique in the pool.

    `keep_alive_s`: seconds that its process stays loaded when idle, None for the pool's default. A pinned model is
    never stopped to make room. A model without `source` requires no download. `title` is its name for people, empty
    for `name`. `concurrent` is the most requests that occupy slots of its server, None for all slots. The time limits
    are those of its process, None for the pool's. A `helper` has a place beside those of other models. `born` is
    greater for one that was made later: of two with the same name, that one applies.
    """

    name: str
    launcher: Launcher
    pinned: bool = False
    keep_alive_s: float | None = None
    source: Source | None = None
    title: str = ""
    concurrent: int | None = None
    load_timeout_s: float | None = None
    stop_timeout_s: float | None = None
    helper: bool = False
    born: int = field(default_factory=lambda: next(_serial), compare=False)

    def same(self, other: PoolModel) -> bool:
        """Whether a process that was started for `other` serves this one, too."""
        return self.concurrent == other.concurrent and self.launcher.same(other.launcher)

    def at_once(self, slots: int) -> int:
        """How many of its server's slots are used."""
        return slots if self.concurrent is None else min(slots, self.concurrent)

    def limits(self, config: PoolConfig) -> PoolConfig:
        """`config` with the time limits of its process."""
        own = {"load_timeout_s": self.load_timeout_s, "stop_timeout_s": self.stop_timeout_s}
        given = {name: value for name, value in own.items() if value is not None}
        return config.model_copy(update=given) if given else config


def latest_born() -> int:
    """The number behind those of all models that have been made."""
    return next(_serial)


def inherited(environ: Mapping[str, str], passthrough: Iterable[str] = ()) -> dict[str, str]:
    """The part of an environment that a server process may have; `passthrough` are further names and patterns.

    A pattern matches neither a secret nor a variable that the proxy sets or keeps back itself; the name of a secret
    does.
    """
    names = set(passthrough)
    patterns = _patterns(" ".join([INHERITED, *names]))

    def allowed(name: str) -> bool:
        return name in names or (patterns.fullmatch(name) is not None and not is_kept_back(name))

    return {name: value for name, value in environ.items() if allowed(name)}


def is_kept_back(name: str) -> bool:
    """Whether no pattern lets a variable of this name through."""
    return _SECRET.fullmatch(name) is not None or OWN_VARIABLE.fullmatch(name) is not None


@cache
def _patterns(text: str) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, text.split())))
