"""What hangs outside of the proxy, such as the DNS or a call of an agent, delays neither other servers nor its end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import toxic
from tests.support.e2e_support import body_of
from tests.support.harness import running_proxy, until
from tests.support.raw_client import Answer, post
from tests.support.speakers import SPEAKERS
from tests.support.toxic import raw_upstream

CHAT = "/v1/chat/completions"
NAMES = [f"gpu-box-{number}.example" for number in range(6)]
"""More than the four threads in which libuv looks up names."""
HASTY = "hasty.example"
GONE_S = 60.0
"""Half of what the look-ups and calls of these tests take."""


def _may_mount() -> bool:
    command = ["unshare", "-m", "mount", "--bind", os.devnull, "/etc/resolv.conf"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@dataclass
class SilentDns:
    """A DNS server that never answers, for the program that is appended to the command line `within`."""

    within: list[str]
    _socket: socket.socket
    _asked: bytes = b""

    def asked(self) -> bool:
        """Whether it was asked for all `NAMES`."""
        with suppress(BlockingIOError):
            while True:
                self._asked += self._socket.recv(4096)
        return all(name.partition(".")[0].encode() in self._asked for name in NAMES)


@pytest.fixture
def dns(tmp_path: Path) -> Iterator[SilentDns]:
    if not _may_mount():
        pytest.skip("needs `unshare` and the right to mount")
    address = f"127.9.{os.getpid() % 250}.{os.getpid() // 250 % 250 + 1}"
    file = tmp_path / "resolv.conf"
    file.write_text(f"nameserver {address}\noptions timeout:30 attempts:5\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        server.setblocking(False)
        yield SilentDns(
            ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(file)], server
        )


@asynccontextmanager
async def asking(port: int, models: Sequence[str]) -> AsyncIterator[Sequence[asyncio.Future[Answer]]]:
    """Chats with these models, all under way."""
    asked = [asyncio.ensure_future(post(port, CHAT, body_of(model))) for model in models]
    try:
        yield asked
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def remotes(port: int) -> dict[str, Any]:
    """Those of `NAMES`, each with a model of its name, one that lists its models, one with little time to connect, and
    a local one with the model `m`."""
    named = {name: {"url": f"http://{name}:1", "models": [name], "connect_timeout_s": 300} for name in NAMES}
    hasty = {"url": f"http://{HASTY}:1", "models": ["hasty"], "connect_timeout_s": 0.2}
    near = {"url": f"http://localhost:{port}", "models": ["m"]}
    return {"remotes": {**named, "listed": {"url": "http://listed.example:1"}, "hasty": hasty, "near": near}}


async def test_names_that_are_never_resolved_delay_neither_other_servers_nor_the_end(dns: SilentDns) -> None:
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        config = {"server": {"drain_s": 0}, **remotes(upstream.port)}
        async with running_proxy(config, within=dns.within) as proxy, asking(proxy.port, NAMES) as asked:
            await until(dns.asked, what="the look-ups")
            assert (await post(proxy.port, CHAT, body_of("m"))).status == 200
            for speaker in SPEAKERS.values():
                answer = await post(proxy.port, speaker.path, speaker.body("hasty", stream=False))
                assert answer.status == 504, answer.body
                assert f"no answer of the DNS about the name of http://{HASTY}:1" in speaker.failed(answer.json())
            assert not any(task.done() for task in asked)
            for task in asked:
                task.cancel()
            proxy.send(signal.SIGTERM)
            assert await proxy.ended(GONE_S) == 0


@pytest.fixture
def agent(tmp_path: Path) -> dict[str, Any]:
    """The configuration of an agent that leaves threads of all kinds running."""
    (tmp_path / "slow.py").write_text(
        "import asyncio, concurrent.futures, threading, time\n"
        "from llama_smart_proxy import Agent\n"
        "POOL = concurrent.futures.ThreadPoolExecutor()\n"
        "class Slow(Agent):\n"
        "    async def on_request(self, request, ctx):\n"
        "        POOL.submit(time.sleep, 120)\n"
        "        threading.Thread(target=time.sleep, args=[120]).start()\n"
        "        asyncio.get_running_loop().run_in_executor(None, time.sleep, 120)\n"
    )
    return {"agents_dirs": [str(tmp_path)], "agents": ["slow"]}


async def test_threads_of_an_agent_do_not_delay_the_end(agent: dict[str, Any]) -> None:
    async with raw_upstream(toxic.plain(b"{}")) as upstream, running_proxy(agent | remotes(upstream.port)) as proxy:
        assert (await post(proxy.port, CHAT, body_of("m"))).status == 200
        proxy.send(signal.SIGTERM)
        assert await proxy.ended(GONE_S) == 0
