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
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.middleware.scope import PATIENCE_S, make_task
from llama_smart_proxy.proxy.systemd import Supervisor

logger = logging.getLogger(__name__)

ERROR_FRAMES_TIMEOUT_S = 2.0
"""Time for the error frames of aborted streams to reach their clients."""
BACKLOG = 1024
ACCEPTED_S = 0.25
"""Time for a connection that was accepted just before the end to send its request."""
LEAVE_S = 0.3
"""Time for what the process does at its end, such as writing the rest of its log."""


def run(config: Config, *, reload: bool = False) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP. Returns the process's exit status, for `leave`: `EX_CONFIG` if
    others could reach the proxy without a key, and the configuration does not permit that. With `reload`, agents are
    loaded again when their files change.

    Raises: ConfigError for missing agents, for invalid options of agents, and for sockets that are not of TCP.
    """
    _raise_fd_limit()
    supervisor = Supervisor(os.environ)
    if (problem := exposure(config.server, supervisor.sockets)) is not None:
        logger.error("%s", problem)
        return os.EX_CONFIG
    app = App(config)
    app.generation.plugins.reload = reload
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)  # not closed, which would wait for threads
    runner.get_loop().set_task_factory(make_task)
    return runner.run(_serve(app, config, supervisor))


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


class _Stop:
    """What signals ask for: `asked` is set by the first one, `at_once` by the next. A closed terminal sends SIGHUP more
    than once, so that one is never the second."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.reason = ""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                loop.add_signal_handler(number, self._receive, number)

    def _receive(self, number: signal.Signals) -> None:
        if not self.asked.is_set():
            self.reason = number.name
            self.asked.set()
        elif number != signal.SIGHUP and not self.at_once.is_set():
            logger.info("%s: stopping at once", number.name)
            self.at_once.set()

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


async def _serve(app: App, config: Config, supervisor: Supervisor) -> int:
    stop = _Stop()
    try:
        if not await stop.ends_before(app.start(), stop.asked):
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
            _log_startup(config)
            _log_agents(app.generation.plugins)
            for problem in await app.proxy.inspection.problems():
                logger.warning("%s", problem)
            showing = asyncio.ensure_future(supervisor.show(app.proxy.feed))
            await stop.asked.wait()
            supervisor.stopping()
            drain_s = config.server.drain_s
            logger.info("%s: draining for up to %g s; a second Ctrl-C or SIGTERM stops at once", stop.reason, drain_s)
            if supervisor.sockets:
                await _leave_sockets(listeners)
            await _drain(app, front, listeners, stop, drain_s)
            showing.cancel()
        return 0
    finally:
        if not await stop.ends_before(app.close(), stop.at_once):
            await app.stop_models()  # agents may not have closed, but no server is left
        await _cancel_remaining_tasks()
        logger.info("stopped")


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
    """The server that passes clients' requests to `app`."""
    return FrontServer(
        app,
        head_timeout_s=config.server.head_timeout_s,
        keepalive_timeout_s=config.server.keepalive_timeout_s,
        send_stall_s=config.server.send_stall_s,
        dialect_of=app.dialect_of,
    )


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
    stop: _Stop,
    drain_s: float,
) -> None:
    """Let answers in progress finish, for `drain_s` seconds or until a second signal; meanwhile new requests are
    refused, and /health returns 503. Then stop the model servers; streams still open end with an error frame."""
    app.proxy.draining.set()
    app.proxy.feed.close()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    second_signal = asyncio.ensure_future(stop.at_once.wait())
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


def _log_startup(config: Config) -> None:
    """Log which programs and servers run the models."""
    if config.models or config.llama_cpp.models_dir:
        logger.info("models run in: %s", shlex.join(server_command(config.llama_cpp.server)))
    if config.uses_ollama:
        logger.info("models of Ollama at: %s", ", ".join(config.ollama.urls))


def _log_agents(plugins: Plugins) -> None:
    agents = [
        f"{plugin.name}{' (always)' if plugin.always else f' (/{plugin.command})' if plugin.command else ''}"
        for plugin in plugins
        if plugin.loaded is not None
    ]
    if agents:
        logger.info("agents: %s", ", ".join(agents))


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
