"""The hook after the end of an answer: it gets what the client got, and no client waits for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way, proxy_with_agents, write_agent
from tests.support.e2e_support import CHAT, Fakes, fakes, idle
from tests.support.harness import Proxy, session_proxy, until

__all__ = ["fakes"]
NOTES = """
import json
from pathlib import Path
NOTES = Path({path!r})
class Notes(Agent):
    command = "notes"
    per_call = frozenset({{"how"}})
    class Config(Options):
        how: str = ""
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        ctx.state["asked"] = request.last_user_text
        return say("of its own") if ctx.config.how == "answers" else None
    async def on_reply(self, reply: Reply, ctx: Context) -> None:
        if ctx.config.how == "raises":
            raise RuntimeError("on purpose")
        if ctx.config.how == "hangs":
            while not NOTES.with_name("go").exists():
                await asyncio.sleep(0.01)
        side = ""
        if ctx.config.how == "asks":
            asked = ChatRequest({{"model": "m", "messages": [{{"role": "user", "content": "x"}}]}})
            side = (await ctx.complete(asked)).text
        told = {{"text": reply.text, "thoughts": reply.reasoning, "complete": reply.complete, "usage": reply.usage,
                "finish": reply.finish_reason, "calls": reply.tool_calls, "side": side,
                "asked": ctx.state["asked"], "request": ctx.request.last_user_text, "model": ctx.asked_model,
                "user": ctx.user}}
        with NOTES.open("a") as file:
            file.write(json.dumps(told) + "\\n")
"""
LOUD = """
class Loud(Agent):
    command = "loud"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        chunk.text = chunk.text.upper()
        return chunk
"""


class Stage:
    """A proxy with the agents `notes` and `loud`, and what `notes` has written."""

    def __init__(self, proxy: Proxy, fakes: Fakes, notes: Path) -> None:
        self.proxy, self.fakes, self._notes, self._read = proxy, fakes, notes, 0

    async def noted(self) -> dict[str, Any]:
        """The next one."""
        await until(lambda: len(self._lines()) > self._read, what="the hook")
        self._read += 1
        found: dict[str, Any] = json.loads(self._lines()[self._read - 1])
        return found

    def let_go(self) -> None:
        self._notes.with_name("go").touch()

    def _lines(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    fakes = Fakes(tmp_path_factory.mktemp("afterwards"))
    folder, notes = fakes.folder / "agents", fakes.folder / "notes.jsonl"
    write_agent(folder, "notes", NOTES.format(path=str(notes)))
    write_agent(folder, "loud", LOUD)
    models: dict[str, Any] = {"m": fakes.model(fields={"parallel": 4}), "v": {"model": "m"}}
    with session_proxy(fakes.config(models, keep_alive=-1) | {"agents_dirs": [str(folder)]}) as proxy:
        yield Stage(proxy, fakes, notes)


async def test_it_gets_the_answer_as_the_client_got_it(stage: Stage) -> None:
    for way in WAYS:
        for command, text in (("/notes", "t0 t1 "), ("/notes /loud", "T0 T1 ")):
            said = await way.ask(
                stage.proxy, way.steered(command, model="v", tokens=2), [("Authorization", "Bearer k")]
            )
            assert (said.text, said.error) == (text, None), way
            noted = await stage.noted()
            assert (noted["text"], noted["complete"], noted["finish"]) == (text, True, "stop"), way
            assert noted["usage"]["completion_tokens"] == 2, way
            assert noted["model"] == "v" and noted["user"].startswith("key-") and "k" not in noted["user"][4:]
            assert noted["asked"] == noted["request"] and noted["asked"], way


async def test_a_stream_is_the_same_bytes_with_it(stage: Stage) -> None:
    for path in (CHAT, "/v1/messages"):
        way = Way(path, stream=True)
        manners: dict[str, Any] = {"tokens": 2, "tool_call": ["f", {"a": 1}], "pings": True}
        plain = await raw_client.post(stage.proxy.port, path, way.steered(**manners))
        heard = await raw_client.post(stage.proxy.port, path, way.steered("/notes", **manners))
        assert [line for line in plain.body.split(b"\n") if b"predicted_ms" not in line] == [
            line for line in heard.body.split(b"\n") if b"predicted_ms" not in line
        ]
        (call,) = (await stage.noted())["calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("f", {"a": 1})


async def test_it_gets_what_there_was_of_an_answer_that_was_broken_off(stage: Stage) -> None:
    way = Way(CHAT, stream=True)
    async with raw_client.connected(stage.proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, way.steered("/notes", tokens=5, stall_after=3)))
        await client.head()
        while b"t2" not in await client.chunk():
            pass
    noted = await stage.noted()
    assert (noted["text"], noted["complete"], noted["finish"]) == ("t0 t1 t2 ", False, "")
    await until(lambda: idle(stage.proxy), what="the model is free")
    said = await way.ask(stage.proxy, way.steered("/notes", tokens=5, error_after=2))
    assert said.error
    noted = await stage.noted()
    assert (noted["text"], noted["complete"]) == ("t0 t1 ", False)


async def test_it_gets_the_answers_of_agents_too_and_can_ask_models(stage: Stage) -> None:
    way = Way(CHAT, stream=False)
    assert (await way.ask(stage.proxy, way.body("/notes how=answers hi"))).text == "of its own"
    noted = await stage.noted()
    assert (noted["text"], noted["complete"]) == ("of its own", True) and noted["usage"]["completion_tokens"] == 0
    assert (await way.ask(stage.proxy, way.body("/notes how=asks hi"))).error is None
    assert (await stage.noted())["side"].startswith("t0 t1")


async def test_the_client_notices_nothing_of_it(stage: Stage) -> None:
    way = Way(CHAT, stream=True)
    async with raw_client.connected(stage.proxy.port) as client:  # which is used again meanwhile
        for text in ("/notes how=hangs hi", "hi"):
            await client.send(raw_client.request("POST", CHAT, way.body(text)))
            _, status, _ = await client.head()
            assert status == 200
            while await client.chunk():
                pass
    stage.let_go()
    assert (await stage.noted())["complete"] is True


async def test_a_failure_in_it_is_logged_and_a_proxy_that_stops_waits_for_it(fakes: Fakes) -> None:
    notes = fakes.folder / "notes.jsonl"
    way = Way(CHAT, stream=False)
    async with proxy_with_agents(fakes, {"notes": NOTES.format(path=str(notes))}, clean_log=False) as proxy:
        assert (await way.ask(proxy, way.body("/notes how=raises hi"))).error is None
        await until(lambda: "agent notes failed" in proxy.log, what="the line of the log")
        (fakes.folder / "go").touch()
        assert (await way.ask(proxy, way.body("/notes how=hangs hi"))).error is None
    assert json.loads(notes.read_text())["complete"] is True


@pytest.mark.parametrize(
    ("headers", "fields", "user"),
    [
        ([], {}, ""),
        ([("X-OpenWebUI-User-Id", "w")], {}, "w"),
        ([("X-OpenWebUI-User-Id", "w")], {"metadata": {"user_id": "m"}}, "m"),
        ([("X-OpenWebUI-User-Id", "w")], {"metadata": {"user_id": "m"}, "user": "u"}, "u"),
    ],
)
async def test_a_user_is_who_the_client_says(
    stage: Stage, headers: list[tuple[str, str]], fields: dict[str, Any], user: str
) -> None:
    way = Way(CHAT, stream=False)
    assert (await way.ask(stage.proxy, way.body("/notes hi", **fields), headers)).error is None
    assert (await stage.noted())["user"] == user


async def test_with_a_key_a_user_is_a_hash_of_it_in_whichever_header(stage: Stage) -> None:
    users = []
    for headers in ([("Authorization", "Bearer one")], [("X-Api-Key", "one")], [("X-Api-Key", "two")]):
        way = Way("/v1/messages", stream=False)
        await way.ask(stage.proxy, way.body("/notes hi", metadata={"user_id": "m"}), headers)
        users.append((await stage.noted())["user"])
    assert users[0] == users[1] != users[2] and "one" not in users[0]
