"""What a proxy keeps over a restart, and how it serves where nothing can be kept."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.support.agent_clients import Way, proxy_with_agents
from tests.support.e2e_support import CHAT, Fakes, fakes
from tests.support.harness import running_proxy, until

__all__ = ["fakes"]
COUNTS = """
class Counts(Agent):
    command = "counts"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        number = await ctx.store.get("n", 0) + 1
        await ctx.store.set("n", number)
        return say(f"{number} {await ctx.store.keys()}")
"""
WAY = Way(CHAT, stream=False)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("where", ["state_dir", "STATE_DIRECTORY", "XDG_STATE_HOME"])
async def test_what_an_agent_stores_is_there_after_a_restart(fakes: Fakes, where: str) -> None:
    async with proxy_with_agents(fakes, {"counts": COUNTS}):
        pass  # its files are written
    config = fakes.config({"m": fakes.model()}) | {"agents_dirs": [str(fakes.folder / "agents")]}
    home = fakes.folder / "home"
    env = {} if where == "state_dir" else {where: str(home)}
    config |= {"state_dir": str(home)} if where == "state_dir" else {}
    for number in (1, 2):
        async with running_proxy(config, env=env) as proxy:
            assert (await WAY.ask(proxy, WAY.body("/counts"))).text == f"{number} ['n']"
    folder = home / "llama-smart-proxy" if where == "XDG_STATE_HOME" else home
    assert (mode(folder), mode(folder / "state.db")) == (0o700, 0o600)


async def test_without_a_folder_for_the_state_the_proxy_serves_and_the_log_says_so_once(fakes: Fakes) -> None:
    (fakes.folder / "file").touch()
    async with proxy_with_agents(fakes, {"counts": COUNTS}, state_dir=str(fakes.folder / "file" / "x")) as proxy:
        await until(lambda: "only in memory (setting state_dir)" in proxy.log, what="the line, before the first use")
        for number in (1, 2, 3):
            assert (await WAY.ask(proxy, WAY.body("/counts"))).text == f"{number} ['n']"
        assert proxy.log.count("state_dir") == 1
        assert (await WAY.ask(proxy, WAY.body("hi"))).error is None


async def test_a_proxy_that_stores_nothing_creates_nothing(fakes: Fakes) -> None:
    """Requests that use a model are counted; none comes here."""
    home = fakes.folder / "home"
    async with running_proxy(fakes.config({"m": fakes.model()}), env={"XDG_STATE_HOME": str(home)}) as proxy:
        assert (await proxy.health())["status"] == "healthy"
    assert not home.exists()
