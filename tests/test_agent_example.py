"""The agent `example`: what a copy of it starts from works in every API."""

from __future__ import annotations

import json

from tests.agent_clients import WAYS, Way, proxy_with_agents
from tests.e2e_support import CHAT, Fakes, fakes

__all__ = ["fakes"]


async def test_request_and_answer_are_marked_in_every_api(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {}, [{"example": {"mark": "*"}}]) as proxy:
        for way in WAYS:
            said = await way.ask(proxy, way.body("/example hi", fake={"tokens": 2}))
            # `fake` is a field of OpenAI's endpoints only: elsewhere the answer has eight tokens
            assert said.text.startswith("* t0 t1 ") and said.text.endswith("  *"), way
            assert said.error is None and said.finish in ("stop", "end_turn")
            event = fakes.events("request")[-1]
            body = json.loads(event["body"])
            if event["path"] not in ("/apply-template", "/tokenize"):
                content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
                assert content == "hi *", way


async def test_a_call_sets_the_mark(fakes: Fakes) -> None:
    way = Way(CHAT, stream=True)
    async with proxy_with_agents(fakes, {}, ["example"]) as proxy:
        said = await way.ask(proxy, way.body('/example mark="- -" hi', fake={"tokens": 1}))
        assert said.text == "- - t0  - -"
        assert fakes.generated()[-1]["messages"][-1]["content"] == "hi - -"
        said = await way.ask(proxy, way.body('/example mark="" hi'))
        assert said.status == 400 and "option mark of /example" in (said.error or "")
