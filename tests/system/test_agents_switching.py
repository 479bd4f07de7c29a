"""What the configuration of a model says of agents, and what users can switch on and off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llama_smart_proxy.agents.base import Context
from llama_smart_proxy.agents.redact import Redact
from llama_smart_proxy.proxy.chat import Chunk
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, proxy_with_agents, write_agent
from tests.support.e2e_support import CHAT, Fakes, fakes
from tests.support.harness import Proxy, until

__all__ = ["fakes"]
WAY = Way(CHAT, stream=False)
GUARD = """
class Guard(Agent):
    '''Says that it was there.'''
    command = "guard"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        yield Chunk.of("G")
        async for chunk in stream:
            yield chunk
"""
BOOM = """
class Boom(Agent):
    '''Fails.'''
    command = "boom"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        raise RuntimeError
"""
NEEDY = """
class Needy(Agent):
    '''Cannot do without an option.'''
    command = "needy"
    class Config(Options):
        word: str
        mark: str = "!"
    async def start(self) -> None:
        self.started_with = self.config.word
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return say(f"{self.started_with} {ctx.config.word}{ctx.config.mark}")
"""


def models(fakes: Fakes, **agents: Any) -> dict[str, Any]:
    """The model `m`, and a virtual one for each entry, with these agents."""
    return {"m": fakes.model()} | {name: {"model": "m", "agents": entries} for name, entries in agents.items()}


async def said(proxy: Proxy, text: str, *headers: tuple[str, str], way: Way = WAY, **fields: Any) -> str:
    """What the client is told, or the words of the error."""
    answer = await way.ask(proxy, way.body(text, **fields), headers)
    return answer.error or answer.text


async def test_a_model_whose_name_ends_in_latest_has_its_agents(fakes: Fakes) -> None:
    chosen = models(fakes) | {"q:latest": {**fakes.model(), "agents": ["guard"]}, "w:latest": {"model": "m"}}
    chosen["w:latest"]["agents"] = ["guard"]
    async with proxy_with_agents(fakes, {"guard": GUARD}, [], models=chosen) as proxy:
        for model in ("q:latest", "Q:LATEST", "w:latest"):
            assert (await said(proxy, "hi", model=model)).startswith("G"), model
        shown = (await raw_client.get(proxy.port, "/v1/models/W:latest")).json()
        assert shown["id"] == "w:latest", "a virtual model goes by the name that it was given"


async def test_what_a_model_requires_cannot_be_avoided_there(fakes: Fakes) -> None:
    chosen = models(fakes, strict=[{"guard": {"required": True}}], loose=["guard"])
    async with proxy_with_agents(fakes, {"guard": GUARD}, [], models=chosen) as proxy:
        off = ("X-Agents", "off")
        assert (await said(proxy, "hi", off, model="strict")).startswith("G")
        assert not (await said(proxy, "hi", off, model="loose")).startswith("G")
        assert not (await said(proxy, "hi", off)).startswith("G")
        chat = ("X-Chat-Id", "1")
        assert await said(proxy, "/guard off", chat, model="strict") == (
            "/guard is required, and stays on.\nAgents that run in this chat: guard."
        )
        assert (await said(proxy, "hi", chat, model="strict")).startswith("G")
        assert await said(proxy, "/agents", chat) == "Agents that run in this chat: none.", "nothing was switched"
        for model, status in (("strict", 403), ("loose", 200)):
            body = {"model": model, "prompt": "hi"}
            assert (await raw_client.post(proxy.port, "/completion", body)).status == status, model


async def test_a_virtual_model_has_what_its_base_requires(fakes: Fakes) -> None:
    chosen = {"m": fakes.model(), "strict": {**fakes.model(), "aliases": ["s"]}, "v": {"model": "s"}}
    chosen["strict"]["agents"] = [{"guard": {"required": True}}]
    async with proxy_with_agents(fakes, {"guard": GUARD}, [], models=chosen) as proxy:
        for model, begins in (("strict", True), ("v", True), ("m", False)):
            told = await said(proxy, "hi", ("X-Agents", "off"), model=model)
            assert told.startswith("G") is begins, model


async def test_a_name_means_the_model_that_is_spelled_so(fakes: Fakes) -> None:
    chosen = models(fakes) | {"w": fakes.model(), "w:latest": {"model": "m", "agents": ["guard"]}}
    async with proxy_with_agents(fakes, {"guard": GUARD}, [], models=chosen) as proxy:
        assert not (await said(proxy, "hi", model="w")).startswith("G")
        assert (await said(proxy, "hi", model="w:latest")).startswith("G")


async def test_only_what_generates_needs_the_required_agents(fakes: Fakes) -> None:
    entries = [{"guard": {"required": True}}]
    async with proxy_with_agents(fakes, {"guard": GUARD}, entries) as proxy:
        for path, field, status in (
            ("/completion", "prompt", 403), ("/infill", "input_prefix", 403), ("/v1/responses", "input", 200),
            ("/v1/responses/input_tokens", "input", 200), ("/v1/embeddings", "input", 200),
            ("/embedding", "content", 200), ("/v1/rerank", "query", 200), ("/tokenize", "content", 200),
        ):  # fmt: skip
            answer = await raw_client.post(proxy.port, path, {"model": "m", field: "hi", "documents": ["hi"]})
            assert answer.status == status, path


async def test_a_model_changes_only_the_settings_that_it_names(fakes: Fakes) -> None:
    chosen = models(fakes, v=[{"boom": {"timeout_s": 5}}], w=[{"boom": {"on_error": "fail"}}])
    entries = [{"boom": {"on_error": "skip", "always": False}}]
    async with proxy_with_agents(fakes, {"boom": BOOM}, entries, models=chosen, clean_log=False) as proxy:
        assert (await WAY.ask(proxy, WAY.body("hi", model="v"))).status == 200
        assert (await WAY.ask(proxy, WAY.body("hi", model="w"))).status == 500


async def test_an_agent_of_some_models_has_the_options_of_each(fakes: Fakes) -> None:
    first, second = {"word": "one", "mark": "?"}, {"word": "two"}
    chosen = models(fakes, v=[{"needy": first}], w=[{"needy": second}])
    async with proxy_with_agents(fakes, {"needy": NEEDY}, [], models=chosen) as proxy:
        assert await said(proxy, "hi", model="v") == "one one?"
        assert await said(proxy, "hi", model="w") == "one two!"
        assert await said(proxy, "/needy hi") == "one one?", "elsewhere it has those of the first"


async def test_always_belongs_where_agents_are_enabled(fakes: Fakes) -> None:
    chosen = models(fakes, v=[{"guard": {"always": True}}])
    with pytest.raises(AssertionError, match=r"models\.v\.agents\.0\.guard\.always: belongs in agents: at the top"):
        async with proxy_with_agents(fakes, {"guard": GUARD}, [], models=chosen):
            pass


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
async def test_nothing_is_switched_where_nothing_tells_the_chat(fakes: Fakes, way: Way) -> None:
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        told = await said(proxy, "/guard on", way=way)
        if way.path in ("/v1/completions", "/api/generate"):
            assert told.startswith("This chat cannot be identified; send the header X-Conversation-Id")
        else:
            assert told.startswith("/guard is on in this chat.")
        chat = ("X-Conversation-Id", "1")
        assert (await said(proxy, "/guard on", chat, way=way)).startswith("/guard is on in this chat.")
        assert (await said(proxy, "hi", chat, way=way)).startswith("G")


Turns = list[dict[str, Any]]


async def turn(proxy: Proxy, chat: Turns, text: str, *headers: tuple[str, str]) -> str:
    """Send the whole `chat` with a new text, as chat UIs do, and append both the text and the answer. The answer."""
    chat.append({"role": "user", "content": text})
    body = {"model": "m", "stream": False, "messages": chat}
    answer: str = (await raw_client.post(proxy.port, "/api/chat", body, headers=headers)).json()["message"]["content"]
    chat.append({"role": "assistant", "content": answer})
    return answer


async def test_the_chat_itself_is_the_switchboard(fakes: Fakes) -> None:
    switched: Turns = []
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        await turn(proxy, switched, "hi")
        await turn(proxy, switched, "/guard on")
        assert (await turn(proxy, switched, "hi")).startswith("G")
        other: Turns = []
        await turn(proxy, other, "hi")
        assert not (await turn(proxy, other, "hi")).startswith("G"), "it begins alike, and is another chat"
        fork = switched[:4]
        assert (await turn(proxy, fork, "/guard off")).endswith("Agents that run in this chat: none.")
        assert not (await turn(proxy, fork, "hi")).startswith("G")
        assert (await turn(proxy, list(switched), "again")).startswith("G"), "what a fork switches is the fork's"
        assert not (await turn(proxy, switched[:2], "edited")).startswith("G"), "the switch was edited away"
        assert (await turn(proxy, switched[:4], "hi")).startswith("G"), "an answer is generated once more"
        assert not (await said(proxy, "hi", way=Way("/api/generate", stream=False))).startswith("G")
        seen = [message["content"] for message in fakes.generated()[-2]["messages"]]
        assert not any("guard" in text or "Agents" in text for text in seen), "the model reads none of it"
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        assert (await turn(proxy, switched, "after a restart")).startswith("G")


async def test_a_chat_with_an_id_may_be_trimmed(fakes: Fakes) -> None:
    chat: Turns = []
    header = ("X-OpenWebUI-Chat-Id", "1")
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        for text in ("one", "/guard on", "two"):
            await turn(proxy, chat, text, header)
        assert (await turn(proxy, chat[4:], "hi", header)).startswith("G")
        assert not (await turn(proxy, chat[:2], "edited", header)).startswith("G"), (
            "it is all there, but for the switch"
        )
        await turn(proxy, chat[4:], "/guard off", header)
        assert (await turn(proxy, list(chat), "hi", header)).startswith("G"), "what the request itself shows decides"
        assert not (await turn(proxy, chat[4:], "hi", header)).startswith("G")


async def test_the_header_may_come_twice(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"guard": GUARD, "needy": NEEDY}, ["guard", {"needy": {"word": "w"}}]) as proxy:
        both = [("X-Agents", "guard"), ("X-Agents", "needy")]
        assert await said(proxy, "hi", *both) == "Gw w!"
        assert not (await said(proxy, "hi", ("X-Agents", "guard"), ("X-Agents", "off"))).startswith("G")
        for off in (["guard", "off"], "guard,off", ["off"]):
            assert not (await said(proxy, "hi", agents=off)).startswith("G")


async def test_help_tells_of_what_is_asked_about(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        for text in ("/help guard", "/help /guard"):
            assert await said(proxy, text) == "- `/guard` Says that it was there.", text
        for text in ("/help agents", "/help /agents"):
            assert await said(proxy, text) == "- `/agents` Lists the agents that run in this chat.", text
        assert (await said(proxy, "/help on")).startswith("There is no command `/on`.")
        assert (await said(proxy, "/guard /help on")).endswith("`/guard off` ends it."), "it is not on in the chat"
        assert await said(proxy, "/agents") == "Agents that run in this chat: none."


async def test_usage_is_told_of_answers_that_no_model_gave(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        for text in ("/help", "/agents", "/guard on", "hi"):
            body = Way(CHAT, stream=True).body(text, stream_options={"include_usage": True})
            events = (await raw_client.post(proxy.port, CHAT, body)).body.split(b"\n\n")
            last = json.loads(events[-3].removeprefix(b"data: "))
            assert last["choices"] == [] and "total_tokens" in last["usage"], text


async def test_a_command_alone_in_its_part_leaves_no_empty_part(fakes: Fakes) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        for rest in (image, {"type": "text", "text": "What is this?"}):
            content = [{"type": "text", "text": "/guard"}, rest]
            body = {"model": "m", "messages": [{"role": "user", "content": content}]}
            assert (await raw_client.post(proxy.port, CHAT, body)).status == 200
            sent = json.loads(fakes.events("request")[-1]["body"])
            assert sent["messages"][-1]["content"] == [rest]


async def test_a_servers_refusal_is_told_in_its_own_words_with_agents_too(fakes: Fakes) -> None:
    async with proxy_with_agents(fakes, {"guard": GUARD}) as proxy:
        body = WAY.body("hi", fake={"refuse": [400, "too long"]})
        plain, guarded = [
            (await raw_client.post(proxy.port, CHAT, body, headers=[("X-Agents", agents)])).json()["error"]
            for agents in ("off", "guard")
        ]
        assert guarded == plain | {"param": None}
        assert (guarded["type"], guarded["code"]) == ("server_error", 400), "not what we would call it"


async def test_a_saved_agent_has_to_fit_the_options_of_every_model(fakes: Fakes) -> None:
    source = NEEDY.replace("word: str", 'word: str = "none"')
    chosen = models(fakes, v=[{"needy": {"word": "one"}}], w=[{"needy": {"mark": "?"}}])
    served = {"models": chosen, "args": ["--reload"], "clean_log": False}
    async with proxy_with_agents(fakes, {"needy": source}, [], **cast(Any, served)) as proxy:
        assert await said(proxy, "hi", model="w") == "one none?"
        write_agent(fakes.folder / "agents", "needy", NEEDY)
        assert await said(proxy, "hi", model="w") == "one none?", "it goes on as it was"
        await until(lambda: "needy was changed, but cannot be loaded" in proxy.log)


async def test_redacted_thoughts_keep_the_name_that_the_server_has_for_them() -> None:
    config = Redact.Config(patterns=["email"])
    ctx = cast(Context, SimpleNamespace(config=config, state={}))

    async def source() -> AsyncIterator[Chunk]:
        for thought in ("to a@", "b.io", " so"):
            yield Chunk({"choices": [{"index": 0, "delta": {"reasoning": thought}}]})

    made = [chunk async for chunk in Redact(config).on_response(source(), ctx)]
    assert "".join(chunk.delta.get("reasoning", "") for chunk in made) == "to [email] so"
    assert not any("reasoning_content" in chunk.delta for chunk in made)
