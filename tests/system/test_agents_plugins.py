"""Where agents come from, what is wrong with those that cannot be used, and what /plugins tells of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.agents.loader import discover
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from tests.support import raw_client
from tests.support.agent_clients import Way, proxy_with_agents, write_agent
from tests.support.config_files import load
from tests.support.e2e_support import CHAT, Fakes, fakes
from tests.support.harness import ROOT, Proxy, environment, running_proxy, until

__all__ = ["fakes"]
SAYS = '''
class Says(Agent):
    """Answers {text}.

    This paragraph is for readers of the code.
    """
    command = {command!r}
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return say({text!r})
'''
SLOW = '''
class Slow(Agent):
    """Waits for a file, then answers."""
    command = "slow"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        from pathlib import Path
        Path(FOLDER, "begun").touch()
        while not Path(FOLDER, "go").exists():
            await asyncio.sleep(0.005)
        return say(WORDS)
    async def close(self) -> None:
        from pathlib import Path
        Path(FOLDER, "closed").touch()
'''
WAY = Way(CHAT, stream=False)


def says(text: str, command: str = "hey") -> str:
    return SAYS.format(text=text, command=command)


async def asked(proxy: Proxy, text: str = "/hey you") -> str:
    said = await WAY.ask(proxy, WAY.body(text))
    return said.error or said.text


async def listed(proxy: Proxy) -> dict[str, Any]:
    """What /plugins says, by name."""
    return {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}


async def test_a_folder_with_agent_py_may_have_modules_of_its_own(fakes: Fakes) -> None:
    folder = fakes.folder / "agents" / "hey"
    folder.mkdir(parents=True)
    (folder / "words.py").write_text("WORDS = 'from a folder'\n")
    source = write_agent(fakes.folder / "parts", "hey", says("X").replace("say('X')", "say(WORDS)")).read_text()
    (folder / "agent.py").write_text(f"from .words import WORDS\n{source}")
    async with proxy_with_agents(fakes, {}, ["hey"]) as proxy:
        assert await asked(proxy) == "from a folder"
        assert (await listed(proxy))["hey"]["source"] == str(folder)


async def test_an_installed_package_names_its_agents_by_an_entry_point(fakes: Fakes) -> None:
    site = fakes.folder / "site"
    write_agent(site, "their_agents", says("from a package"))
    info = site / "their_agents-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-agents\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llama_smart_proxy.agents]\nhey = their_agents:Says\n")
    config = fakes.config({"m": fakes.model()}) | {"agents": ["hey"]}
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    async with running_proxy(config, env={"PYTHONPATH": path}) as proxy:
        assert await asked(proxy) == "from a package"
        assert (await listed(proxy))["hey"]["source"] == "package their-agents"


async def test_of_two_agents_with_one_name_the_operators_own_wins(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"help": says("no help", "help")}) as proxy:
        assert await asked(proxy, "/help") == "no help"
        assert (await listed(proxy))["help"]["source"].endswith("help.py")


async def test_without_a_list_all_agents_of_the_folders_are_enabled(fakes: Fakes) -> None:
    write_agent(fakes.folder / "mine", "hey", says("found"))
    for name in ("_part", "test_hey", "hey_test", "conftest"):
        write_agent(fakes.folder / "mine", name, "x = 1")
    write_agent(fakes.folder / "mine" / "__pycache__", "agent", says("stale"))
    config = fakes.config({"m": fakes.model()})
    for given, env in (({"agents_dirs": [fakes.folder / "mine"]}, {}), ({}, {"OLLAMA_PROXY_PLUGINS_DIR": "mine"})):
        env = {name: str(fakes.folder / folder) for name, folder in env.items()}
        async with running_proxy(config | given, env=env) as proxy:
            assert await asked(proxy) == "found"
            assert set(await listed(proxy)) == {"hey", "help"}


def test_a_typo_is_a_config_error_that_lists_the_known_names(tmp_path: Path) -> None:
    write_agent(tmp_path / "mine", "hey", says("hey"))
    config = load(
        tmp_path, json.dumps({"agents_dirs": ["mine"], "agents": ["hye", {"hey": {"volume": 3}}, "help", "help"]})
    )
    with pytest.raises(ConfigError) as caught:
        Plugins.of(config)
    unknown, option, twice = caught.value.problems
    assert unknown.startswith("agents.0: unknown agent hye; known agents: ") and "hey" in unknown
    assert option == "agents.1.hey.volume: unknown option"
    assert twice == "agents.3: the agent help is named twice"


def test_agents_of_a_model_are_checked_too(tmp_path: Path) -> None:
    write_agent(tmp_path / "mine", "hey", says("hey"))
    models = {"a": {"repo": "o/r", "agents": ["hey", "hi"]}, "b": {"model": "a", "agents": [{"hey": {"volume": 3}}]}}
    config = load(tmp_path, json.dumps({"agents_dirs": ["mine"], "agents": [], "models": models}))
    with pytest.raises(ConfigError) as caught:
        Plugins.of(config)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "models.a.agents.1: unknown agent hi",
        "models.b.agents.0.hey.volume: unknown option",
    ]


def test_two_agents_with_one_command_are_a_config_error(tmp_path: Path) -> None:
    for name, command in (("one", "hey"), ("two", "hey"), ("three", "agents")):
        write_agent(tmp_path / "mine", name, says(name, command))
    config = load(tmp_path, json.dumps({"agents_dirs": ["mine"], "agents": ["one", "two", "three"]}))
    with pytest.raises(ConfigError) as caught:
        Plugins.of(config)
    assert caught.value.problems == [
        "agents: two and one both have the command /hey",
        "agents: three and the proxy itself both have the command /agents",
    ]


def test_discovery_imports_nothing(tmp_path: Path) -> None:
    write_agent(tmp_path / "mine", "boom", "raise RuntimeError")
    assert discover([tmp_path / "mine", tmp_path / "missing"])["boom"].label.endswith("boom.py")


def test_the_command_line_tells_of_a_typo_and_of_what_cannot_be_imported(tmp_path: Path) -> None:
    write_agent(tmp_path / "mine", "broken", "import no_such_module")
    config = tmp_path / "config.yaml"
    for agents, status, words in (
        ("[brokn]", 2, "config.yaml: agents.0: unknown agent brokn; known agents: broken, "),
        ("[broken]", 0, "warning: agents: broken cannot be loaded: ModuleNotFoundError"),
    ):
        config.write_text(f"agents_dirs: [mine]\nagents: {agents}\n")
        argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(config)]
        done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
        assert (done.returncode, words in done.stderr) == (status, True), done.stderr
        if status:
            argv[3] = "serve"
            done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
            assert (done.returncode, words in done.stderr) == (status, True), done.stderr


async def test_plugins_tells_what_there_is_to_know(fakes: Fakes) -> None:
    options = "    class Config(Options):\n        volume: int = 3\n"
    source = says("hey").replace("    command =", f'{options}    per_call = frozenset({{"volume"}})\n    command =')
    async with proxy_with_agents(fakes, {"hey": source, "broken": "import no_such_module"}) as proxy:
        await asked(proxy)
        answer = await raw_client.get(proxy.port, "/plugins/")
        hey, broken, helper = answer.json()
        assert [item["name"] for item in (hey, broken, helper)] == ["hey", "broken", "help"]
        assert hey["status"] == helper["status"] == "loaded" and broken["status"] == "failed"
        assert "ModuleNotFoundError: No module named 'no_such_module' (line" in broken["error"]
        assert (hey["command"], hey["description"], hey["hooks"]) == ("/hey", "Answers hey.", ["on_request"])
        assert hey["config_schema"]["properties"]["volume"]["type"] == "integer"
        assert (hey["calls"], hey["errors"], hey["options_per_call"]) == (1, 0, ["volume"])
        assert hey["mean_latency_ms"] > 0
        health = await proxy.health()
        assert health["status"] == "degraded" and health["agents"] == {"loaded": ["hey", "help"], "failed": ["broken"]}


async def test_a_required_agent_that_is_broken_lets_nothing_pass(fakes: Fakes) -> None:
    entries = [{"broken": {"required": True}}]
    async with proxy_with_agents(fakes, {"broken": "class Broken:\n    pass"}, entries) as proxy:
        said = await WAY.ask(proxy, WAY.body("hi", agents=False))
        assert said.status == 503 and "agent broken is required and not available" in (said.error or "")
        assert fakes.generated() == []


async def test_a_required_agent_cannot_be_avoided(fakes: Fakes) -> None:
    entries = [{"hey": {"required": True}}]
    models = {"m": fakes.model(), "bare": {"model": "m", "agents": False}}
    async with proxy_with_agents(fakes, {"hey": says("guarded")}, entries, models=models) as proxy:
        assert await asked(proxy, "hi") == "guarded"
        assert (await WAY.ask(proxy, WAY.body("hi", agents=False))).text == "guarded"
        assert (await WAY.ask(proxy, WAY.body("hi", model="bare"))).text == "guarded"
        assert (await WAY.ask(proxy, WAY.body("hi"), [("X-Agents", "off")])).text == "guarded"
        assert await asked(proxy, "/hey off") != "" and await asked(proxy, "hi") == "guarded"
        answer = await raw_client.post(proxy.port, "/completion", {"model": "m", "prompt": "hi"})
        assert (answer.status, answer.error["code"]) == (403, "agents_required")
        answer = await raw_client.post(proxy.port, "/v1/responses", {"model": "m", "input": "hi"})
        assert answer.json()["output"][0]["content"][0]["text"] == "guarded"


async def test_a_saved_agent_is_loaded_anew(fakes: Fakes) -> None:
    def slow_saying(words: str) -> str:
        return f"WORDS = {words!r}\nFOLDER = {str(fakes.folder)!r}\n{SLOW}"

    sources = {"hey": says("old"), "slow": slow_saying("old")}
    async with proxy_with_agents(fakes, sources, args=["--reload"], clean_log=False) as proxy:
        assert await asked(proxy) == "old"
        write_agent(fakes.folder / "agents", "hey", says("new!"))
        assert await asked(proxy) == "new!", "the next request after saving"
        write_agent(fakes.folder / "agents", "hey", "class Says(Agent) oops")
        assert await asked(proxy) == "new!", "what cannot be loaded changes nothing"
        assert "SyntaxError" in (await listed(proxy))["hey"]["error"]
        assert (await proxy.health())["status"] == "degraded"
        write_agent(fakes.folder / "agents", "hey", says("mended"))
        assert await asked(proxy) == "mended"
        assert (await listed(proxy))["hey"]["status"] == "loaded"

        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(asked(proxy, "/slow hi"))
            await until((fakes.folder / "begun").exists)
            write_agent(fakes.folder / "agents", "slow", slow_saying("anew"))
            assert await asked(proxy) == "mended"  # by this request slow.py was found to have been saved
            assert not (fakes.folder / "closed").exists(), "the old one is still in use"
            (fakes.folder / "go").touch()
        assert waiting.result() == "old", "a request ends with the agent it began with"
        await until((fakes.folder / "closed").exists, what="its end")
        assert await asked(proxy, "/slow hi") == "anew"


async def test_without_reload_a_saved_agent_stays_as_it_was(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"hey": says("old")}) as proxy:
        write_agent(fakes.folder / "agents", "hey", says("new"))
        assert await asked(proxy) == "old"
