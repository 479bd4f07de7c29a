"""One run of the server: listen, serve, drain, stop."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import resource
import shlex
import signal
from contextlib import suppress

import uvloop

from llama_smart_proxy.backends.llamacpp.command import server_command
from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.server import FrontServer
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.middleware.scope import PATIENCE_S, make_task

logger = logging.getLogger(__name__)

LAST_WORDS_S = 2.0
"""Time for the error frames of broken-off streams to reach their clients."""


def run(config: Config, *, reload: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; returns the process's exit status. With `reload`, agents whose files were saved
    are loaded anew.

    Raises: ConfigError for agents that are not there, and for their options.
    """
    _raise_fd_limit()
    app = App(config)
    app.plugins.reload = reload
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_task_factory(make_task)
        return runner.run(_serve(app, config))


async def _serve(app: App, config: Config) -> int:
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    try:
        await app.start()
        front = front_server(app, config)
        _calm_garbage_collector()
        try:
            listener = await loop.create_server(front, config.server.host, config.server.port, backlog=1024)
        except OSError as exc:
            logger.error("cannot listen on %s port %d: %s", config.server.host, config.server.port, exc.strerror or exc)
            return 1
        for sock in listener.sockets:
            host, port = sock.getsockname()[:2]
            logger.info("llama-smart-proxy %s listening on http://%s:%d", __version__, host, port)
        _announce(config)
        _announce_agents(app.plugins)
        number = await signals.get()
        logger.info("%s: draining for up to %g s", number.name, config.server.drain_s)
        await _drain(app, front, listener, signals, config.server.drain_s)
        return 0
    finally:
        await app.close()
        await _end_rest()
        logger.info("stopped")


def front_server(app: App, config: Config) -> FrontServer:
    """The server that hands the requests of clients to `app`."""
    return FrontServer(
        app.dispatcher,
        head_timeout_s=config.server.head_timeout_s,
        keepalive_timeout_s=config.server.keepalive_timeout_s,
        send_stall_s=config.server.send_stall_s,
    )


async def _end_rest() -> None:
    """End what an agent has left running; what ends for nobody does not keep the process from ending."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=PATIENCE_S + 1)


async def _drain(
    app: App,
    front: FrontServer,
    listener: asyncio.Server,
    signals: asyncio.Queue[signal.Signals],
    drain_s: float,
) -> None:
    """Let answers under way finish for `drain_s` seconds or until a second signal; meanwhile new requests are refused,
    and /health says 503. Then stop the model servers: whoever still streams is told so in-stream."""
    app.proxy.draining.set()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    impatience = asyncio.ensure_future(signals.get())
    for reached in (front.quiet, front.empty):  # no answer under way; and then, all have left
        for client in list(front.clients):
            client.close()
        waiting = asyncio.ensure_future(reached.wait())
        await asyncio.wait({waiting, impatience}, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        listener.close()
    impatience.cancel()
    await app.proxy.router.close()
    await front.shutdown(LAST_WORDS_S)


def _announce(config: Config) -> None:
    """What an operator should know of this run."""
    if config.models or config.llama_cpp.models_dir:
        logger.info("models run in: %s", shlex.join(server_command(config.llama_cpp.server)))
    if config.uses_ollama:
        logger.info("models of Ollama at: %s", ", ".join(config.ollama.urls))
    if not _is_loopback(config.server.host):
        logger.warning(
            "listening on %s: whoever reaches this address may use it, there are no API keys yet", config.server.host
        )


def _announce_agents(plugins: Plugins) -> None:
    told = [
        f"{plugin.name}{' (always)' if plugin.always else f' (/{plugin.command})' if plugin.command else ''}"
        for plugin in plugins
        if plugin.made is not None
    ]
    if told:
        logger.info("agents: %s", ", ".join(told))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _raise_fd_limit() -> None:
    """Two sockets for each stream: the usual soft limit of 1024 is soon reached, and the hard one is ours to use."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses some values
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _calm_garbage_collector() -> None:
    """Modules and configuration live as long as the process: a collection need not walk them each time. Nothing on a
    request's path makes reference cycles, so collections may also be rarer than every 700 allocations."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
