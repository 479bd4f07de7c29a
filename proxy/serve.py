"""One run of the server: listen, serve, drain, stop."""

from __future__ import annotations

import asyncio
import atexit
import errno
import gc
import logging
import os
import resource
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NoReturn

import uvloop

from llama_smart_proxy.backends.llamacpp.command import server_command
from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.access.peers import exposure
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, ServerConfig, shapes
from llama_smart_proxy.proxy.http.server import FrontServer
from llama_smart_proxy.proxy.middleware.scope import PATIENCE_S, make_task
from llama_smart_proxy.proxy.reload import Reloader, Source
from llama_smart_proxy.proxy.systemd import Supervisor

logger = logging.getLogger(__name__)

ERROR_FRAMES_TIMEOUT_S = 2.0
"""Time for the error frames of aborted streams to reach their clients."""
BACKLOG = 1024
ACCEPTED_S = 0.25
"""Time for a connection that was accepted just before the end to send its request."""
HANG_UP_S = 1.0
"""Time in which a terminal is gone that is being closed."""
LEAVE_S = 0.3
"""Time for what the process does at its end, such as writing the rest of its log."""


def run(config: Config, source: Source, *, watch: bool = False) -> int:
    """Serve `config` until SIGTERM or SIGINT, or until the terminal is closed; SIGHUP otherwise reads it again from its
    `source`. Returns the process's exit status, for `leave`: `EX_CONFIG` if others could reach the proxy without a key,
    and the configuration does not permit that. With `watch`, it is read again when its file changes, and so are agents.

    Raises: ConfigError for missing agents, for invalid options of agents, and for sockets that are not of TCP.
    """
    _raise_fd_limit()
    supervisor = Supervisor(os.environ)
    if (problem := exposure(config.server, supervisor.sockets)) is not None:
        logger.error("%s", problem)
        return os.EX_CONFIG
    seen = source.stamps(config)
    app = App(config)
    app.generation.plugins.reload = watch
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)  # not closed, which would wait for threads
    runner.get_loop().set_task_factory(make_task)
    return runner.run(_serve(app, Reloader(app, source, supervisor), supervisor, seen if watch else None))


def leave(status: int) -> NoReturn:
    """End the process with this exit status within `LEAVE_S` seconds, with all its threads: the interpreter, libuv and
    executors would wait for theirs, such as one that asks the DNS, or in which an agent calls something."""
    with suppress(RuntimeError):  # no thread can be started
        clock = threading.Timer(LEAVE_S, os._exit, (status,))
        clock.daemon = True
        clock.start()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


class _Signals:
    """What signals ask for: `stop` is set by the first one of a stop, `at_once` by the next, `reload` by SIGHUP.

    A terminal that is closed sends SIGHUP, too, more than once: then it is a stop, and never the second one. So it is
    if the process had a terminal and has none any more, which may be known only a moment later: a shell that is left
    sends it first.
    """

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.at_once = asyncio.Event()
        self.reload = asyncio.Event()
        self.reason = ""
        self._had_terminal = _has_terminal()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP and not self._hung_up():
            self.reload.set()
            if self._had_terminal:
                asyncio.get_running_loop().call_later(HANG_UP_S, self._look_again)
        elif not self.stop.is_set():
            self.reason = number.name
            self.stop.set()
        elif number != signal.SIGHUP and not self.at_once.is_set():
            logger.info("%s: stopping at once", number.name)
            self.at_once.set()

    def _hung_up(self) -> bool:
        return self._had_terminal and not _has_terminal()

    def _look_again(self) -> None:
        if self._hung_up():
            self._receive(signal.SIGHUP)

    async def ends_before(self, work: Coroutine[Any, Any, object], event: asyncio.Event) -> bool:
        """Whether `work` has ended before the event came, or is cancelled because of it. Raises: what it raises."""
        task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        ended = task.done()
        if not ended:
            task.cancel()
            await asyncio.wait({task}, timeout=PATIENCE_S)
        elif not task.cancelled():
            task.result()
        return ended


async def _serve(app: App, reloader: Reloader, supervisor: Supervisor, seen: list[object] | None) -> int:
    signals, config = _Signals(), app.proxy.config
    try:
        if not await signals.ends_before(app.start(), signals.stop):
            return 0
        front = front_server(app, config)
        _tune_garbage_collector()
        try:
            listeners = await _listen(front, config.server, supervisor.sockets)
        except OSError as exc:
            logger.error("%s", _cannot_listen(config.server, exc))
            return 1
        supervisor.ready()
        with supervisor.watched():
            await _log_startup(app)
            work = [supervisor.show(app.proxy.feed), _reload_when_asked(signals, reloader)]
            if seen is not None:
                work.append(reloader.watch(seen))
            beside = [asyncio.ensure_future(each) for each in work]
            await signals.stop.wait()
            supervisor.stopping()
            if supervisor.sockets:
                await _leave_sockets(listeners)
            await _drain(app, front, listeners, signals)
            for task in beside:
                task.cancel()
        return 0
    finally:
        await signals.ends_before(reloader.close(), signals.at_once)  # agents that it has started are closed
        if not await signals.ends_before(app.close(), signals.at_once):
            await app.stop_models()  # agents may not have closed, but no server is left
        await _cancel_remaining_tasks()
        logger.info("stopped")


async def _reload_when_asked(signals: _Signals, reloader: Reloader) -> None:
    while True:
        await signals.reload.wait()
        signals.reload.clear()
        await reloader.reload("SIGHUP")


def _has_terminal() -> bool:
    """Whether the process has a controlling terminal that is not closed."""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
        return True
    return False


async def _listen(front: FrontServer, server: ServerConfig, inherited: list[socket.socket]) -> list[asyncio.Server]:
    """Listen on the `inherited` sockets, or else on the configured address. Raises: OSError if that is not possible."""
    places: list[dict[str, Any]] = [{"sock": sock} for sock in inherited] or [_address(server)]
    loop = asyncio.get_running_loop()
    listeners = [await loop.create_server(front, **place, backlog=BACKLOG) for place in places]
    for listener in listeners:
        for sock in listener.sockets:
            host, port = sock.getsockname()[:2]
            logger.info("llama-smart-proxy %s listening on http://%s:%d", __version__, shapes.bracketed(host), port)
    return listeners


async def _leave_sockets(listeners: list[asyncio.Server]) -> None:
    """Leave the connections that come from now on to the next process, for which the sockets stay open, and let those
    that have just been accepted send their requests."""
    for listener in listeners:
        listener.close()
    await asyncio.sleep(ACCEPTED_S)


def _cannot_listen(server: ServerConfig, exc: OSError) -> str:
    """Why the proxy cannot listen, and the setting that helps."""
    setting = "--host, HOST= of make run, or server.host selects another address"
    if exc.errno in (errno.EADDRINUSE, errno.EACCES):  # EACCES: it is reserved for privileged users
        setting = "--port, PORT= of make run, or server.port selects another port"
    reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror or exc
    return f"cannot listen on {server.host} port {server.port}: {reason}; {setting}"


def _address(server: ServerConfig) -> dict[str, Any]:
    """Where to listen, as arguments of `create_server`, which would make a socket for `::` refuse IPv4.

    Raises: OSError if that is not possible.
    """
    if server.host != "::" or not socket.has_dualstack_ipv6():
        return {"host": server.host, "port": server.port}
    return {"sock": socket.create_server(("::", server.port), family=socket.AF_INET6, dualstack_ipv6=True)}


def front_server(app: App, config: Config) -> FrontServer:
    """The server that passes clients' requests to `app`, with the time limits of its configuration."""
    front = FrontServer(app, dialect_of=app.dialect_of, **_limits(config))
    app.followers.append(lambda config: front.limit(**_limits(config)))
    return front


def _limits(config: Config) -> dict[str, float]:
    server = config.server
    return {
        "head_timeout_s": server.head_timeout_s,
        "keepalive_timeout_s": server.keepalive_timeout_s,
        "send_stall_s": server.send_stall_s,
    }


async def _cancel_remaining_tasks() -> None:
    """Cancel tasks that agents left running, and wait for them for a limited time: one that ignores its cancellation
    must not keep the process alive."""
    remaining = asyncio.all_tasks() - {asyncio.current_task()}
    for task in remaining:
        task.cancel()
    if remaining:
        await asyncio.wait(remaining, timeout=PATIENCE_S + 1)


async def _drain(
    app: App,
    front: FrontServer,
    listeners: list[asyncio.Server],
    signals: _Signals,
) -> None:
    """Let answers in progress finish, for `server.drain_s` seconds or until a second signal; meanwhile new requests are
    refused, and /health returns 503. Then stop the model servers; streams still open end with an error frame."""
    drain_s, reason = app.proxy.config.server.drain_s, signals.reason
    logger.info("%s: draining for up to %g s; a second Ctrl-C or SIGTERM stops at once", reason, drain_s)
    app.proxy.draining.set()
    app.proxy.feed.close()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    second_signal = asyncio.ensure_future(signals.at_once.wait())
    for reached in (front.quiet, front.empty):  # first no answer in progress, then no connection
        for client in list(front.clients):
            client.close()
        waiting = asyncio.ensure_future(reached.wait())
        await asyncio.wait(
            {waiting, second_signal}, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        for listener in listeners:
            listener.close()
    second_signal.cancel()
    await app.stop_models()
    await front.shutdown(ERROR_FRAMES_TIMEOUT_S)


async def _log_startup(app: App) -> None:
    """Log which programs and servers run the models, which agents there are, and what is missing."""
    config = app.proxy.config
    if config.models or config.llama_cpp.models_dir:
        logger.info("models run in: %s", shlex.join(server_command(config.llama_cpp.server)))
    if config.uses_ollama:
        logger.info("models of Ollama at: %s", ", ".join(config.ollama.urls))
    agents = [
        f"{plugin.name}{' (always)' if plugin.always else f' (/{plugin.command})' if plugin.command else ''}"
        for plugin in app.generation.plugins
        if plugin.loaded is not None
    ]
    if agents:
        logger.info("agents: %s", ", ".join(agents))
    for problem in await app.proxy.inspection.problems():
        logger.warning("%s", problem)


def _raise_fd_limit() -> None:
    """Raise the soft limit of open files to the hard one: each stream takes two sockets, and 1024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses some values
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tune_garbage_collector() -> None:
    """Exclude modules and configuration from collections, as they live as long as the process, and collect less often
    than every 700 allocations, as no request creates reference cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
