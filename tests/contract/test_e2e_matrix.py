"""Every API over every backend, streamed and not: what a client gets of a good answer, and of each kind of failure.

The cells are printed as a table at the end of the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import idle, matrix, steered
from tests.support.harness import until
from tests.support.speakers import SPEAKERS, Outcome, Speaker
from tests.support.stages import Stage

CHATS = {"/v1/chat/completions", "/v1/messages", "/api/chat"}
CALL = ["get_weather", {"city": "Oslo"}]
FINISHES = {"openai": "tool_calls", "ollama": "stop", "anthropic": "tool_use", "responses": "completed"}
REASONS = {"openai": "stop", "ollama": "stop", "anthropic": "end_turn", "responses": "completed"}
ENDS = {"openai": "200 [DONE]", "ollama": "200 done", "anthropic": "200 message_stop"}
ENDS["responses"] = "200 response.completed"
FAILS = {"openai": "200 error [DONE]", "ollama": "200 {error} cut off", "anthropic": "200 event: error"}
FAILS["responses"] = "200 error response.failed"


@dataclass
class Row:
    """One API over one backend, streamed or not."""

    stage: Stage
    speaker: Speaker
    model: str
    stream: bool

    @property
    def key(self) -> tuple[str, str, str]:
        backend = "llama.cpp" if self.model == "local" else "ollama"
        return self.speaker.name, backend, "stream" if self.stream else "whole"

    def note(self, column: str, shown: str) -> None:
        matrix.setdefault(self.key, {})[column] = shown

    async def told(self, **manners: Any) -> str:
        """Have the server answer so; the message that tells it, if it is one that reads messages."""
        if self.model == "local":
            return steered(**manners)
        theirs = {"refuse": "error", "token_ms": "token_s"}
        await self.stage.distant.set(
            **{theirs.get(name, name): value / 1000 if name == "token_ms" else value for name, value in manners.items()}
        )
        return "hi"

    async def ask(self, column: str, *, tools: bool = False, **manners: Any) -> Outcome:
        self.note(column, "FAILED")
        text = await self.told(**manners)
        body = self.speaker.body(self.model, text, stream=self.stream, tools=tools)
        return await self.speaker.ask(self.stage.proxy.port, body)

    def seen(self, kind: str) -> int:
        """How many requests there were at the server (`request`), or requests whose client had gone (`closed`)."""
        source = self.stage.local if self.model == "local" else self.stage.distant
        return sum(event["path"] in CHATS for event in source.events(kind))

    async def free(self) -> bool:
        """Whether nothing is held for anybody, of our processes and of the Ollama."""
        [remote] = (await self.stage.proxy.health())["remotes"]
        return await idle(self.stage.proxy) and remote["in_flight"] == 0


@pytest.fixture(params=["stream", "whole"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "stream")


@pytest.fixture(params=["local", "distant"], ids=["llama.cpp", "ollama"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(SPEAKERS))
def row(stage: Stage, request: pytest.FixtureRequest, model: str, streamed: bool) -> Row:
    return Row(stage, SPEAKERS[request.param], model, streamed)


async def test_a_plain_answer(row: Row) -> None:
    outcome = await row.ask("plain", tokens=3)
    form = ENDS[row.speaker.name] if row.stream else "200"
    assert outcome == Outcome(200, form, "t0 t1 t2 ", (), REASONS[row.speaker.name])
    row.note("plain", outcome.form)


async def test_a_tool_call(row: Row) -> None:
    outcome = await row.ask("tools", tools=True, tokens=2, tool_call=CALL)
    form = ENDS[row.speaker.name] if row.stream else "200"
    assert outcome == Outcome(200, form, "t0 t1 ", ((CALL[0], CALL[1]),), FINISHES[row.speaker.name])  # type: ignore[arg-type]
    row.note("tools", outcome.form)


async def test_an_error_before_the_first_byte(row: Row) -> None:
    outcome = await row.ask("refused", refuse=[500, "the model is unwell"])
    assert outcome == Outcome(500, "500 {error}", error="the model is unwell")
    row.note("refused", outcome.form)


async def test_an_error_in_mid_stream(row: Row) -> None:
    outcome = await row.ask("breaks off", tokens=4, error_after=2)
    assert outcome.error in ("fake failure", "an error was encountered while running the model: unexpected EOF")
    assert outcome.finish is None
    if row.stream:
        assert (outcome.form, outcome.text) == (FAILS[row.speaker.name], "t0 t1 ")
    else:
        assert outcome.status in (500, 502)
    row.note("breaks off", outcome.form)


async def test_a_client_that_leaves(row: Row) -> None:
    row.note("client leaves", "FAILED")
    asked, gone = row.seen("request"), row.seen("closed")
    text = await row.told(tokens=1000, token_ms=50)
    body = row.speaker.body(row.model, text, stream=row.stream)
    async with raw_client.connected(row.stage.proxy.port) as client:
        await client.send(raw_client.request("POST", row.speaker.path, body))
        if row.stream:
            assert (await client.head())[1] == 200
            while b"t0" not in await client.chunk():
                pass
        else:
            await until(lambda: row.seen("request") > asked, what="the request at the server")
        client.leave()
        left = time.monotonic()
        await until(lambda: row.seen("closed") > gone, what="the end of the upstream connection")
        took_ms = (time.monotonic() - left) * 1000
    await until(row.free, what="the lease to be free")
    row.note("client leaves", f"freed in {took_ms:.0f} ms")
