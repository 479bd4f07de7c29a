"""The agent `parallel` on real llama.cpp, with two models: every strategy comes to an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import raw_client
from tests.agent_clients import Way
from tests.e2e_support import CHAT, SMOLLM2, embedded, needs_llama_cpp, tiny
from tests.harness import Proxy, session_proxy

pytestmark = needs_llama_cpp
STREAM, OLLAMA = Way(CHAT, stream=True), Way("/api/chat", stream=True)


@pytest.fixture(scope="module")
def proxy(tiny_models: dict[str, Path]) -> Iterator[Proxy]:
    models = {"smollm2": {**SMOLLM2, "parallel": 2}, "tiny": tiny(tiny_models["tiny-a"], parallel=2)}
    with session_proxy(embedded(models, size=2, keep_alive=-1) | {"agents": ["parallel"]}) as proxy:
        yield proxy


async def test_two_models_are_asked_and_both_are_shown(proxy: Proxy) -> None:
    body = STREAM.body("/parallel models=smollm2,tiny strategy=show Say hello.", model="smollm2", max_tokens=8)
    said = await STREAM.ask(proxy, body)
    assert said.error is None and said.finish == "stop"
    assert "### smollm2\n\n" in said.text and "### tiny\n\n" in said.text
    assert "Asking smollm2, tiny." in said.reasoning


async def test_two_models_grade_each_other(proxy: Proxy) -> None:
    body = STREAM.body("/parallel models=smollm2,tiny strategy=judge Say hello.", model="smollm2", max_tokens=8)
    said = await STREAM.ask(proxy, body)
    assert said.error is None and said.text
    assert "smollm2 has answered" in said.reasoning and "Grades: smollm2: " in said.reasoning


async def test_one_merges_what_both_have_said(proxy: Proxy) -> None:
    body = OLLAMA.body("/parallel models=smollm2,tiny Say hello.", model="smollm2", options={"num_predict": 8})
    said = await OLLAMA.ask(proxy, body)
    assert said.error is None and said.text and said.finish in ("stop", "length")
    assert "smollm2 merges 2 answers." in said.reasoning


@pytest.mark.parametrize("n", [2, 3])
async def test_one_model_is_sampled_also_more_often_than_it_has_slots(proxy: Proxy, n: int) -> None:
    body = STREAM.body(f"/parallel n={n} strategy=show Say hello.", model="smollm2", max_tokens=8)
    said = await STREAM.ask(proxy, body)
    assert said.error is None
    assert all(f"### smollm2 #{number}\n\n" in said.text for number in range(1, n + 1))


async def test_what_it_cost_is_the_sum(proxy: Proxy) -> None:
    one = {"model": "smollm2", "max_tokens": 4, "messages": [{"role": "user", "content": "Say hello."}]}
    alone = (await raw_client.post(proxy.port, CHAT, one)).json()["usage"]
    body = Way(CHAT, stream=False).body("/parallel n=2 strategy=vote Say hello.", model="smollm2", max_tokens=4)
    both = (await raw_client.post(proxy.port, CHAT, body)).json()["usage"]
    assert both["completion_tokens"] == 2 * alone["completion_tokens"] == 8
