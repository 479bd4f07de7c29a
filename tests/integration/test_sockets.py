"""Servers on unix sockets (`llama_cpp.transport: unix`): the folder, the paths in it, and what is left of them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.llamacpp.launcher import pool_model
from llama_smart_proxy.backends.pool import sockets
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.sockets import PREFIX, SocketFolder, remove_stale
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import StartFailed
from tests.support.e2e_support import needs_llama_cpp
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import free_port, until
from tests.support.pools import Fakes, chat, open_pool

__all__ = ["tiny_models"]  # a fixture
PROPS = UpstreamRequest("GET", "/props", slot=False)
CHAT = UpstreamRequest("POST", "/v1/chat/completions")


@pytest.fixture(autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folders for sockets are."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def folder(base: Path) -> Iterator[SocketFolder]:
    """One that is there already: its lock is an open file."""
    folder = SocketFolder()
    folder.path()
    yield folder
    folder.close()
    assert list(base.iterdir()) == []


def by_socket(fakes: Fakes, folder: SocketFolder) -> PoolModel:
    model = fakes.model()
    return pool_model("m", model, model._program, sockets=folder)


async def test_a_server_on_a_socket_serves_and_leaves_nothing(fakes: Fakes, folder: SocketFolder) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):  # no port is required
        async with open_pool(fakes.config(port_start=port, port_end=port)) as pool:
            async with pool.lease(by_socket(fakes, folder), CHAT) as lease:
                at = lease.instance.connections.endpoint.socket
                owned = os.stat(os.path.dirname(at))
                assert (stat.S_IMODE(owned.st_mode), owned.st_uid) == (0o700, os.geteuid())
                assert b"t0" in await chat(lease.instance)
            assert pool.status()[0]["port"] is None
            os.kill(lease.instance.pid, signal.SIGKILL)
            await until(lambda: not os.path.exists(at), what="the removal of the socket")
            async with pool.lease(by_socket(fakes, folder), CHAT) as lease:
                assert b"t0" in await chat(lease.instance)


async def test_a_server_that_cannot_listen_on_a_socket_fails_and_says_so(fakes: Fakes, folder: SocketFolder) -> None:
    fakes.program.write_text('#!/bin/sh\necho "couldn\'t bind HTTP server socket, hostname: $8"\nexit 1\n')
    async with open_pool(fakes.config()) as pool:
        with pytest.raises(StartFailed, match=r"it was to listen on a unix socket\): couldn't bind"):
            await pool.load(by_socket(fakes, folder))


@needs_llama_cpp
async def test_llama_cpp_of_the_wheel_listens_on_a_socket(
    fakes: Fakes, tiny_models: dict[str, Path], folder: SocketFolder
) -> None:
    config = ModelConfig(path=tiny_models["tiny-a"], args=["-t", "1"], ctx=256)
    model = pool_model("m", config, "embedded", sockets=folder)
    async with open_pool(fakes.config()) as pool, pool.lease(model, CHAT) as lease:
        status, body = await lease.instance.connections.fetch(PROPS, timeout_s=20)
        assert status == 200 and b"total_slots" in body


def test_a_folder_whose_path_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    folder = SocketFolder()
    path = folder.path()
    assert not path.startswith(str(long)) and len(os.fsencode(path)) <= 107
    folder.close()
    monkeypatch.setattr(sockets, "LONGEST", 10)
    with pytest.raises(StartFailed, match=r"llama_cpp\.transport; TMPDIR.* is too long"):
        folder.path()


def test_only_folders_of_proxies_that_have_ended_are_removed(base: Path) -> None:
    code = (
        "import time; from llama_smart_proxy.backends.pool.sockets import SocketFolder\n"
        "folder = SocketFolder(); print(folder.path(), flush=True); time.sleep(600)"
    )
    alive = SocketFolder()
    kept = Path(alive.path()).parent
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip()).parent
        (theirs / "1.sock").touch()
        foreign = base / f"{PREFIX}mine"
        foreign.mkdir()  # without a lock it is none of ours
        remove_stale()
        assert theirs.is_dir() and kept.is_dir()
        other.kill()
        other.wait()
    remove_stale()
    assert not theirs.exists() and kept.is_dir() and foreign.is_dir()
    alive.close()


async def test_a_socket_whose_queue_is_full_is_waited_for(base: Path) -> None:
    """As of a server that is stopped: a TCP connection would wait, too."""
    path = str(base / "1.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(path)
            pool = ConnectionPool(Endpoint("localhost", 0, socket=path))
            accepted = asyncio.ensure_future(pool.accepts(20))
            await until(lambda: pool.waiting(asyncio.get_running_loop().time()), what="the wait")
            listener.accept()[0].close()
            assert await accepted
            pool.close("done")
