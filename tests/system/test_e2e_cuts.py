"""An answer of a server that is cut off anywhere, for every API over every backend, is never a silent success.

What the client then has is the beginning of the answer, and the error in the one form that its API has for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from tests.support.e2e_support import steered
from tests.support.harness import Proxy, running_proxy
from tests.support.speakers import SPEAKERS, Outcome, Speaker
from tests.support.stages import Stage
from tests.support.toxic import LAST_CHUNK, Link, Request, chunk, head, plain, raw_upstream

TEXT = "t0 t1 t2 "
NDJSON = head(200, (("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")))
LISTED = json.dumps({"models": [{"name": "m:latest", "model": "m:latest"}]}).encode()
LINES = [
    *({"model": "m", "message": {"role": "assistant", "content": f"t{n} "}, "done": False} for n in range(3)),
    {"model": "m", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"},
]
FRAMES = [chunk(json.dumps(line, separators=(",", ":")).encode() + b"\n") for line in LINES] + [LAST_CHUNK]
FINISHES = {"openai": "stop", "ollama": "stop", "anthropic": "end_turn", "responses": "completed"}
QUICK, ALL = [0, 1, 20, -3, -1], [0, 1, 2, 4, 8, 20, 40, 60, -8, -4, -3, -2, -1]
each_api = pytest.mark.parametrize("speaker", [pytest.param(speaker, id=name) for name, speaker in SPEAKERS.items()])
each_extent = pytest.mark.parametrize("places", [QUICK, pytest.param(ALL, marks=pytest.mark.full)], ids=["few", "all"])


@dataclass(frozen=True)
class Cut:
    """After `frames` chunks of a stream of `of`, and `place` bytes of the next one (or all but so many).

    `by` is how: the connection is closed or reset, or the body ends properly, as if that were all.
    """

    frames: int
    place: int
    by: str
    of: int
    finish: int = 99
    """The chunk with the finish reason, if others follow it."""

    @property
    def whole(self) -> bool:
        """Whether all is there but the end of the body, or of its last chunk; or the body ended after the finish
        reason, as that of servers that send no `[DONE]`."""
        finished = self.by == "end" and self.frames > self.finish
        return finished or self.frames == self.of or (self.frames == self.of - 1 and self.place in (-1, -2))


def cuts(places: list[int], frames: int) -> list[Cut]:
    """Within every frame and between any two; there the body may also end as it should. The last one is short."""
    found = [Cut(n, place, "", frames) for n in range(frames) for place in places if n < frames - 1 or place <= 8]
    broken = [replace(cut, by=by) for by in ("close", "reset") for cut in [*found, Cut(frames, 0, "", frames)]]
    return broken + [Cut(n, 0, "end", frames) for n in range(frames)]


def check(speaker: Speaker, outcome: Outcome, cut: Cut, *, stream: bool) -> None:
    """The client must know, unless everything had come."""
    assert TEXT.startswith(outcome.text), cut
    if cut.whole:
        assert outcome.error or (outcome.text, outcome.finish) == (TEXT, FINISHES[speaker.name]), cut
        return
    assert outcome.error, (cut, outcome)
    begun = stream and (cut.frames or cut.place or cut.by == "end")
    assert outcome.status in ((200, 502) if begun else (502,)), (cut, outcome)


@pytest.fixture
async def ollama() -> AsyncIterator[Proxy]:
    """A proxy over an Ollama that cuts its answers where their question says so."""

    async def script(link: Link, request: Request) -> None:
        if not request.line.startswith("POST"):
            return await link.send(plain(LISTED if "version" not in request.line else b'{"version":"0.13.0"}'))
        frames, place, by = json.loads(request.json()["messages"][-1]["content"])
        await link.send(NDJSON + b"".join(FRAMES[:frames]) + FRAMES[frames][:place])
        if by == "end":
            return await link.send(LAST_CHUNK)
        getattr(link, by)()

    async with raw_upstream(script) as upstream:
        config = {"backend": "ollama", "ollama": {"host": f"127.0.0.1:{upstream.port}"}}
        async with running_proxy(config) as proxy:
            yield proxy


@each_extent
@each_api
async def test_a_llama_server_that_breaks_off_anywhere_is_no_silent_success(
    stage: Stage, speaker: Speaker, places: list[int]
) -> None:
    async def ask(cut: Cut, stream: bool) -> None:
        cut = cut if speaker.name == "anthropic" else replace(cut, finish=4)
        text = steered(tokens=3, cut_at=[cut.frames, cut.place], cut_by=cut.by)
        outcome = await speaker.ask(stage.proxy.port, speaker.body("local", text, stream=stream))
        check(speaker, outcome, cut, stream=stream)

    # role, three tokens, the finish, [DONE]; with usage one more. /v1/messages has no [DONE].
    translated = speaker.name in ("ollama", "responses")
    frames = 7 if translated else 6
    both = [True, False] if translated else [True]  # a whole answer of the server is in test_relay_errors
    await asyncio.gather(*(ask(cut, stream) for stream in both for cut in cuts(places, frames)))


@each_extent
@each_api
async def test_an_ollama_that_breaks_off_anywhere_is_no_silent_success(
    ollama: Proxy, speaker: Speaker, places: list[int]
) -> None:
    async def ask(cut: Cut, stream: bool) -> None:
        body = speaker.body("m", json.dumps([cut.frames, cut.place, cut.by]), stream=stream)
        check(speaker, await speaker.ask(ollama.port, body), cut, stream=stream)

    both = [True] if speaker.name == "ollama" else [True, False]
    await asyncio.gather(*(ask(cut, stream) for stream in both for cut in cuts(places, len(LINES))))
