"""What Open WebUI shows while a person waits, and what its own prompts about the chat (titles, follow-ups) cost.

Requests are those of Open WebUI 0.12.4, in its order.
"""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy.stream import waiting
from tests.support import raw_client
from tests.support.e2e_support import CHAT, Fakes, Gate, events_of, fakes, gate
from tests.support.here import served_here
from tests.support.speakers import SPEAKERS

__all__ = ["fakes", "gate"]  # fixtures
HEADERS = [
    ("User-Agent", "Python/3.11 aiohttp/3.14.5"),
    ("X-OpenWebUI-User-Id", "f98ba11d"),
    ("X-OpenWebUI-Chat-Id", "05f892f3"),
]
TITLE = (
    "### Task:\nGenerate a concise title summarizing the chat history.\n### Guidelines:\n- Keep it short.\n"
    "### Chat History:\n<chat_history>\nUSER: /parallel on\nASSISTANT: \n</chat_history>"
)
FOLLOW_UPS = (
    "### Task:\nPredict 3-5 useful messages this user might naturally send next to advance their current objective.\n"
    "### Guidelines:\n- Suggest concrete actions.\n### Chat History:\n<chat_history>\nUSER: hi\n</chat_history>"
)
WAIT_S = 20
both_apis = pytest.mark.parametrize("path", [SPEAKERS["openai"].path, SPEAKERS["ollama"].path])


def asked(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def test_a_wait_of_20_s_shows_something_new_every_2_s(
    fakes: Fakes, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second is one look at what there is to show."""
    shown: list[str] = []
    look = waiting.Wait.look

    def one_second(wait: waiting.Wait, now: float) -> bool:
        again = look(wait, 1000.0 + len(shown))
        shown.append(wait._shown)
        if len(shown) == WAIT_S:
            gate.open()
        return again

    monkeypatch.setattr(waiting, "LOOK_S", 0.05)
    monkeypatch.setattr(waiting.Wait, "look", one_second)
    async with served_here(fakes.config({"slow": fakes.model(LOAD_UNTIL=gate)})) as (_, port):
        body = asked("slow", "hi", stream=True, stream_options={"include_usage": True})
        answer = await raw_client.post(port, CHAT, body, headers=HEADERS)
    assert len(shown) >= WAIT_S and all(shown)
    assert all(now != earlier for earlier, now in zip(shown, shown[2:], strict=False)), shown
    sent = [event for event in events_of(answer.body) if b'"status"' in event]
    assert len(sent) > WAIT_S / 2 and b'"hidden":true' in sent[-1]
    assert events_of(answer.body).index(sent[-1]) == len(sent) - 1, "in front of the answer"


@both_apis
@pytest.mark.parametrize("model", ["plain", "team"])
async def test_prompts_about_a_chat_are_not_asked_by_parallel(fakes: Fakes, path: str, model: str) -> None:
    models = {"plain": fakes.model(), "team": {"model": "plain", "agents": [{"parallel": {"n": 2}}]}}
    async with served_here(fakes.config(models) | {"agents": ["parallel"]}) as (_, port):
        switched = await raw_client.post(port, path, asked(model, "/parallel on", stream=False), headers=HEADERS)
        assert b"/parallel is on" in switched.body
        for text in (TITLE, FOLLOW_UPS):
            before = len(fakes.generated())
            answer = await raw_client.post(port, path, asked(model, text, stream=False), headers=HEADERS)
            assert answer.status == 200 and b"Asking" not in answer.body
            assert [body.get("n") for body in fakes.generated()[before:]] == [None], text
        await raw_client.post(port, path, asked(model, "Why?", stream=False), headers=HEADERS)
        assert len(fakes.generated()) > 3, "a person's question is"
