"""The token counts of answers that agents fold, cut short or take apart are those of the model's server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, write_agent
from tests.support.e2e_support import CHAT, Fakes, embedded, tiny
from tests.support.harness import Proxy, session_proxy

AGENTS = {
    "folds": """
class Folds(Agent):
    command = "folds"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        yield Chunk.of((await fold(stream)).text.upper())
""",
    "brief": """
class Brief(Agent):
    command = "brief"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        texts = 0
        async for chunk in stream:
            yield chunk
            texts += bool(chunk.text)
            if texts == 3:
                return
""",
    "satisfied": """
class Satisfied(Agent):
    command = "satisfied"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        async for chunk in stream:
            yield Chunk.of(chunk.text)
            if chunk.finish_reason:
                return
""",
    "once": """
class Once(Agent):
    '''Keeps its state in local variables, as for one answer.'''
    command = "once"
    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        yield Chunk.of("<")
        words = []
        async for chunk in stream:
            words += chunk.text.split()
            if words and words[-1] == ctx.config.until:
                break
        yield Chunk.of(" ".join(words))
        yield Chunk.of(">")
    per_call = frozenset({"until"})
    class Config(Options):
        until: str = ""
""",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("usage"))
    for name, source in AGENTS.items():
        write_agent(fakes.folder / "agents", name, source)
    config = fakes.config({"m": fakes.model(fields={"parallel": 4}, STRICT=1)}, keep_alive=-1)
    with session_proxy(config | {"agents_dirs": [str(fakes.folder / "agents")]}) as proxy:
        yield proxy, fakes


def counts(way: Way, body: bytes) -> tuple[int, int]:
    """Prompt and completion tokens as the client is told in the end."""
    names = ("prompt_tokens", "completion_tokens")
    if way.path.startswith("/api/"):
        names = ("prompt_eval_count", "eval_count")
    elif way.path in ("/v1/messages", "/v1/responses"):
        names = ("input_tokens", "output_tokens")
    found = [re.findall(rb'"%b": ?(\d+)' % name.encode(), body)[-1] for name in names]
    cached = re.findall(rb'"cache_read_input_tokens": ?(\d+)', body)  # of which Anthropic's input tokens are without
    return int(found[0]) + int(cached[-1] if cached else 0), int(found[1])


def asking(way: Way, text: str, **fields: Any) -> dict[str, Any]:
    body = way.body(text, **fields)
    return body | ({"stream_options": {"include_usage": True}} if way.stream and way.path.startswith("/v1/c") else {})


@pytest.mark.parametrize(
    ("command", "completion"),
    [("/folds", 8), ("/satisfied", 8), ("/brief /folds", 8), ("/folds /satisfied", 8), ("/brief", 3)],
)
async def test_the_counts_are_those_of_the_models_server(
    stage: tuple[Proxy, Fakes], command: str, completion: int
) -> None:
    proxy, _ = stage
    for way in WAYS:
        answer = await raw_client.post(proxy.port, way.path, asking(way, f"{command} hi"))
        assert answer.status == 200
        prompt, told = counts(way, answer.body)
        assert (prompt, told) == (1, completion) or (command == "/brief" and told >= 3 and prompt == 1), (
            way,
            answer.body,
        )


async def test_a_generator_hook_sees_one_choice_after_the_other(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    for path, stream in ((CHAT, True), (CHAT, False), ("/v1/completions", True), ("/v1/completions", False)):
        way = Way(path, stream)
        for command, words in (("/once", "t0#{} t1#{} t2#{}"), ("/once /folds", "T0#{} T1#{} T2#{}")):
            body = asking(way, f"{command} hi", n=3, max_tokens=3)
            answer = await raw_client.post(proxy.port, path, body)
            texts, ends = said(answer.body)
            assert texts == {n: f"<{words}>".replace("{}", str(n)) for n in range(3)}, (way, command)
            assert sorted(ends) == [0, 1, 2], "each of them has one end"
            assert counts(way, answer.body) == (1, 3)


async def test_a_hook_that_has_enough_of_one_choice_still_gets_the_others(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    way = Way(CHAT, stream=True)
    answer = await raw_client.post(proxy.port, CHAT, asking(way, "/once until=t1#1 hi", n=2, max_tokens=3))
    texts, ends = said(answer.body)
    assert texts == {0: "<t0#0 t1#0 t2#0>", 1: "<t0#1 t1#1>"} and sorted(ends) == [0, 1]


def said(body: bytes) -> tuple[dict[int, str], list[int]]:
    """The text of each choice, and the numbers of those that end, one for each end."""
    if body.startswith(b"{"):
        values = [json.loads(body)]
    else:
        values = [json.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    texts: dict[int, str] = {}
    ends = []
    for choice in (choice for value in values for choice in value["choices"]):
        delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        texts[choice["index"]] = texts.get(choice["index"], "") + (delta.get("content") or "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    return texts, ends


async def test_a_stopped_answer_has_the_prompt_tokens_that_llama_cpp_counts(
    tiny_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    write_agent(folder, "brief", AGENTS["brief"])
    config = embedded({"m": tiny(tiny_models["tiny-a"])}) | {"agents_dirs": [str(folder)]}
    with session_proxy(config) as proxy:
        for way in WAYS:
            limit = {"options": {"num_predict": 20}} if way.path.startswith("/api/") else {"max_tokens": 20}
            said = {}
            for command in ("", "/brief "):
                body = asking(way, f"{command}How are you today?") | limit
                answer = await raw_client.post(proxy.port, way.path, body)
                assert answer.status == 200
                said[command] = counts(way, answer.body)
            assert said[""][0] == said["/brief "][0] > 1, way
            assert 1 <= said["/brief "][1] <= 20, (
                f"{way}: it is stopped after three pieces, or the random model ends before"
            )
