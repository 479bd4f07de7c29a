"""One life of one server process, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.exchange import Timeouts
from llama_smart_proxy.backends.pool.causes import cause_in
from llama_smart_proxy.backends.pool.ending import end
from llama_smart_proxy.backends.pool.family import Vitals, vitals
from llama_smart_proxy.backends.pool.launcher import Command, CommandFor, PoolModel
from llama_smart_proxy.backends.pool.logring import LogRing
from llama_smart_proxy.backends.pool.messages import describe_exit, without_secrets
from llama_smart_proxy.backends.pool.ports import Ports, is_free, listens
from llama_smart_proxy.backends.pool.readiness import Foreign, NotOurs, TakesAnyKey, new_key, read_within, wait_until
from llama_smart_proxy.backends.pool.spawn import Child, spawn
from llama_smart_proxy.backends.pool.watch import Watch, look_s
from llama_smart_proxy.backends.threads import log_failure, run_in_thread
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.errors import ProxyError, StartFailed

logger = logging.getLogger(__name__)

BIND_ATTEMPTS = 3
QUOTED_LINES = 10
"""How many lines of a server's output the log and `/health` show of a failure."""
BEFORE_STOP_SHARE = 0.5
"""The part of `stop_timeout_s` that a launcher's `before_stop` may take."""
STALLED = "model_stalled"
"""Error code of a server that was killed because it generated nothing any more."""


class State(StrEnum):
    """Where in its one life a process is."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Instance:
    """A server process and its state, STARTING → READY → STOPPING → STOPPED, which is changed only here.

    `on_change(instance)` is called, in the event loop, after each change that `stop()` did not cause: it is ready, it
    failed, crashed or stalled (`error` is the reason), it has stopped. Once STOPPED its process is reaped and its port
    released, unless the kernel cannot end it.
    `start()` is called once; `stop()` at any time, any number of times.

    `worked` is set by the caller that received a complete answer from it. `pid` and `port` are 0 until there is a
    process, `slots` (how many requests it processes in parallel) and `connections` are valid once it was READY,
    `load_s` is how long that took; before, `share` is how much is loaded, from 0 to 1, None if that is unknown.
    """

    def __init__(
        self,
        model: PoolModel,
        config: PoolConfig,
        ports: Ports,
        on_change: Callable[[Instance], None],
        on_share: Callable[[Instance], None] = lambda instance: None,
    ) -> None:
        self.name = model.name
        self.model = model
        self.state = State.STARTING
        self.error: StartFailed | None = None
        self.worked = False
        self.pid = 0
        self.port = 0
        self.slots = 1
        self.load_s: float | None = None
        self.share: float | None = None
        self.connections: ConnectionPool
        self._config = model.limits(config)
        self._ports = ports
        self._host = ports.host
        self._on_change = on_change
        self._on_share = on_share
        self._key = new_key()
        self._env: dict[str, str] = {}
        self.log = LogRing(partial(_blanked, self._env, self._key))  # which outlives the instance, and does not keep it
        self._command: Command | None = None
        self._child: Child | None = None
        self._reader: Callable[[bytes], bytes] | None = None
        self._exit: asyncio.Future[None]
        self._starting: asyncio.Task[None]
        self._life: asyncio.Task[None]
        self._over = asyncio.Event()
        self._watch: Watch | None = None
        self._works_itself = True
        self._since = time.monotonic()
        self._last_output = 0.0

    def start(self, cause: str) -> None:
        """Begin: find the files, start a process, wait until it is ready."""
        logger.info("%s: starting: %s", self.name, cause)
        loop = asyncio.get_running_loop()
        self._starting = loop.create_task(self._start(), name=f"start {self.name}")
        self._life = loop.create_task(self._live(), name=f"life of {self.name}")
        self._life.add_done_callback(partial(log_failure, logger))

    def stop(self, cause: str) -> None:
        """Begin to stop: close every connection, then SIGTERM, SIGTERM once more, SIGKILL within `stop_timeout_s`.

        The second SIGTERM is for llama-server, which ignores the first one while a stream lives. A process that is
        still loading has nothing to lose and is killed; the launcher may save something of one that was ready. The
        command that ends a server, if there is one, is run before all signals, in either case.
        """
        if self.state in (State.STARTING, State.READY):
            self._become(State.STOPPING, cause)
            self._starting.cancel()

    async def wait_stopped(self, timeout_s: float | None = None) -> bool:
        """Wait until it has STOPPED, at most `timeout_s` seconds; return whether it has."""
        await asyncio.wait({self._life}, timeout=timeout_s)
        return self._life.done()

    @property
    def loading_s(self) -> float:
        """Seconds since its start, or since its state changed last."""
        return time.monotonic() - self._since

    @property
    def stop_timeout_s(self) -> float:
        """Seconds between the request to stop and SIGKILL."""
        return self._config.stop_timeout_s

    @property
    def size_bytes(self) -> int:
        """How large the model's files are; 0 if that is unknown."""
        return self._command.size_bytes if self._command is not None else 0

    @property
    def argv(self) -> Sequence[str]:
        """Its command line; empty before there is one."""
        return self._command.argv if self._command is not None else ()

    @property
    def suspicion(self) -> str | None:
        """Why it is likely that it has stalled; None if it is not."""
        return self._watch.suspicion if self._watch is not None else None

    def log_tail(self, lines: int = 200) -> list[str]:
        """The last lines the process printed, secrets blanked."""
        return self.log.tail(lines)

    # -- its life --------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        await asyncio.wait({self._starting})
        was_ready = False
        if not self._starting.cancelled():
            failure = self._starting.exception() or self._gone_already()
            if self.state is State.STARTING and failure is not None:
                self._fail(failure)
            elif self.state is State.STARTING:
                was_ready = True
                self.load_s = time.monotonic() - self._since
                at = f"port {self.port}" if self.port else "unix socket"
                self._become(State.READY, f"pid {self.pid}, {at}, {self.slots} slots")
                self._watch = self._new_watch()
                self._on_change(self)
                await self._over.wait()
                await self._watch.close()
        if self._child is not None:
            await self._end(self._child, gently=was_ready and self.error is None)
        if self.state is not State.STOPPED:
            self._become(State.STOPPED, "ended")
            self._on_change(self)

    async def _end(self, child: Child, *, gently: bool) -> None:
        """Return once the process is reaped, or will not be."""
        assert self._command is not None
        begun = time.monotonic()
        grace_s = self.stop_timeout_s if gently or self._command.stop is not None else 0.0
        if gently and child.returncode is None:
            await self._before_stop(grace_s * BEFORE_STOP_SHARE)
            grace_s -= time.monotonic() - begun
        await end(self.name, child, self._command, grace_s, self._printed)

    async def _before_stop(self, limit_s: float) -> None:
        """Its own connections are closed by now, so that no request is under way: the launcher gets new ones."""
        connections = self._connections()
        await self._hook("before_stop", self.model.launcher.before_stop(connections), limit_s)
        connections.close("it is being stopped")

    async def _hook(self, name: str, call: Awaitable[None], limit_s: float) -> None:
        """A failure of the launcher's code must neither keep the server from serving nor from ending."""
        try:
            async with asyncio.timeout(limit_s):
                await call
        except Exception as exc:
            bug = None if isinstance(exc, ProxyError | TimeoutError) else exc
            reason = str(exc) or type(exc).__name__
            logger.warning("%s: %s of its launcher failed: %s", self.name, name, reason, exc_info=bug)

    def _gone_already(self) -> StartFailed | None:
        """The error if the process ended in the very moment it became ready."""
        child = self._child
        return self._exited_error() if child is not None and child.returncode is not None else None

    def _fail(self, failure: BaseException) -> None:
        if not isinstance(failure, StartFailed):
            logger.error("%s: unforeseen failure of a start", self.name, exc_info=failure)
            failure = StartFailed(f"Model '{self.name}' failed to load: {type(failure).__name__}.")
        self.error = failure
        self._become(State.STOPPING, " | ".join((failure.message, *failure.log)))
        self._on_change(self)

    def _become(self, state: State, cause: str) -> None:
        now = time.monotonic()
        level = logging.ERROR if self.error is not None and state is not State.STOPPED else logging.INFO
        logger.log(level, "%s: %s -> %s after %.3f s: %s", self.name, self.state, state, now - self._since, cause)
        self.state, self._since = state, now
        if self.share is not None:
            self._set_share(None)
        if state is not State.READY:
            self._over.set()
            if hasattr(self, "connections"):
                intended = state is State.STOPPING and self.error is None
                code = "shutting_down" if intended else "upstream_disconnected"
                self.connections.close(cause, code=code)
        if state is State.STOPPED and (self._child is None or self._child.returncode is not None):
            self._release_port()

    def _release_port(self) -> None:
        if self._command is not None and self._command.endpoint.socket:
            Path(self._command.endpoint.socket).unlink(missing_ok=True)
        self._ports.release(self.port)
        self.port = 0

    # -- starting --------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        command_for = await self._prepared()
        for _ in range(BIND_ATTEMPTS):
            self._host = self._ports.host
            self.port = 0 if self.model.launcher.by_socket else self._ports.reserve()
            child = self._spawn(command_for)
            try:
                return await self._until_ready(child)
            except NotOurs as exc:
                if isinstance(exc, TakesAnyKey) and await self._is_owned(child):
                    message = f"its server does not enforce the API key that it is given; {exc.remedy}."
                    raise StartFailed(f"Model '{self.name}' failed to load: {message}") from exc
                failure = exc
            logger.warning("%s: port %d: %s; trying another", self.name, self.port, failure)
            child.kill()
            await child.wait()
            self._release_port()
        lost = f"each of {BIND_ATTEMPTS} ports was lost: {failure}"
        hint = f" ({hint})" if isinstance(failure, Foreign) and (hint := self.model.launcher.elsewhere) else ""
        raise StartFailed(f"Model '{self.name}' failed to load: {lost}{hint}.")

    async def _prepared(self) -> CommandFor:
        """Raises: `StartFailed`, also when the disk with the files does not answer."""
        return await read_within(self._config, self.name, run_in_thread(self.model.launcher.prepare))

    def _spawn(self, command_for: CommandFor) -> Child:
        loop = asyncio.get_running_loop()
        self._exit = loop.create_future()
        self._command = command_for(Endpoint(self._host, self.port), self._key)
        self._reader = self.model.launcher.reader(self._set_share)
        command = self._command
        self._env.update(command.env)
        self._child = spawn(
            command.argv, command.env, self._printed, self._exited, command.farewell, confined=command.confined
        )
        self.pid = self._child.pid
        self._last_output = loop.time()
        return self._child

    async def _until_ready(self, child: Child) -> None:
        """Return once the process is ready; whichever comes first of that, its end and the load timeout decides.

        Raises: `StartFailed`; `NotOurs` when another process has the port.
        """
        loop = asyncio.get_running_loop()
        self.connections = self._connections()
        proving = loop.create_task(self._prove(child), name=f"readiness of {self.name}")
        try:
            await asyncio.wait({proving, self._exit}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            proving.cancel()
            await asyncio.wait({proving})
        verdict = None if proving.cancelled() else proving.exception()
        if child.returncode is not None:
            self.connections.close("it ended")
            if self.port and not is_free(self._host, self.port):
                raise NotOurs("another process listens there")
            raise self._exited_error()
        if verdict is not None:
            self.connections.close("it is not ours, or does not answer")
            raise verdict

    def _connections(self) -> ConnectionPool:
        assert self._command is not None and self._child is not None
        child, first_byte_s = self._child, self._config.first_byte_timeout_s
        limits = Timeouts(connect_s=first_byte_s, first_byte_s=first_byte_s, idle_s=self._config.idle_timeout_s)
        return ConnectionPool(
            self._command.endpoint,
            headers=[("Authorization", f"Bearer {self._key}")],
            timeouts=limits,
            guard=lambda: child.alive,
            sweep_s=look_s(self._config.stall_timeout_s),
        )

    async def _prove(self, child: Child) -> None:
        """Nothing is sent to what listens there before it is known to be our child."""
        launcher, command = self.model.launcher, self._command
        assert command is not None
        await wait_until(self.connections.accepts, self._patience_s)
        while (owned := await self._is_owned(child)) is False and command.listens:
            if not is_free(command.endpoint.host, command.endpoint.port):
                raise Foreign
            # Who accepted listens no more: the child, as a rule, which is about to end.
            await wait_until(self.connections.accepts, self._patience_s)
        self._works_itself = owned is not False
        self.slots = await launcher.ready(self.connections, self._patience_s)
        await self._hook("after_ready", launcher.after_ready(self.connections), self._config.load_timeout_s)

    async def _is_owned(self, child: Child) -> bool | None:
        """Whether the child is who listens at the address of its command; None if the system does not tell."""
        assert self._command is not None
        at = self._command.endpoint
        return True if at.socket else await run_in_thread(partial(listens, child.pid, at.host, at.port))

    def _patience_s(self) -> float:
        """Seconds the process may still stay silent. Raises: `StartFailed` when none are left."""
        limit_s = self._config.load_timeout_s
        left_s = self._last_output + limit_s - asyncio.get_running_loop().time()
        if left_s > 0:
            return left_s
        message = f"did not load: no sign of life for {limit_s:g} s"
        raise self._failure(message, status=504, code="model_load_timeout")

    # -- what the process does -------------------------------------------------------------------------------------

    def _printed(self, data: bytes) -> None:
        self._last_output = asyncio.get_running_loop().time()
        self.log.feed(self._reader(data) if self._reader is not None else data)

    def _set_share(self, share: float | None) -> None:
        """Neither 0 nor 1 shows anything: a server may read its file only when it is used, long after either."""
        before, self.share = self.share, share if share is not None and 0 < share < 1 else None
        if self.share != before:
            self._on_share(self)

    def _exited(self, returncode: int) -> None:
        if not self._exit.done():
            self._exit.set_result(None)
        if self.state is State.STOPPED:
            self._release_port()
        if self.state is State.READY:
            how = describe_exit(returncode)
            self.error = self._failure(f"crashed: its server {how}", code="model_crashed")
            logger.error("%s", " | ".join((self.error.message, *self.error.log)))
            self._become(State.STOPPED, f"its server {how}")
            self._on_change(self)

    def _new_watch(self) -> Watch:
        limit_s = self._config.stall_timeout_s
        return Watch(self.name, limit_s, self.model.launcher, self.connections, self._vitals, self._stalled)

    def _vitals(self) -> Vitals | None:
        """None if the child is not who does the work."""
        return vitals(self.pid) if self._works_itself else None

    def _stalled(self, reason: str) -> None:
        if self.state is State.READY:
            reason = f"{reason} (server_pool.stall_timeout_s: {self._config.stall_timeout_s:g})"
            self.error = StartFailed(f"Model '{self.name}' stalled: {reason}.", code=STALLED)
            self._become(State.STOPPING, f"it stalled: {reason}")
            self._on_change(self)

    def _exited_error(self) -> StartFailed:
        assert self._child is not None and self._child.returncode is not None
        how = describe_exit(self._child.returncode)
        hint = " (it was to listen on a unix socket)" if self._command and self._command.endpoint.socket else ""
        return self._failure(f"failed to load: its server {how}{hint}")

    def _failure(self, what: str, **fields: Any) -> StartFailed:
        """The error that the model `what`, with the cause if the server has printed it."""
        lines = self.log_tail()
        cause = cause_in(lines, self.model.launcher.echoes)
        more = "; /health shows the end of its log" if lines else ", and printed nothing"
        message = f"Model '{self.name}' {what}{f': {cause}' if cause else ''}{more}."
        return StartFailed(message, log=lines[-QUOTED_LINES:], **fields)


def _blanked(env: Mapping[str, str], key: str, text: str) -> str:
    return without_secrets(text, env, key)
