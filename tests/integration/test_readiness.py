"""To whom the API key and the requests of a server go: to the process that was started, and to no other."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.backends.http.connection import Endpoint
from llama_smart_proxy.backends.pool.launcher import Command, HttpLauncher, PoolModel
from llama_smart_proxy.backends.pool.ports import listens
from llama_smart_proxy.proxy.errors import StartFailed, UpstreamFailed
from tests.support.harness import free_port, until
from tests.support.pools import Fakes, chat, leased, open_pool

OLD_WRONG_KEY = "Bearer a-wrong-key"


def refuses_the_first(keys: list[str]) -> bool:
    return len(set(keys)) <= 1


def refuses_one(keys: list[str]) -> bool:
    return keys[-1] == OLD_WRONG_KEY


Refuses = Callable[[list[str]], bool]


@asynccontextmanager
async def squatter(port: int, refuses: Refuses) -> AsyncIterator[list[str]]:
    """A process of somebody else that plays a llama-server, and decides by the keys it has seen whether it refuses the
    last one. Yields those keys."""
    keys: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return writer.close()
        found = re.search(r"^Authorization: (.+)\r$", head, re.MULTILINE)
        keys.extend([found[1]] if found else [])
        status = "401 No" if "/health" not in head and refuses(keys) else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield keys
    finally:
        server.close()


@pytest.mark.parametrize("refuses", [refuses_the_first, refuses_one])
async def test_a_process_that_takes_the_port_first_gets_no_key_at_all(fakes: Fakes, refuses: Refuses) -> None:
    """The child lives, and does not listen; the system shows who does."""
    port = free_port()
    async with open_pool(fakes.config(port_start=port, port_end=port)) as pool:
        model = fakes.model(fake={"NEVER": "nobind"})
        loading = asyncio.ensure_future(pool.load(model.at("m")))
        await until(lambda: fakes.events("start"), what="the child")
        async with squatter(port, refuses) as keys:
            with pytest.raises(StartFailed, match=r"another process listens|No port"):
                await loading
            assert keys == []


class Elsewhere(HttpLauncher):
    """Its server is started elsewhere, so that the system does not show whose it is."""

    keyed_path = "/props"

    def __init__(self, port: int) -> None:
        self.port = port
        self.key = ""

    def command(self, listen: Endpoint, key: str) -> Command:
        self.key = key
        return Command(["sleep", "600"], {**os.environ}, Endpoint("127.0.0.1", self.port), listens=False)


async def test_where_the_system_does_not_tell_the_wrong_key_is_one_that_is_not_known(fakes: Fakes) -> None:
    launcher = Elsewhere(free_port())
    async with squatter(launcher.port, refuses_one) as keys, open_pool(fakes.config()) as pool:
        with pytest.raises(StartFailed, match="takes any key"):
            await pool.load(PoolModel("m", launcher))
        assert keys and f"Bearer {launcher.key}" not in keys
        assert {len(key) for key in keys} == {len(f"Bearer {launcher.key}")} and len(set(keys)) == 3


async def test_a_process_that_takes_the_port_of_a_dead_server_gets_nothing(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool, leased(pool, "m", fakes.model()) as instance:
        child = instance._child
        assert child is not None
        child._loop.remove_reader(child._pidfd)  # its end is not noticed yet
        instance.connections._drop_idle()
        os.kill(instance.pid, signal.SIGKILL)
        await until(lambda: not child.alive, what="its end")
        with socket.create_server(("127.0.0.1", instance.port)) as thief:
            with pytest.raises(UpstreamFailed, match="has ended"):
                await chat(instance)
            thief.setblocking(False)
            loop = asyncio.get_running_loop()
            connection, _ = await loop.sock_accept(thief)
            with connection:
                assert await loop.sock_recv(connection, 1000) == b""
        child._loop.add_reader(child._pidfd, child._exited)


async def test_a_connection_made_while_the_server_is_stopped_is_not_used(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool, leased(pool, "m", fakes.model()) as instance:
        instance.connections._drop_idle()
        answer = asyncio.ensure_future(chat(instance))
        for _ in range(100):
            if not instance.connections._connecting:
                await asyncio.sleep(0)
        assert instance.connections._connecting
        instance.connections.close("it has ended")
        with pytest.raises(UpstreamFailed):
            await answer
        assert fakes.events("request", "/v1/chat/completions") == []


async def test_who_listens_is_told_by_process_address_and_port(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool, leased(pool, "m", fakes.model()) as instance:
        assert listens(instance.pid, "127.0.0.1", instance.port) is True
        assert listens(os.getpid(), "127.0.0.1", instance.port) is True  # it is our child
        assert listens(instance.pid, "127.0.0.2", instance.port) is False
        assert listens(instance.pid, "127.0.0.1", free_port()) is False
        with socket.create_server(("127.0.0.1", 0)) as ours:
            assert listens(instance.pid, "127.0.0.1", ours.getsockname()[1]) is False
