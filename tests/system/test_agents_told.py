"""What users and operators are told about agents: mistakes, and what cannot be had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import raw_client
from tests.support.agent_clients import Way, proxy_with_agents
from tests.support.e2e_support import CHAT, Fakes, fakes
from tests.support.harness import Proxy, environment, until

__all__ = ["fakes"]
WAY = Way(CHAT, stream=False)
GREETS = '''
class Greets(Agent):
    """Greets."""
    command = "greets"
    per_call = frozenset({"word"})
    class Config(Options):
        word: str = "Hello"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return say(ctx.config.word)
'''
REFUSES = '''
from llama_smart_proxy.proxy.errors import BadRequest

class Refuses(Agent):
    """Finds fault with every question."""
    command = "refuses"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        raise BadRequest("ask something else")
'''
BLOCKS = '''
import time

class Blocks(Agent):
    """Forgets that others wait."""
    command = "blocks"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if "late" in request.last_user_text:
            await asyncio.sleep(0.3)
        if "task" in request.last_user_text:
            await asyncio.gather(self.in_a_task())
        if "now" in request.last_user_text:
            time.sleep(0.5)
        if "late" in request.last_user_text:
            await asyncio.sleep(0.3)
        return None
    async def in_a_task(self) -> None:
        await asyncio.sleep(0.3)
        time.sleep(0.6)
        await asyncio.sleep(0.3)
'''
BROKEN = "import no_such_module"


async def errors(proxy: Proxy) -> dict[str, int]:
    """How often each agent has failed."""
    return {item["name"]: item["errors"] for item in (await raw_client.get(proxy.port, "/plugins")).json()}


async def test_an_agent_that_is_broken_is_told_where_it_is_named(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"greets": GREETS, "broken": BROKEN}, clean_log=False) as proxy:
        said = await WAY.ask(proxy, WAY.body("hi"), [("X-Agents", "broken")])
        assert said.status == 503 and "agent broken is not available" in (said.error or "")
        said = await WAY.ask(proxy, WAY.body("/agents"))
        assert said.text == "Agents that run in this chat: none."


async def test_options_are_not_kept_for_a_chat(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"greets": GREETS}) as proxy:
        said = await WAY.ask(proxy, WAY.body("/greets word=Hi on"))
        assert said.status == 400 and "/greets on takes no options" in (said.error or "")
        assert (await WAY.ask(proxy, WAY.body("/agents"))).text == "Agents that run in this chat: none."
        assert (await WAY.ask(proxy, WAY.body("/greets word=Hi onwards"))).text == "Hi"


async def test_an_endpoint_without_agents_says_so_to_who_names_one(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"greets": GREETS}) as proxy:
        for path, field in (("/infill", "input_prefix"), ("/completion", "prompt")):
            for named, status in (("greets", 400), ("off", 200)):
                headers = [("X-Agents", named)]
                whole = raw_client.request("POST", path, {"model": "m", field: "hi"}, headers=headers, close=True)
                answer = await raw_client.ask(proxy.port, whole)
                assert answer.status == status, path
                told = answer.json()["error"]["message"] if status == 400 else ""
                assert told == ("agents do not run at this endpoint, so it cannot run greets" if status == 400 else "")


async def test_a_command_that_is_not_there_is_told_by_help(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"greets": GREETS}) as proxy:
        said = await WAY.ask(proxy, WAY.body("/help gretes"))
        assert said.text.startswith("There is no command `/gretes`.\n\n**Commands**")


async def test_an_answer_that_no_model_gave_counts_no_tokens(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"greets": GREETS}) as proxy:
        answer = (await raw_client.post(proxy.port, CHAT, WAY.body("/greets"))).json()
        assert answer["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


async def test_a_clients_mistake_is_no_failure_of_the_agent(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"refuses": REFUSES}) as proxy:
        said = await WAY.ask(proxy, WAY.body("/refuses hi"))
        assert (said.status, said.error) == (400, "ask something else")
        assert (await errors(proxy))["refuses"] == 0


async def test_an_agent_that_blocks_the_process_is_told_in_the_log(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"blocks": BLOCKS}) as proxy:
        for lines, words in enumerate(("now", "late now", "in a task"), 1):
            assert (await WAY.ask(proxy, WAY.body(f"/blocks {words}"))).status == 200
            await until(lambda: proxy.log.count("agent blocks blocked the process") >= lines, what=words)  # noqa: B023


def test_check_tells_of_folders_that_are_not_there_and_counts_virtual_models(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    models = {"m": {"path": "m.gguf"}, "v": {"model": "m", "agents": ["example"]}}
    config = {"models": models, "agents_dirs": ["nowhere"], "agents": ["example"]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(tmp_path / "c.json")]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=200)
    assert f"warning: agents_dirs: {tmp_path / 'nowhere'}: no such folder" in done.stderr
    assert done.returncode == 0 and "(2 models, 0 remotes)" in done.stdout
