"""What agents leave alone: the requests of others, and in their own what only the client's API can express."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import Way, write_agent
from tests.support.e2e_support import Fakes
from tests.support.harness import Proxy, session_proxy

QUIET = """
class Quiet(Agent):
    '''Looks at the request.'''
    command = "quiet"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        request.messages
        return None
"""
READS = """
class Reads(Agent):
    '''Looks at the answer.'''
    command = "reads"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        return chunk
"""
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a"}}
SEARCH = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "x"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": [{"type": "web_search_result"}]}
ODD: list[dict[str, Any]] = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "search_result", "source": "http://x", "title": "X", "content": []}, PDF]},
    {"role": "assistant", "content": [SEARCH, FOUND, {"type": "text", "text": "found"}, USE]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "tool_reference"}, PDF]},
        {"type": "never_heard_of", "x": [1]},
        {"type": "text", "text": "go on"},
    ]},
]  # fmt: skip
TOOLS = [{"type": "web_search_20250305", "name": "web_search"}, {"name": "read", "input_schema": {"type": "object"}}]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("untouched"))
    folder = fakes.folder / "agents"
    for name, source in (("quiet", QUIET), ("reads", READS)):
        write_agent(folder, name, source)
    models = {"m": fakes.model(fields={"parallel": 4}), "q": {"model": "m", "agents": ["quiet"]}}
    models["r"] = {"model": "m", "agents": ["reads", "quiet"]}
    with session_proxy(fakes.config(models, keep_alive=-1) | {"agents_dirs": [str(folder)]}) as proxy:
        yield proxy, fakes


def received(fakes: Fakes) -> str:
    """The body of the last chat that the model's server got."""
    found: str = [event["body"] for event in fakes.events("request") if "messages" in event["body"]][-1]
    return found


def odd(model: str, *, stream: bool) -> dict[str, Any]:
    fields = {"max_tokens": 8, "stream": stream, "tools": TOOLS, "new_field": {"a": None}}
    return {"model": model, **fields, "messages": ODD}


async def test_a_request_that_no_agent_touches_is_never_decoded(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    way = Way("/v1/messages", stream=False)
    switched = await way.ask(proxy, way.body("/quiet on"), [("X-Chat-Id", "another")])
    assert switched.text.startswith("/quiet is on")
    bodies = [odd("m", stream=False), {"model": "m", "metadata": 5, "messages": [{"role": "robot"}]}]
    for body in bodies:
        for text in ("", "/unknown hi", "/etc/hosts"):
            body["messages"] = [*body["messages"], {"role": "user", "content": text}]
            sent = json.dumps(body, separators=(",", ":"))
            answer = await raw_client.post(proxy.port, "/v1/messages", body)
            assert answer.status == 200, answer.body
            assert received(fakes) == sent, "not even the bytes differ"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["q", "r"])
async def test_what_only_the_clients_api_can_express_passes_agents(
    stage: tuple[Proxy, Fakes], model: str, stream: bool
) -> None:
    proxy, fakes = stage
    way = Way("/v1/messages", stream)
    said = await way.ask(proxy, odd(model, stream=stream))
    assert (said.status, said.error, said.text[:3]) == (200, None, "t0 ")
    body = json.loads(received(fakes))
    if model == "r":  # answers are always read as streams
        body["stream"] = stream
    assert body == odd("m", stream=stream)


async def test_a_command_beside_what_cannot_be_translated_is_taken_out(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    body = odd("m", stream=False)
    asked = [PDF, {"type": "text", "text": "/QUIET what is this?"}]
    answer = await raw_client.post(
        proxy.port, "/v1/messages", body | {"messages": [{"role": "user", "content": asked}]}
    )
    assert answer.status == 200
    sent = json.loads(received(fakes))["messages"][-1]["content"]
    assert sent == [PDF, {"type": "text", "text": "what is this?"}]


async def test_the_field_that_names_agents_does_not_reach_the_server(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    values: tuple[Any, ...] = (False, [], True)
    for value in values:
        answer = await raw_client.post(proxy.port, "/v1/messages", odd("m", stream=False) | {"agents": value})
        assert answer.status == 200
        assert json.loads(received(fakes)) == odd("m", stream=False)
