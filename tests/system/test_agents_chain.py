"""Which agents take part: the order of the chain, and every way to call one, switch it on, and do without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.dialects.openai import CHAT as CHAT_CODEC
from llama_smart_proxy.proxy.middleware.chats import Chats, Identity
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Said, Way, write_agent
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, running_proxy, session_proxy

MARK = '''
class {cls}(Agent):
    """Puts a {name} around the question and in front of the answer."""
    command = {command!r}
    per_call = frozenset({{"times"}})
    class Config(Options):
        times: int = 1
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.body["trail"] = request.body.get("trail", "") + "{name}" * ctx.config.times
        return None
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        yield Chunk.of("{name}" * ctx.config.times)
        async for chunk in stream:
            yield chunk
'''
CHAT_WAY = Way(CHAT, stream=True)


def mark(name: str, *, command: bool = True) -> str:
    """An agent that leaves its letter on the request (field `trail`) and in front of the answer."""
    return MARK.format(cls=name.upper(), name=name, command=name if command else None)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("chain"))
    folder = fakes.folder / "agents"
    for name in "abcd":
        write_agent(folder, name, mark(name))
    for name in "xyz":
        write_agent(folder, name, mark(name, command=False))
    models: dict[str, Any] = {
        "m": fakes.model(fields={"parallel": 4}),
        "with-d": {"model": "m", "agents": ["d", {"b": {"times": 2}}], "aliases": ["dd"]},
        "own": {**fakes.model(), "agents": ["c"]},
        "bare": {"model": "m", "agents": False},
    }
    config = fakes.config(models, keep_alive=-1)
    config |= {
        "agents_dirs": [str(folder)],
        "agents": ["x", "a", "y", {"b": {"times": 1}}, "c", {"z": {"always": False}}],
    }
    with session_proxy(config) as proxy:
        yield proxy, fakes


async def ask(
    stage: tuple[Proxy, Fakes], text: str, *, way: Way = CHAT_WAY, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[str, Said]:
    """What the agents left on the request, in order, and what the client was told."""
    proxy, fakes = stage
    before = len(fakes.events("request"))
    said = await way.ask(proxy, way.body(text, fake={"texts": ["!"]}, **fields), list((headers or {}).items()))
    sent = [json.loads(event["body"]) for event in fakes.events("request")[before:] if event["body"]]
    return sent[-1].get("trail", "") if sent else "", said


async def test_config_order_then_the_models_own_then_what_the_user_typed(stage: tuple[Proxy, Fakes]) -> None:
    trail, said = await ask(stage, "/c /a hi", model="with-d")
    assert trail == "xydbbca"
    assert said.text == "xydbbca!", "the first to see the request is the last to see the answer"
    trail, said = await ask(stage, "/b hi", model="with-d")
    assert trail == "xydbb", "one that comes up twice stands where it came up first"
    assert (await ask(stage, "hi", model="own"))[0] == "xyc"


async def test_a_virtual_models_aliases_have_its_agents(stage: tuple[Proxy, Fakes]) -> None:
    for model in ("with-d", "WITH-D", "dd", "with-d:latest"):
        assert (await ask(stage, "hi", model=model))[0] == "xydbb"


async def test_options_of_a_command_are_for_its_own_request(stage: tuple[Proxy, Fakes]) -> None:
    assert (await ask(stage, "/a times=3 hi"))[0] == "xyaaa"
    assert (await ask(stage, '/a times="2" /c hi'))[0] == "xyaac"
    assert (await ask(stage, "/a hi"))[0] == "xya"
    _, said = await ask(stage, "/a times=many hi")
    assert said.status == 400 and "option times of /a" in (said.error or "")
    trail, _ = await ask(stage, "/a other=3 hi")
    assert trail == "xya"
    assert _last_text(stage) == "other=3 hi", "what is no option of the agent is the user's text"


async def test_agents_are_called_by_a_header_and_by_a_field(stage: tuple[Proxy, Fakes]) -> None:
    assert (await ask(stage, "hi", headers={"X-Agents": "c, a"}))[0] == "xyca"
    assert (await ask(stage, "hi", agents=["c", "/a"]))[0] == "xyca"
    assert (await ask(stage, "hi", agents="a"))[0] == "xya"
    assert "agents" not in _last_body(stage)
    assert (await ask(stage, "hi", agents=["z"]))[0] == "xyz", "an agent without a command goes by its name"
    _, said = await ask(stage, "hi", headers={"X-Agents": "rga"})
    assert said.status == 400 and "unknown agent 'rga'; known agents: a, b, c, d, help, x, y, z" in (said.error or "")
    for wrong in ({"a": 1}, ["a", 1], ["a"] * 1000, "a," * 1000):
        _, said = await ask(stage, "hi", agents=wrong)
        assert said.status == 400, wrong


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
async def test_a_client_may_do_without_agents(stage: tuple[Proxy, Fakes], way: Way) -> None:
    ways_out: list[dict[str, Any]] = [
        {"headers": {"X-Agents": "off"}},
        {"agents": False},
        {"agents": "off"},
        {"model": "bare"},
    ]
    for options in ways_out:
        _, said = await ask(stage, "/a hi", way=way, **options)
        assert not said.text.startswith(("x", "y", "a")), options
        assert _last_text(stage) == "/a hi", "nothing is taken out of the text"
    _, said = await ask(stage, "/a hi", way=way)
    assert said.text.startswith("xya")
    assert _last_text(stage) == "hi"


async def test_an_agent_is_switched_on_and_off_for_a_chat(stage: tuple[Proxy, Fakes]) -> None:
    chat: dict[str, Any] = {"headers": {"X-OpenWebUI-Chat-Id": "chat-1"}}
    other: dict[str, Any] = {"headers": {"X-Conversation-Id": "chat-2"}}
    _, said = await ask(stage, "/a on", **chat)
    assert said.text == "/a is on in this chat.\nAgents that run in this chat: x, y, a."
    assert (await ask(stage, "hi", **chat))[0] == "xya"
    assert (await ask(stage, "hi", **other))[0] == "xy"
    assert (await ask(stage, "hi"))[0] == "xy"
    _, said = await ask(stage, "/agents", **chat)
    assert said.text == "Agents that run in this chat: x, y, a."
    stranger: dict[str, Any] = {"headers": {"X-OpenWebUI-Chat-Id": "chat-1", "Authorization": "Bearer another"}}
    assert (await ask(stage, "hi", **stranger))[0] == "xy", "a chat belongs to the key that it is led with"
    await ask(stage, "/a /b off", **chat)
    assert (await ask(stage, "hi", **chat))[0] == "xy"
    assert (await ask(stage, "/a hi", **chat))[0] == "xya", "for one request it can be called all the same"
    _, said = await ask(stage, "/agents and what they do", **chat)
    assert said.text == "xy!", "a question that begins with the word is a question"
    _, said = await ask(stage, "/a on the roof", **chat)
    assert said.text == "xya!"


async def test_a_chat_without_an_id_shows_its_switches_itself(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    begun = [{"role": "user", "content": "/b on"}]
    body = {"model": "m", "fake": {"texts": ["!"]}}
    switched = (await raw_client.post(proxy.port, CHAT, {**body, "messages": begun})).json()
    answer = {"role": "assistant", "content": switched["choices"][0]["message"]["content"]}
    later = [*begun, answer, {"role": "user", "content": "hi"}]
    await raw_client.post(proxy.port, CHAT, {**body, "messages": later})
    assert fakes.generated()[-1]["trail"] == "xyb"
    await raw_client.post(proxy.port, CHAT, {**body, "messages": later[2:]})
    assert fakes.generated()[-1]["trail"] == "xy"


async def test_virtual_models_are_in_every_menu(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    listed = {item["id"]: item for item in (await raw_client.get(proxy.port, "/v1/models")).json()["data"]}
    assert {"m", "with-d", "own", "bare"} <= listed.keys()
    assert listed["with-d"]["status"] == listed["m"]["status"] and listed["with-d"]["aliases"] == ["with-d", "dd"]
    tags = {item["name"]: item for item in (await raw_client.get(proxy.port, "/api/tags")).json()["models"]}
    assert tags["with-d"]["model"] == "with-d" and tags["with-d"]["size"] == tags["m"]["size"]
    await ask(stage, "hi", model="with-d")
    running = {item["name"] for item in (await raw_client.get(proxy.port, "/api/ps")).json()["models"]}
    assert {"m", "with-d", "bare"} <= running
    one = (await raw_client.get(proxy.port, "/v1/models/with-d")).json()
    assert one["id"] == "with-d" and one["status"]["value"] == "loaded"
    shown = await raw_client.post(proxy.port, "/api/show", {"model": "with-d"})
    assert shown.status == 200


def test_chats_are_bounded_and_forgotten() -> None:
    now = 0.0
    a, b, c = (Identity(name, named=True) for name in "abc")
    chats = Chats(max_chats=2, ttl_s=10, clock=lambda: now)
    chats.switch(a, "rag", True)
    chats.switch(b, "rag", True)
    assert chats.switched(a) == {"rag": True}
    chats.switch(c, "rag", False)
    assert len(chats) == 2 and chats.switched(b) == {}, "the one longest without a request goes first"
    now = 9.0
    assert chats.switched(c) == {"rag": False}
    now = 12.0
    assert chats.switched(a) == {} and len(chats) == 1
    now = 19.1
    assert chats.switched(c) == {} and len(chats) == 0


def test_the_id_of_a_chat_depends_on_key_and_beginning_only() -> None:
    def of(*texts: str, key: str = "", system: str = "") -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        beginning = CHAT_CODEC.beginning({"messages": messages})
        return Identity.of({"Authorization": key} if key else {}, beginning, resent=True).id

    assert of("a") == of("a", "b", "c")
    assert of("\udc80") != of("a"), "half a character is no trouble"
    assert len({of("a"), of("b"), of("a", key="k"), of("a", system="s")}) == 4


def _last_body(stage: tuple[Proxy, Fakes]) -> dict[str, Any]:
    bodies = [
        json.loads(event["body"])
        for event in stage[1].events("request")
        if "prompt" in event["body"] or "messages" in event["body"]
    ]
    found: dict[str, Any] = bodies[-1]
    return found


def _last_text(stage: tuple[Proxy, Fakes]) -> str:
    body = _last_body(stage)
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


async def test_an_agent_can_leave_others_out_but_none_that_is_wanted(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    lone = """
        from llama_smart_proxy import BadRequest

        class Lone(Agent):
            async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
                ctx.leave_out(*"abcd")
                if "fail" in request.last_user_text:
                    raise BadRequest("it fails")
                return None
    """
    write_agent(tmp_path / "agents", "lone", lone)
    for name in "abcd":
        write_agent(tmp_path / "agents", name, mark(name))
    own = ["b", {"c": {"on_error": "skip"}}, "d"]
    models: dict[str, Any] = {"m": fakes.model(), "with-bcd": {"model": "m", "agents": own}}
    config = fakes.config(models) | {"agents_dirs": [str(tmp_path / "agents")]}
    config["agents"] = [{"a": {"always": True}}, {"lone": {"on_error": "skip"}}, "b", {"c": {"required": True}}, "d"]
    async with running_proxy(config) as proxy:
        for model, text, left in (
            ("m", "hi", "ac"),
            ("m", "/d hi", "acd"),
            ("with-bcd", "hi", "ac"),
            ("with-bcd", "/b hi", "acb"),
            ("with-bcd", "fail", "acbd"),
        ):
            trail, said = await ask((proxy, fakes), text, model=model)
            assert trail == left and said.text == f"{left}!", (model, text)
        assert (await ask((proxy, fakes), "hi", headers={"X-Agents": "b"}))[0] == "acb"
        await ask((proxy, fakes), "/b on", headers={"X-Chat-Id": "1"})
        assert (await ask((proxy, fakes), "hi", headers={"X-Chat-Id": "1"}))[0] == "ac"
        calls = {item["name"]: item["calls"] for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert (calls["a"], calls["lone"], calls["d"]) == (7, 7, 2), "the requests that an agent took part in"
