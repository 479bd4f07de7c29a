"""The agent `help`: tells every command, in the caller's API, without a model."""

from __future__ import annotations

from tests.agent_clients import WAYS, Way, proxy_with_agents
from tests.e2e_support import CHAT, Fakes, fakes

__all__ = ["fakes"]


async def test_it_tells_every_command_in_every_api_and_starts_no_model(fakes: Fakes) -> None:
    models = {"m": fakes.model(), "v": {"model": "m", "agents": ["think"]}}
    async with proxy_with_agents(fakes, {}, ["parallel", "think", "example"], models=models) as proxy:
        for way in WAYS:
            for model in ("m", "v"):
                said = await way.ask(proxy, way.body("/help", model=model))
                assert said.error is None and said.finish in ("stop", "end_turn"), way
                for words in (
                    "- `/parallel` Asks several models",
                    "    - `n=` How often",
                    "- `/example` ",
                    "- `/help` ",
                ):
                    assert words in said.text, way
                assert "`/agents`" in said.text and "think (" in said.text and "/think" not in said.text
        assert fakes.events("start") == []


async def test_it_is_there_unasked_and_can_be_done_without(fakes: Fakes) -> None:
    way = Way(CHAT, stream=False)
    async with proxy_with_agents(fakes, {}, []) as proxy:
        assert "- `/help` " in (await way.ask(proxy, way.body("/help"))).text
        said = await way.ask(proxy, way.body("/help", agents=False))
        assert said.text.startswith("t0 ") and fakes.generated()[-1]["messages"][-1]["content"] == "/help"
