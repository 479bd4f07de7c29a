"""The proxy as a service of systemd: what it tells the service manager, and the sockets that it is given."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.support import raw_client
from tests.support.e2e_support import Fakes, Gate, chat, fakes, gate, streaming
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes", "gate"]  # fixtures
PATIENT = {"server": {"drain_s": 120}}


class Manager:
    """What a service manager receives, line by line, in order."""

    def __init__(self, address: str) -> None:
        self.lines: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def received(self, line: str) -> int:
        """How often this line has come."""
        while True:
            try:
                self.lines += self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self.lines.count(line)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@{tmp_path}"


async def test_readiness_signs_of_life_and_the_end_are_sent_in_order(fakes: Fakes, gate: Gate, address: str) -> None:
    manager = Manager(address.replace("@", "\0"))
    env = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
    async with running_proxy(fakes.config({"m": fakes.model(TOKENS=5)}) | PATIENT, env=env) as proxy:
        await until(lambda: manager.received("READY=1"), what="the readiness")
        assert (await chat(proxy, "m")).status == 200
        await until(lambda: manager.received("STATUS=loaded: m"), what="the models in the status")
        (child,) = proxy.children()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys(), "children are no services"
        await until(lambda: manager.received("WATCHDOG=1") > 2, what="signs of life")
        async with streaming(proxy, "m", fake={"last_at": str(gate)}) as stream:
            await stream.until_text()
            proxy.send(signal.SIGTERM)
            await until(lambda: manager.received("STOPPING=1"), what="the news of the end")
            before = manager.received("WATCHDOG=1")
            await until(lambda: manager.received("WATCHDOG=1") > before + 1, what="signs of life while it drains")
            gate.open()
            await stream.rest()
        assert await proxy.ended() == 0
    assert manager.received("READY=1") == manager.received("STOPPING=1") == 1
    assert manager.lines[0] == "READY=1"
    manager.close()


async def test_a_loop_that_hangs_sends_no_sign_of_life_and_shows_where(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    manager = Manager(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
    config = fakes.config({"m": fakes.model()}) | {"agents_dirs": [str(tmp_path)]}
    async with running_proxy(config, env=env, clean_log=False) as proxy:
        await until(lambda: manager.received("WATCHDOG=1") > 2, what="signs of life")
        asked = asyncio.ensure_future(chat(proxy, "m", messages=[{"role": "user", "content": "/hanging hi"}]))
        hang = tmp_path / "hangs"
        await until(hang.exists, what="the hang")
        before = manager.received("WATCHDOG=1")
        await asyncio.sleep(0.5)  # five times the limit, which a loop that lives would not let pass
        assert manager.received("WATCHDOG=1") == before
        proxy.send(signal.SIGABRT)  # as the service manager does
        assert await proxy.ended() == -signal.SIGABRT
        assert "hanging.py" in proxy.log, "where it hangs"
        asked.cancel()
    manager.close()


HANGING = """
import time
from pathlib import Path
from llama_smart_proxy import Agent

class Hanging(Agent):
    '''Blocks the event loop until a file is removed.'''
    command = "hanging"
    async def on_request(self, ctx, request):
        file = Path(__file__).with_name("hangs")
        file.touch()
        while file.exists():
            time.sleep(0.01)
"""


INHERIT = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@asynccontextmanager
async def inheriting(sock: socket.socket, config: dict[str, object]) -> AsyncIterator[Proxy]:
    """A proxy that systemd would have started with this socket."""
    within = [sys.executable, "-c", INHERIT, str(sock.fileno())]
    async with running_proxy(config, within=within, keep_fds=[sock.fileno()]) as proxy:
        yield proxy


async def test_no_connection_is_refused_while_a_service_with_its_sockets_is_restarted(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model()})
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        port = sock.getsockname()[1]
        answers: list[int] = []
        done = asyncio.Event()

        async def keep_asking() -> None:
            while not done.is_set():
                answers.append((await raw_client.get(port, "/v1/models")).status)

        async def answered() -> None:
            before = len(answers)
            await until(lambda: len(answers) > before + 20 or any(client.done() for client in asking))

        async with AsyncExitStack() as clients:
            asking = [asyncio.ensure_future(keep_asking()) for _ in range(4)]
            clients.callback(lambda: [client.cancel() for client in asking])
            for _ in range(3):
                async with inheriting(sock, config) as proxy:
                    assert proxy.port == port, "in place of the configured one"
                    await answered()
                    proxy.send(signal.SIGTERM)
                    assert await proxy.ended() == 0
            async with inheriting(sock, config):
                await answered()
                done.set()
                await asyncio.gather(*asking)
        assert set(answers) == {200}


async def test_a_socket_of_another_kind_is_an_error_that_names_the_setting(tmp_path: Path, fakes: Fakes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        with pytest.raises(AssertionError, match="ListenStream= requires a port"):
            async with inheriting(sock, fakes.config({})):
                raise RuntimeError("it must not start")


async def test_sockets_and_a_watchdog_for_another_process_are_not_used(fakes: Fakes, tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "LISTEN_FDS": "1", "LISTEN_PID": "1", "WATCHDOG_USEC": "100000"}
    async with running_proxy(fakes.config({}), env=env | {"WATCHDOG_PID": "1"}) as proxy:
        await until(lambda: manager.received("READY=1"), what="the readiness")
        assert (await proxy.health())["status"] == "healthy"
        await asyncio.sleep(0.3)  # three times the limit
        assert not manager.received("WATCHDOG=1")
    manager.close()
