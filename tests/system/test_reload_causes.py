"""What has the configuration read again, in which order, and what of it a restart is required for."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

from llama_smart_proxy.proxy.store import FILE
from tests.support import raw_client
from tests.support.agent_clients import write_agent
from tests.support.e2e_support import CHAT, DONE, Fakes, Gate, body_of, fakes, gate, streaming
from tests.support.harness import Proxy, free_port, until
from tests.support.reloads import reloadable
from tests.support.terminal import Terminal, terminal
from tests.system.test_systemd import Manager

__all__ = ["fakes", "gate", "terminal"]  # fixtures
SLOW = '''
from pathlib import Path
STARTS = False

class Slow(Agent):
    """Hangs when it starts, once it has been changed, and when it is closed."""
    async def start(self) -> None:
        if STARTS:
            Path(__file__).with_suffix(".hangs").touch()
            await asyncio.Event().wait()

    async def close(self) -> None:
        await asyncio.Event().wait()
'''
EMPTY = {"llama_cpp": {"hf_cache": False}}


def remotes(*names: str) -> dict[str, dict[str, object]]:
    """Remotes that are asked nothing, each with a model of the same name."""
    return {name: {"url": f"http://127.0.0.1:{free_port()}", "models": [name]} for name in names}


async def has(proxy: Proxy, *names: str) -> bool:
    return [item["id"] for item in (await raw_client.get(proxy.port, "/v1/models")).json()["data"]] == [*names]


async def test_sighup_reloads(tmp_path: Path) -> None:
    async with reloadable(EMPTY, tmp_path / "own") as running:
        running.write(remotes=remotes("a"))
        running.proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: has(running.proxy, "a"))
        running.file.write_text("{")
        running.proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: "was not reloaded" in running.proxy.log)
        assert await has(running.proxy, "a")


async def test_sighup_reloads_also_in_a_terminal_until_that_is_closed(tmp_path: Path, terminal: Terminal) -> None:
    async with reloadable(EMPTY, tmp_path / "own", within=terminal.within) as running:
        for name in ("a", "b"):
            running.write(remotes=remotes(name))
            running.proxy.send(signal.SIGHUP)
            await until(partial(has, running.proxy, name))
        terminal.close()
        assert await running.proxy.ended() == 0
        assert running.proxy.log.count("was reloaded") == 2 and "SIGHUP: draining" in running.proxy.log


async def test_a_changed_file_is_read_with_reload_also_a_module(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def extend(registry): pass")
    config = {**EMPTY, "modules": [str(module)], "remotes": remotes("a")}
    async with reloadable(config, tmp_path / "own", args=["--reload"]) as running:
        proxy = running.proxy
        running.write(remotes=remotes("b"))
        await until(lambda: has(proxy, "b"))
        running.file.write_text(json.dumps({**running.config, "remotes": remotes("c")}))  # in place
        await until(lambda: has(proxy, "c"))
        running.file.write_text("{")
        await until(lambda: "was not reloaded" in proxy.log)
        module.write_text("def extend(registry): print('extended')")
        running.write(remotes=remotes("d"))
        await until(lambda: has(proxy, "d"))


async def test_reloads_that_are_asked_for_at_one_time_end_with_the_last_file(fakes: Fakes, tmp_path: Path) -> None:
    async with reloadable(EMPTY, tmp_path / "own") as running:
        proxy = running.proxy
        asked = []
        for number in range(10):
            running.write(remotes=remotes(f"r{number}"))
            asked.append(asyncio.ensure_future(running.reload()))
            proxy.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0)
        await asyncio.gather(*asked)
        await until(lambda: has(proxy, "r9"))
        assert proxy.log.count("was reloaded") <= 20


async def test_the_command_line_and_the_environment_still_apply(tmp_path: Path) -> None:
    env = {"LSP_REMOTES": json.dumps(remotes("e"))}
    async with reloadable(EMPTY, tmp_path / "own", env=env, args=["--log-level", "debug"]) as running:
        found = await running.apply(remotes=remotes("f"), log_level="error", slash_commands=False)
        assert await has(running.proxy, "e") and found["requires_restart"] == []


async def test_what_requires_a_restart_is_named_and_the_rest_applies(tmp_path: Path) -> None:
    async with reloadable(EMPTY, tmp_path / "own") as running:
        state, port = str(tmp_path / "state"), free_port()
        for _ in range(2):  # also when it has not changed since the last time
            found = await running.apply(state_dir=state, server={"port": port}, remotes=remotes("a"))
            assert found["requires_restart"] == ["server.port", "state_dir"] and await has(running.proxy, "a")
        await until(lambda: running.proxy.log.count("requires a restart: server.port, state_dir") == 2)
        assert (await running.apply())["requires_restart"] == []


async def test_the_level_of_the_log_applies_at_once(tmp_path: Path) -> None:
    async with reloadable(EMPTY, tmp_path / "own") as running:
        await running.apply(log_level="warning")
        assert await has(running.proxy)
        await running.apply()
        assert (await raw_client.get(running.proxy.port, "/health")).status == 200
        await until(lambda: "GET /health" in running.proxy.log)
        assert "GET /v1/models" not in running.proxy.log


async def test_a_key_that_is_removed_is_unknown_at_once_and_origins_follow(tmp_path: Path) -> None:
    keys = [{"name": name, "key": name * 32, "scopes": ["admin"]} for name in "ab"]
    async with reloadable({**EMPTY, "server": {"api_keys": keys}}, tmp_path / "own") as running:
        page = [("Origin", "https://chat.example")]

        async def status(key: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> int:
            named = [("Authorization", f"Bearer {key * 32}"), *headers]
            return (await raw_client.post(running.proxy.port, path, b"{}", headers=named)).status

        assert [await status(key, "/v1/embeddings") for key in "ab"] == [400, 400]
        server = {**running.config["server"], "api_keys": keys[:1]}
        running.write(server={**server, "allow_origins": ["https://chat.example"]})
        assert await status("a", "/admin/reload") == 200
        assert [await status(key, "/v1/embeddings") for key in "ab"] == [400, 401]
        assert await status("a", "/v1/embeddings", page) == 400
        running.write(server=server)
        assert await status("a", "/admin/reload") == 200
        assert await status("a", "/v1/embeddings", page) == 403


async def test_a_proxy_that_drains_reads_nothing_again(fakes: Fakes, gate: Gate, tmp_path: Path) -> None:
    config = {**fakes.config({"m": fakes.model()}), "server": {"drain_s": 120}}
    async with reloadable(config, tmp_path / "own") as running:
        proxy = running.proxy
        async with streaming(proxy, "m", fake={"last_at": str(gate)}) as stream:
            await stream.until_text()
            running.write(models={})
            proxy.send(signal.SIGTERM)
            await until(lambda: "draining" in proxy.log)
            proxy.process.send_signal(signal.SIGHUP)
            gate.open()
            assert (await stream.rest())[-1] == DONE
        assert await proxy.ended() == 0
        assert "was reloaded" not in proxy.log


async def test_a_second_signal_stops_a_reload_whose_agents_hang_and_usage_is_kept(fakes: Fakes, tmp_path: Path) -> None:
    file = write_agent(tmp_path / "agents", "slow", SLOW)
    agents = {"agents_dirs": [str(file.parent)], "agents": ["slow"], "state_dir": str(tmp_path / "state")}
    async with reloadable(fakes.config({"m": fakes.model()}) | agents, tmp_path / "own") as running:
        proxy = running.proxy
        await raw_client.get(proxy.port, "/admin/usage")  # the store is open
        file.write_text(file.read_text().replace("STARTS = False", "STARTS = True"))
        proxy.process.send_signal(signal.SIGHUP)
        await until(file.with_suffix(".hangs").exists)
        assert (await raw_client.post(proxy.port, CHAT, body_of("m"))).status == 200
        proxy.send(signal.SIGTERM)
        await until(lambda: "draining" in proxy.log)
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0
    with closing(sqlite3.connect(tmp_path / "state" / FILE)) as sql:
        assert sql.execute("SELECT requests FROM usage").fetchall() == [(1,)]


async def test_a_model_that_is_newly_marked_preload_begins_to_load(fakes: Fakes, tmp_path: Path) -> None:
    models = {name: fakes.model(fields={"keep_alive": 0}) for name in ("a", "b")}
    async with reloadable(fakes.config(models), tmp_path / "own") as running:
        marked = fakes.model(fields={"preload": True})
        await running.apply(models={"a": models["a"], "b": marked})
        await until(lambda: _ready(running.proxy, "b"))
        await running.apply(models={"a": models["a"], "b": fakes.model(fields={"preload": True, "args": ["--new"]})})
        await until(lambda: any("--new" in event["argv"] for event in fakes.events("start")))
        await until(lambda: _ready(running.proxy, "b"))
        assert all("a" not in event["argv"] for event in fakes.events("start"))


async def _ready(proxy: Proxy, model: str) -> bool:
    return any(entry["model"] == model and entry["state"] == "ready" for entry in (await proxy.health())["instances"])


async def test_systemd_gets_reloading_and_then_ready_and_the_problem_as_status(tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    async with reloadable(EMPTY, tmp_path / "own", env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as running:
        await running.apply(remotes=remotes("a"))
        await until(lambda: manager.received("READY=1") == 2)
        named = [line.partition("=")[0] for line in manager.lines]
        assert named == ["READY", "RELOADING", "MONOTONIC_USEC", "READY"]
        running.file.write_text("{")
        (problem,) = await running.refused()
        await until(lambda: manager.received("READY=1") == 3)
        status = f"STATUS=configuration not reloaded: {running.file.parent}/{problem}"
        await until(lambda: manager.received(status) == 1)
        await running.apply()
        await until(lambda: manager.received("STATUS=") == 1 and manager.received("READY=1") == 4)
    manager.close()
