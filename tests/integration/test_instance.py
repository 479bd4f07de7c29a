"""One instance through its life: becoming ready, failing to, and being stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.backends.pool.ports import Ports, is_free
from llama_smart_proxy.backends.pool.spawn import Child
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import StartFailed, UpstreamFailed
from tests.support.harness import free_port, until
from tests.support.pools import FakeModel, Fakes, chat, children, open_fds, own_tasks, warm_up

SOON_S = 60.0
STOP_S = 120.0
"""A quarter of it passes before the second SIGTERM: what has stopped within `SOON_S` did so at the first one."""


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Instance]]:
    """Makes instances; after the test they are stopped and must have left nothing."""
    await warm_up()
    tasks, fds = own_tasks(), open_fds()
    made: list[Instance] = []

    def make(model: FakeModel, config: Config, changes: list[State] | None = None) -> Instance:
        seen: list[State] = [] if changes is None else changes
        pool = config.server_pool
        ports = Ports(pool.host, pool.ports)
        instance = Instance(model.at("m"), pool, ports, lambda instance: seen.append(instance.state))
        made.append(instance)
        instance.start("a test")
        return instance

    yield make
    for instance in made:
        instance.stop("the test is over")
        await instance.wait_stopped()
        assert is_free("127.0.0.1", instance.port or free_port())
    assert not children()
    await until(lambda: own_tasks() <= tasks and open_fds() <= fds, what="the end of all tasks and files")


Start = Callable[..., Instance]


async def ready(instance: Instance) -> Instance:
    await until(lambda: instance.state is not State.STARTING, what="the end of the start")
    assert instance.error is None
    assert instance.state is State.READY
    return instance


async def failed(instance: Instance) -> StartFailed:
    await until(lambda: instance.error is not None, what="a failure")
    assert instance.error is not None
    return instance.error


async def test_a_ready_instance_answers_and_stops_quietly(fakes: Fakes, start: Start) -> None:
    changes: list[State] = []
    instance = await ready(start(fakes.model(parallel=3), fakes.config(stop_timeout_s=STOP_S), changes))
    assert instance.slots == 3
    assert instance.load_s is not None and instance.load_s > 0
    assert b"t0 t1 " in await chat(instance, tokens=2)
    instance.stop("done")
    assert instance.state is State.STOPPING
    assert await instance.wait_stopped(SOON_S)
    assert changes == [State.READY, State.STOPPED]
    assert [event["ignored"] for event in fakes.events("stop")] == [False]


async def test_readiness_is_noticed_soon_after_it_is_there(fakes: Fakes, start: Start) -> None:
    late = []  # as a share of the start
    for _ in range(5):
        instance = await ready(start(fakes.model(fake={"LOAD_S": 0.1}), fakes.config()))
        assert instance.load_s is not None
        late.append((time.monotonic() - fakes.events("loaded")[-1]["time"]) / instance.load_s)
        instance.stop("next")
        await instance.wait_stopped()
    assert min(late) < 0.5  # one of them is not disturbed by what else the machine does; it is a twentieth


async def test_keys_are_in_no_argument_log_or_message(fakes: Fakes, start: Start) -> None:
    model = fakes.model(fake={"EXIT": "3"})
    model.env["HF_TOKEN"] = "hf_sesame"
    model.args = ["--note", "hf_sesame"]
    instance = start(model, fakes.config())
    error = await failed(instance)
    [event] = fakes.events("start")
    assert instance._key not in " ".join(event["argv"])
    instance.log.feed(f"my key is {instance._key}, and hf_sesame\n".encode())
    assert instance.log_tail(1) == ["my key is ***, and ***"]
    assert instance._key not in error.message


@pytest.mark.parametrize(
    ("how", "told"),
    [("1", "exited with code 1;"), ("132", "code 132 (SIGILL)"), ("SIGSEGV", "by SIGSEGV"), ("2@loaded", "code 2")],
)
async def test_an_exit_while_loading_is_told_at_once(fakes: Fakes, start: Start, how: str, told: str) -> None:
    changes: list[State] = []
    instance = start(fakes.model(fake={"EXIT": how}), fakes.config(), changes)
    error = await failed(instance)
    assert error.status == 503 and error.code == "model_load_failed"
    assert told in error.message
    assert "fake: about to end by" in error.log[-1] and "about to end" not in error.message
    assert await instance.wait_stopped(SOON_S)
    assert changes == [State.STOPPING, State.STOPPED]


async def test_a_server_that_stops_listening_before_it_ends_is_not_taken_for_another_process(
    fakes: Fakes, start: Start
) -> None:
    code = (
        "import socket, sys, time; words = sys.argv; port = int(words[words.index('--port') + 1]); "
        "listener = socket.create_server(('127.0.0.1', port)); listener.accept(); listener.close(); "
        "time.sleep(0.5); sys.exit(3)"
    )
    fakes.program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S -c "{code}" "$@"\n')
    error = await failed(start(fakes.model(), fakes.config()))
    assert error.code == "model_load_failed" and "exited with code 3" in error.message


async def test_a_corrupt_model_file_is_told_without_a_process(fakes: Fakes, start: Start) -> None:
    fakes.gguf.write_bytes(b"GGML")
    error = await failed(start(fakes.model(), fakes.config()))
    assert "not a GGUF file" in error.message
    assert fakes.spawns == 0


async def test_a_missing_server_program_is_told(fakes: Fakes, start: Start) -> None:
    fakes.program.unlink()
    assert "no such program" in (await failed(start(fakes.model(), fakes.config()))).message


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """A control group with a memory limit; writing a pid into the yielded file moves that process there."""
    first = Path("/sys/fs/cgroup/memory")
    root = first if first.is_dir() else Path("/sys/fs/cgroup")
    group, limit = root / f"llama-smart-proxy-{os.getpid()}", "memory.limit_in_bytes"
    try:
        group.mkdir()
        (group / (limit if root == first else "memory.max")).write_text(str(limit_bytes))
    except OSError as exc:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory control group can be made here: {exc.strerror}")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


async def test_a_server_killed_for_lack_of_memory_is_told_as_such(fakes: Fakes, start: Start) -> None:
    with memory_cgroup(24 * 2**20) as group:
        fakes.program.write_text(f"#!/bin/sh\necho $$ > {group}\nexec tail /dev/zero\n")  # holds all it has read
        error = await failed(start(fakes.model(), fakes.config()))
        assert "was killed by SIGKILL (out of memory?)" in error.message
        await until(lambda: not group.read_text(), what="an empty control group")


@pytest.mark.parametrize("manner", ["nobind", "mute", "503"])
async def test_a_server_that_never_gets_ready_fails_at_the_load_timeout(
    fakes: Fakes, start: Start, manner: str
) -> None:
    begun = time.monotonic()
    instance = start(fakes.model(fake={"NEVER": manner}), fakes.config(load_timeout_s=1.0))
    error = await failed(instance)
    assert error.status == 504 and error.code == "model_load_timeout"
    assert time.monotonic() - begun > 0.9
    assert await instance.wait_stopped(SOON_S)


async def test_output_of_a_loading_server_starts_the_count_anew(fakes: Fakes, start: Start) -> None:
    model = fakes.model(fake={"LOAD_S": 5.5, "LOG_LOAD": 1})  # the limit leaves time to start Python on a busy machine
    await ready(start(model, fakes.config(load_timeout_s=5.0)))


@asynccontextmanager
async def foreign_server(port: int, answers: dict[bytes, bytes]) -> AsyncIterator[list[bytes]]:
    """A server of somebody else: answers each path as told, 200 to any other. Yields the heads it received."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        received.append(head)
        status = answers.get(head.split(b" ")[1], b"200 OK")
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % status)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield received
    finally:
        server.close()


async def test_ports_that_others_hold_are_passed_over(fakes: Fakes, start: Start) -> None:
    first = free_port()
    async with foreign_server(first, {}) as received:
        instance = await ready(start(fakes.model(), fakes.config(port_start=first, port_end=first + 50)))
        assert instance.port > first
        assert received == []


async def test_no_free_port_fails_at_once(fakes: Fakes, start: Start) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        error = await failed(start(fakes.model(), fakes.config(port_start=port, port_end=port, load_timeout_s=120)))
        assert error.code == "no_free_port" and error.status == 503
        assert fakes.spawns == 0


class Grabber(Ports):
    """Lets a foreign server take each port in the moment after it was found free; the TOCTOU race, always lost."""

    def __init__(self, ports: range, times: int) -> None:
        super().__init__("127.0.0.1", ports)
        self.times = times
        self.grabbed: list[socket.socket] = []

    def reserve(self) -> int:
        port = super().reserve()
        if self.times:
            self.times -= 1
            self.grabbed.append(socket.create_server(("127.0.0.1", port)))
        return port

    def close(self) -> None:
        for sock in self.grabbed:
            sock.close()


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.full)])
async def test_a_port_lost_after_the_probe_is_replaced(fakes: Fakes, rounds: int) -> None:
    config = fakes.config()
    for _ in range(rounds):
        ports = Grabber(config.server_pool.ports, times=2)
        before = fakes.spawns
        instance = Instance(fakes.model().at("m"), config.server_pool, ports, lambda instance: None)
        instance.start("a test")
        await ready(instance)
        assert fakes.spawns - before <= 3
        instance.stop("next")
        await instance.wait_stopped()
        ports.close()


async def test_losing_every_port_is_a_failure(fakes: Fakes) -> None:
    ports = Grabber(fakes.config().server_pool.ports, times=9)
    instance = Instance(fakes.model().at("m"), fakes.config().server_pool, ports, lambda instance: None)
    instance.start("a test")
    message = (await failed(instance)).message
    assert "3 ports" in message and "llama_cpp.allow_unauthenticated: true" in message
    await instance.wait_stopped()
    assert len(ports.grabbed) == 3
    ports.close()


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param({}, id="200-to-anything"),
        pytest.param({b"/props": b"401 Unauthorized"}, id="another-llama-server"),
        pytest.param({b"/props": b"404 Not Found"}, id="no-llama-server"),
    ],
)
async def test_a_foreign_server_is_never_taken_for_ours(
    fakes: Fakes, start: Start, answers: dict[bytes, bytes]
) -> None:
    port = free_port()
    config = fakes.config(port_start=port, port_end=port)
    instance = start(fakes.model(fake={"NEVER": "nobind"}), config)
    await until(lambda: instance.pid, what="the child")
    async with foreign_server(port, answers) as received:
        error = await failed(instance)
        assert error.code in ("no_free_port", "model_load_failed")
        assert {head.split(b" ")[1] for head in received} <= {b"/health", b"/props"}
        shown = [head for head in received if instance._key.encode() in head]
        assert not shown or b"401" in answers.get(b"/props", b"")


async def test_a_crash_is_noticed_when_it_happens(fakes: Fakes, start: Start) -> None:
    changes: list[State] = []
    instance = await ready(start(fakes.model(), fakes.config(), changes))
    answer = asyncio.ensure_future(chat(instance, tokens=1000, token_ms=10))
    await until(lambda: fakes.events("request", "/v1/chat/completions"), what="the request")
    os.kill(instance.pid, signal.SIGSEGV)
    await until(lambda: instance.error is not None, what="the crash")
    assert changes == [State.READY, State.STOPPED]
    assert instance.error is not None and "killed by SIGSEGV" in instance.error.message
    with pytest.raises(UpstreamFailed):
        await answer
    with pytest.raises(UpstreamFailed):
        await instance.connections.fetch(UpstreamRequest("GET", "/props"), timeout_s=1)


async def test_stopping_cuts_streams_and_needs_no_kill(fakes: Fakes, start: Start) -> None:
    instance = await ready(start(fakes.model(), fakes.config(stop_timeout_s=STOP_S)))
    answer = asyncio.ensure_future(chat(instance, tokens=12_000, token_ms=10))
    await until(lambda: fakes.events("request", "/v1/chat/completions"), what="the request")
    instance.stop("enough")
    with pytest.raises(UpstreamFailed):
        await answer
    assert await instance.wait_stopped(SOON_S)
    assert len(fakes.events("stop")) == 1  # it ends at the first SIGTERM once nobody has a stream any more


async def test_a_server_that_ignores_term_is_killed(
    fakes: Fakes, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[signal.Signals] = []

    def signal_group(child: Child, number: signal.Signals) -> None:
        sent.append(number)
        os.killpg(child.pid, number)

    model = fakes.model(fake={"IGNORE_TERM": 1, "FORK": 1})
    instance = await ready(start(model, fakes.config(stop_timeout_s=0.8)))
    monkeypatch.setattr(Child, "_signal", signal_group)
    begun = time.monotonic()
    instance.stop("enough")
    assert await instance.wait_stopped(SOON_S)
    assert time.monotonic() - begun > 0.7
    assert sent[:3] == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
    grandchild = fakes.events("fork")[0]["pid"]
    await until(lambda: not psutil.pid_exists(grandchild) or _is_zombie(grandchild), what="the grandchild's end")


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("fake", [{}, {"LOAD_S": 60}, {"NEVER": "nobind", "IGNORE_TERM": 1}])
async def test_a_start_can_be_broken_off_at_any_time(fakes: Fakes, start: Start, fake: dict[str, Any]) -> None:
    for waits in range(12):
        instance = start(fakes.model(fake=fake), fakes.config())
        for _ in range(waits * waits):
            await asyncio.sleep(0)
        instance.stop("changed my mind")
        instance.stop("really")
        assert await instance.wait_stopped(SOON_S)
        assert instance.error is None


@contextmanager
def freezer() -> Iterator[Path]:
    """A control group that freezes processes, which then cannot even be killed. Yields its folder."""
    group = Path(f"/sys/fs/cgroup/freezer/llama-smart-proxy-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group of version 1 can be made here: {exc.strerror}")
    try:
        yield group
    finally:
        (group / "freezer.state").write_text("THAWED")
        group.rmdir()


async def test_a_process_that_cannot_be_ended_gives_up_its_place_but_not_its_port(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llama_smart_proxy.backends.pool.ending.LOST_S", 0.3)
    config = fakes.config(stop_timeout_s=0.2)
    ports = Ports("127.0.0.1", config.server_pool.ports)
    instance = Instance(fakes.model().at("m"), config.server_pool, ports, lambda instance: None)
    instance.start("a test")
    await ready(instance)
    with freezer() as group:
        (group / "cgroup.procs").write_text(str(instance.pid))
        (group / "freezer.state").write_text("FROZEN")
        port = instance.port
        instance.stop("enough")
        assert await instance.wait_stopped(SOON_S)
        assert instance.state is State.STOPPED and port in ports._taken
        assert f"process {instance.pid} does not end" in caplog.text
        (group / "freezer.state").write_text("THAWED")
        await until(lambda: port not in ports._taken, what="its end")
    assert not children()
