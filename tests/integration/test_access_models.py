"""What exists for a key: models and agents, and what its requests may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.models.permit import Permit
from tests.support.agent_clients import write_agent
from tests.support.e2e_support import Fakes, fakes
from tests.support.here import served_here
from tests.support.keyed import ADMIN, CHAT, FEW, KEYS, MESSAGES, USER, Keyed, keyed
from tests.support.raw_client import request
from tests.support.toxic import RawUpstream

__all__ = ["fakes"]  # a fixture

FORBIDDEN = ["b1", "B1", "b1:latest", "vb", "big", "big:latest", "library/big", "hf.co/org/repo:Q4_K_M"]
LISTS = {"/v1/models": ("data", "id"), "/models": ("data", "id"), "/api/tags": ("models", "name")}
MARK = '''
class {cls}(Agent):
    """Marks the question with {name}."""
    command = {command!r}
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.body["trail"] = request.body.get("trail", "") + "{name}"
        return None
'''
SIDE = '''
class Side(Agent):
    """Asks b1, and puts its answer in front of the question."""
    command = None
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        for model in ("b1", None):
            asked = request.copy()
            asked.model = model or request.model
            try:
                await ctx.complete(asked)
            except Exception as exc:
                request.body["trail"] = request.body.get("trail", "") + f" {model}: {type(exc).__name__}"
        return None
'''


@pytest.mark.parametrize(
    ("patterns", "name", "exists"),
    [
        (("qwen3",), "qwen3:latest", True),
        (("qwen3:latest",), "QWEN3", True),
        (("qwen3*",), "qwen3:0.6b", True),
        (("qwen3",), "qwen3:0.6b", False),
        (("hf.co/org/*",), "hf.co/org/repo:Q4_K_M", True),
        (("hf.co/org/*",), "hf.co/other/repo:Q4_K_M", False),
        (("gpt-?",), "gpt-44", False),
        ((), "m", False),
        (None, "m", True),
    ],
)
def test_a_pattern_matches_a_name_in_every_spelling(patterns: tuple[str, ...] | None, name: str, exists: bool) -> None:
    assert Permit(patterns, pulls=True).allows((name,)) is exists


async def test_lists_have_only_the_models_that_exist_for_a_key() -> None:
    async with keyed() as proxy, proxy.connected() as client:
        await client.send(request("GET", "/models/sse", headers=[("x-api-key", FEW)]))
        assert (await client.head())[1] == 200
        events = b""
        while b'"team"' not in events:  # the last of those in the first batch
            events += await client.chunk()
        assert b'"a1"' in events and not any(name in events for name in (b'"b1"', b'"vb"', b'"big'))
        for path, (field, name) in LISTS.items():
            everyone = {item[name] for item in (await proxy.ask("GET", path, key=USER)).json()[field]}
            few = {item[name] for item in (await proxy.ask("GET", path, key=FEW)).json()[field]}
            assert {"a1", "b1", "team", "vb"} <= everyone and any(item.startswith("big") for item in everyone)
            assert few - {"mates"} == {"a1", "a2", "team"}, path
        shown = await proxy.ask("GET", "/running", key=FEW)
        assert shown.status == 200 and b"big" not in shown.body


async def test_another_model_is_answered_as_one_that_does_not_exist() -> None:
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"messages": MESSAGES},
        "/v1/completions": {"prompt": "x"},
        "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
        "/v1/messages/count_tokens": {"messages": MESSAGES},
        "/v1/responses": {"input": "x"},
        "/v1/embeddings": {"input": "x"},
        "/v1/rerank": {"query": "x", "documents": ["y"]},
        "/completion": {"prompt": "x"},
        "/tokenize": {"content": "x"},
        "/api/chat": {"messages": MESSAGES},
        "/api/generate": {"prompt": ""},
        "/api/embed": {"input": "x"},
        "/api/embeddings": {"prompt": "x"},
        "/api/show": {},
    }
    async with keyed() as proxy:
        await proxy.ask("GET", "/v1/models", key=ADMIN)
        seen = len(proxy.sent("/api/chat")) + len(proxy.sent(CHAT))
        for path, body in bodies.items():
            unknown = await proxy.ask("POST", path, {"model": "no-such", **body}, key=FEW)
            for name in FORBIDDEN:
                answer = await proxy.ask("POST", path, {"model": name, **body}, key=FEW)
                assert answer.status == unknown.status == 404, (path, name)
                assert answer.body.decode().replace(name, "no-such") == unknown.body.decode(), (path, name)
        for path in ("/props?model=", "/slots?model=", "/lora-adapters?model=", "/v1/models/"):
            unknown = await proxy.ask("GET", f"{path}no-such", key=FEW)
            for name in FORBIDDEN[:-1]:
                assert (await proxy.ask("GET", f"{path}{name}", key=FEW)).status == unknown.status == 404, path
        assert len(proxy.sent("/api/chat")) + len(proxy.sent(CHAT)) == seen


async def test_a_virtual_model_is_allowed_by_its_own_name_and_by_its_alias() -> None:
    async with keyed() as proxy:
        for model in ("a1", "a2", "team", "MATES"):
            assert (await proxy.chat(FEW, model)).status == 200, model
        assert [request.json()["model"] for request in proxy.sent(CHAT)] == ["a1", "a2", "b1", "b1"]


async def test_no_model_is_pulled_for_a_key_that_may_not() -> None:
    body = {"model": "qwen3:0.6b", "messages": MESSAGES}
    for may_pull in (False, True):
        async with keyed(server={"inference_keys": {"may_pull": may_pull}}) as proxy:
            answer = await proxy.ask("POST", CHAT, body, key=USER)
            assert bool(proxy.sent("/api/pull")) is may_pull
            if not may_pull:
                assert answer.status == 404 and "server.inference_keys.may_pull: true" in answer.error["message"]
                await proxy.ask("POST", CHAT, body, key=ADMIN)
                assert proxy.sent("/api/pull")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": MESSAGES, "stream": False}),
        ("/api/generate", {"prompt": "x", "stream": False}),
        ("/api/generate", {"prompt": "", "stream": False}),
    ],
)
async def test_keep_alive_of_a_key_without_that_right_is_ignored(path: str, body: dict[str, object]) -> None:
    asked = {"model": "big", "keep_alive": -1, **body}
    async with keyed() as proxy:
        for key, sent in ((USER, False), (ADMIN, True)):
            assert (await proxy.ask("POST", path, asked, key=key)).status == 200
            assert ("keep_alive" in proxy.sent(path)[-1].json()) is sent
    async with keyed(server={"inference_keys": {"may_keep_alive": True}}) as proxy:
        assert (await proxy.ask("POST", path, asked, key=USER)).status == 200
        assert proxy.sent(path)[-1].json()["keep_alive"] == -1


async def test_a_name_that_is_too_long_is_refused_and_not_kept() -> None:
    """What compares names keeps the last ones: they must not be as large as a body may be."""
    async with keyed() as proxy:
        for key in (FEW, USER):
            refused = await proxy.chat(key, "x" * 100_000)
            assert refused.status == 400 and "at most 512 characters" in refused.error["message"]


async def test_a_key_without_that_right_cannot_unload_a_model() -> None:
    async with keyed() as proxy:
        unload = {"model": "big", "keep_alive": 0, "stream": False}
        refused = await proxy.ask("POST", "/api/generate", unload, key=USER)
        assert refused.status == 403 and "server.inference_keys.may_keep_alive" in refused.json()["error"]
        assert not proxy.sent("/api/generate")
        assert (await proxy.ask("POST", "/api/generate", unload, key=ADMIN)).status == 200
        assert len(proxy.sent("/api/generate")) == 1


async def test_agents_that_a_key_may_not_call_are_unknown_to_it(tmp_path: Path) -> None:
    for name in "bcz":
        command = name if name != "z" else None
        write_agent(tmp_path, name, MARK.format(cls=name.upper(), name=name, command=command))
    async with keyed(agents_dirs=[str(tmp_path)], agents=["b", "c", "z", "help"]) as proxy:
        trails = []
        for key in (USER, FEW):
            for text in ("/b hi", "/c hi", "/b /c hi"):
                assert (await proxy.chat(key, text=text)).status == 200
                sent = proxy.sent(CHAT)[-1].json()
                trails.append((sent["trail"], sent["messages"][-1]["content"]))
        assert trails[:3] == [("zb", "hi"), ("zc", "hi"), ("zbc", "hi")]
        assert trails[3:] == [("zb", "hi"), ("z", "/c hi"), ("zb", "/c hi")]
        named = await proxy.chat(FEW, more=[("X-Agents", "c")])
        assert named.status == 400 and named.error["message"] == "unknown agent 'c'; known agents: b, help"
        assert (await proxy.chat(FEW, more=[("X-Agents", "b")])).status == 200
        helped = (await proxy.chat(FEW, text="/help")).json()["choices"][0]["message"]["content"]
        assert "/b" in helped and "/c" not in helped
        listed = [item["name"] for item in (await proxy.ask("GET", "/plugins", key=FEW)).json()]
        assert listed == ["b", "help"]


async def test_agents_ask_only_models_that_exist_for_the_key_and_the_one_of_the_chat(tmp_path: Path) -> None:
    write_agent(tmp_path, "side", SIDE)
    async with keyed(agents_dirs=[str(tmp_path)], agents=["side"]) as proxy:
        trails = []
        for key, model in ((USER, "a1"), (FEW, "a1"), (FEW, "team")):
            assert (await proxy.chat(key, model)).status == 200
            trails.append(proxy.sent(CHAT)[-1].json().get("trail"))
        assert trails == [None, " b1: ModelNotFound", None]


async def test_a_resumable_stream_is_that_of_its_key(fakes: Fakes) -> None:
    """The id that a client chooses is not one that another key can guess."""
    config = fakes.config({"m": fakes.model(fields={"resumable_streams": True})}, keep_alive=-1)
    async with served_here({**config, "server": {"api_keys": KEYS[:2]}}) as (_, port):
        proxy = Keyed(port, RawUpstream(b""))
        for key, own in ((USER, "user:x"), (ADMIN, "root:x")):
            assert (await proxy.chat(key, "m", more=[("X-Conversation-Id", "x")], stream=True)).status == 200
            assert fakes.events("request")[-1]["headers"]["x-conversation-id"] == own
            await proxy.ask("GET", "/v1/stream?conv_id=x&from=7&key=y", key=key)
            assert fakes.events("request")[-1]["path"] == f"/v1/stream?conv_id={own}&from=7"
            await proxy.ask("DELETE", "/v1/stream?conv_id=x&model=m", key=key)
            assert fakes.events("request")[-1]["path"] == f"/v1/stream?conv_id={own}&model=m"
            await proxy.ask("POST", "/v1/streams/lookup", {"conversation_ids": ["x"]}, key=key)
            assert json.loads(fakes.events("request")[-1]["body"]) == {"conversation_ids": [own]}
