"""What systemd and its service tell each other: sockets on entry, readiness, status and signs of life.

Source: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress

from llama_smart_proxy.backends.feed import Feed, Kind
from llama_smart_proxy.proxy.errors import ConfigError

logger = logging.getLogger(__name__)

FIRST_FD = 3
"""The number of the first inherited socket; the others follow."""
_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Supervisor:
    """The service manager that started this process, if there is one; without one, all of this has no effect.

    The variables are removed from `environ`: they are for this process alone, and not for its children.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        given = {name: environ.pop(name, "") for name in _VARIABLES}
        self.sockets = _inherited(given)
        """The sockets to listen on, in place of the configured address."""
        self._notifications = _connected(given["NOTIFY_SOCKET"])
        self._watchdog_s = _number(given["WATCHDOG_USEC"]) / 1e6 if _is_own(given["WATCHDOG_PID"] or "0") else 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._models = ""
        self._remark = ""
        self._shown = ""

    @property
    def present(self) -> bool:
        """Whether anything that is sent here is read."""
        return self._notifications is not None

    def ready(self) -> None:
        """The sockets accept connections, with the configuration as it is now."""
        if not self._stopping:
            self._notify("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` follows. Its time is for systemd's `Type=notify-reload`."""
        if not self._stopping:
            self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def remark(self, text: str) -> None:
        """Show `text` before the models in the line of `systemctl status`; nothing if it is empty."""
        self._remark = text
        self._show()

    def stopping(self) -> None:
        """No more requests are accepted. Signs of life go on, as the answers in progress may take long."""
        self._stopping = True
        self._notify("STOPPING=1")

    async def show(self, feed: Feed) -> None:
        """Keep the line that `systemctl status` shows up to date: the models that are loaded, and those that load."""
        states: dict[str, object] = {}
        with feed.subscribe() as subscription:
            while self.present and (events := await subscription.events()):
                states.update((event.name, event.data.get("state")) for event in events if event.kind is Kind.MODEL)
                parts = [_listed(state, states) for state in ("loaded", "loading", "unloading")]
                self._models = "; ".join(filter(None, parts)) or "no model loaded"
                self._show()

    def _show(self) -> None:
        if (text := "; ".join(filter(None, (self._remark, self._models)))) != self._shown:
            self._shown = text
            self._notify(f"STATUS={text}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the context, signs of life are sent from the running event loop, twice in the time that the service
        manager requires; without them it ends the process by SIGABRT: a loop that hangs serves no one. What it hangs in
        is then written to stderr."""
        try:
            if self.present and self._watchdog_s > 0:
                with suppress(ValueError, RuntimeError, OSError):  # there is no stderr
                    faulthandler.enable()
                self._alive(asyncio.get_running_loop())
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _alive(self, loop: asyncio.AbstractEventLoop) -> None:
        self._notify("WATCHDOG=1")
        self._timer = loop.call_later(self._watchdog_s / 2, self._alive, loop)

    def _notify(self, line: str) -> None:
        if self._notifications is not None:
            with suppress(OSError):  # it does not read, or has left: the service goes on
                self._notifications.send(line.encode())


def _listed(state: str, states: Mapping[str, object]) -> str:
    names = sorted(name for name, found in states.items() if found == state)
    return f"{state}: {', '.join(names)}" if names else ""


def _inherited(given: MutableMapping[str, str]) -> list[socket.socket]:
    """The TCP sockets that systemd listens on for this process. Raises: ConfigError for any other ones."""
    count = _number(given["LISTEN_FDS"]) if _is_own(given["LISTEN_PID"] or "-1") else 0
    found = []
    for number in range(FIRST_FD, FIRST_FD + count):
        os.set_inheritable(number, False)
        sock = socket.socket(fileno=number)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise ConfigError(
                [f"socket {number} of the service manager is not one of TCP: ListenStream= requires a port"]
            )
        sock.setblocking(False)
        found.append(sock)
    return found


def _connected(address: str) -> socket.socket | None:
    """A socket whose datagrams reach the service manager; None if there is none."""
    if not address.startswith(("/", "@")):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.connect(f"\0{address[1:]}" if address.startswith("@") else address)
    except OSError as exc:
        logger.warning("the service manager cannot be notified at %s: %s", address, exc)
        sock.close()
        return None
    return sock


def _is_own(pid: str) -> bool:
    """Whether a variable is meant for the process with this pid, which is this one; 0 means any."""
    return _number(pid) in (0, os.getpid())


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else -1 if text else 0
