"""The agent `help`: tells every command, in the caller's API, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, write_agent
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, running_proxy, session_proxy

PARROT = '''
from pydantic import Field

class Parrot(Agent):
    """Says it again.

    How that is done concerns nobody.
    """
    command = "parrot"
    per_call = frozenset({"times", "voice"})
    class Config(Options):
        times: int = Field(default=2, description="How often.")
        voice: str = Field(default="", description="Whose voice.")
        feathers: str = Field(default="", description="Not to be told.")
'''
QUIET = '''
class Quiet(Agent):
    """Does its work unseen, in `<think>` tags."""
'''
ELSEWHERE = '''
class Elsewhere(Agent):
    """Is of one model only."""
'''
WAY = Way(CHAT, stream=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    return Fakes(tmp_path_factory.mktemp("help"))


@pytest.fixture(scope="module")
def proxy(folder: Fakes) -> Iterator[Proxy]:
    agents = folder.folder / "agents"
    for name, source in {"parrot": PARROT, "quiet": QUIET, "elsewhere": ELSEWHERE}.items():
        write_agent(agents, name, source)
    models: dict[str, Any] = {"m": folder.model(), "v": {"model": "m", "agents": ["parrot", "elsewhere"]}}
    config = folder.config(models, keep_alive=-1) | {"agents_dirs": [str(agents)]}
    with session_proxy(config | {"agents": ["parrot", "quiet", "example", "parallel"]}) as proxy:
        yield proxy


async def test_it_tells_every_command_and_its_options_in_every_api_and_starts_no_model(
    folder: Fakes, proxy: Proxy
) -> None:
    listed = (await raw_client.get(proxy.port, "/plugins")).json()
    commands = {item["command"] for item in listed if item["command"]}
    assert commands == {"/parrot", "/example", "/parallel", "/help"}
    told = set()
    for way in WAYS:
        said = await way.ask(proxy, way.body("/help"))
        assert (said.status, said.error) == (200, None) and said.finish in ("stop", "end_turn"), way
        told.add(said.text)
    assert len(told) == 1, "the same in every API"
    lines = told.pop().split("\n")
    for command in commands:
        assert any(line.startswith(f"- `{command}` ") for line in lines), command
    place = lines.index("- `/parrot` Says it again.")
    assert lines[place + 1 : place + 3] == ["    - `times=` How often.", "    - `voice=` Whose voice."]
    assert "- `/agents` Lists the agents that run in this chat." in lines
    assert "- quiet: Does its work unseen, in `[think]` tags." in lines, "no chat UI takes it for a thought"
    assert "- elsewhere: Is of one model only." not in lines
    assert not any("feathers" in line or "concerns nobody" in line for line in lines)
    assert folder.events("start") == [], "no model is asked"


async def test_it_tells_what_runs_in_the_chats_of_a_virtual_model(folder: Fakes, proxy: Proxy) -> None:
    for way in WAYS:
        lines = (await way.ask(proxy, way.body("/help", model="v"))).text.split("\n")
        assert "- `/parrot` Says it again. *(on in this chat)*" in lines, way
        assert "- elsewhere: Is of one model only." in lines, way
    assert folder.events("start") == []


async def test_it_tells_of_one_command(proxy: Proxy) -> None:
    whole = "- `/parrot` Says it again.\n    - `times=` How often.\n    - `voice=` Whose voice."
    assert (await WAY.ask(proxy, WAY.body("/help parrot"))).text == whole
    everything = (await WAY.ask(proxy, WAY.body("/help"))).text
    told = (await WAY.ask(proxy, WAY.body("/help me"))).text
    assert told == f"There is no command `/me`.\n\n{everything}" and everything != whole


async def test_what_it_shows_can_be_typed(proxy: Proxy) -> None:
    text = (await WAY.ask(proxy, WAY.body("/help"))).text
    shown = text.partition("For the whole chat: `")[2].partition("`")[0]
    assert shown.endswith(" on")
    name = shown.removesuffix(" on")
    assert (await WAY.ask(proxy, WAY.body(shown))).text.startswith(f"{name} is on in this chat.")


async def test_it_is_there_unasked_and_can_be_done_without(tmp_path_factory: pytest.TempPathFactory) -> None:
    fakes = Fakes(tmp_path_factory.mktemp("bare"))
    async with running_proxy(fakes.config({"m": fakes.model()}) | {"agents": []}) as proxy:
        text = (await WAY.ask(proxy, WAY.body("/help"))).text
        assert "- `/help` Lists the commands" in text and "No agent with a command is enabled." in text
        said = await WAY.ask(proxy, WAY.body("/help", agents=False))
        assert said.text.startswith("t0 ") and fakes.generated()[-1]["messages"][-1]["content"] == "/help"
