"""The agent `parallel` on real llama.cpp, with two models: every strategy comes to an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support import raw_client
from tests.support.agent_clients import Way
from tests.support.e2e_support import CHAT, SMOLLM2, embedded, needs_llama_cpp, tiny
from tests.support.harness import Proxy, session_proxy

pytestmark = needs_llama_cpp
STREAM, WHOLE, OLLAMA = Way(CHAT, stream=True), Way(CHAT, stream=False), Way("/api/chat", stream=True)


@pytest.fixture(scope="module")
def proxy(tiny_models: dict[str, Path]) -> Iterator[Proxy]:
    models = {
        "smollm2": {**SMOLLM2, "parallel": 2, "args": ["-t", "1", "--metrics"]},
        "tiny": tiny(tiny_models["tiny-a"], parallel=2),
    }
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


async def figures(proxy: Proxy) -> dict[str, float]:
    """What SmolLM2's server has counted so far."""
    (told,) = [one for one in (await proxy.health())["instances"] if one["model"] == "smollm2"]
    key = psutil.Process(told["pid"]).environ()["LLAMA_API_KEY"]
    headers = [("Authorization", f"Bearer {key}")]
    answer = await raw_client.ask(told["port"], raw_client.request("GET", "/metrics", headers=headers, close=True))
    return {name: float(n) for name, n in re.findall(r"^llamacpp:(\w+) (\S+)$", answer.body.decode(), re.MULTILINE)}


async def test_the_prompt_of_samples_is_evaluated_once_and_they_differ(proxy: Proxy) -> None:
    question = f"{' '.join(map(str, range(50)))} Tell me a story."
    body = WHOLE.body(f"/parallel n=2 strategy=show {question}", model="smollm2", max_tokens=12, seed=1)
    before = await figures(proxy)
    answer = (await raw_client.post(proxy.port, CHAT, body)).json()
    after = await figures(proxy)
    evaluated, said = (after[name] - before[name] for name in ("prompt_tokens_total", "tokens_predicted_total"))
    prompt = answer["usage"]["prompt_tokens"]
    assert prompt > 100 and prompt - 50 < evaluated <= prompt, "how all prompts begin may be in the cache"
    assert said == answer["usage"]["completion_tokens"] == 24
    first, second = answer["choices"][0]["message"]["content"].removeprefix("### smollm2 #1").split("### smollm2 #2")
    assert first.strip() != second.strip()


@pytest.mark.parametrize("n", [2, 3])
async def test_one_model_is_sampled_also_more_often_than_it_has_slots(proxy: Proxy, n: int) -> None:
    body = STREAM.body(f"/parallel n={n} strategy=show Say hello.", model="smollm2", max_tokens=8)
    said = await STREAM.ask(proxy, body)
    assert said.error is None
    assert all(f"### smollm2 #{number}\n\n" in said.text for number in range(1, n + 1))


async def test_what_it_cost_is_the_sum(proxy: Proxy) -> None:
    """No answer to this ends by itself within four tokens."""
    one = {"model": "smollm2", "max_tokens": 4, "messages": [{"role": "user", "content": "Tell me a story."}]}
    alone = (await raw_client.post(proxy.port, CHAT, one)).json()["usage"]
    body = WHOLE.body("/parallel n=2 strategy=vote Tell me a story.", model="smollm2", max_tokens=4)
    both = (await raw_client.post(proxy.port, CHAT, body)).json()["usage"]
    assert both == {
        "prompt_tokens": alone["prompt_tokens"],
        "completion_tokens": 8,
        "total_tokens": both["total_tokens"],
    }
    assert both["total_tokens"] == both["prompt_tokens"] + 8


async def test_the_turn_after_a_command_finds_the_cached_prompt(proxy: Proxy) -> None:
    question = "Which of these is a fruit? " + ", ".join(f"thing {n}" for n in range(100))
    asked = [{"role": "user", "content": f"/parallel models=smollm2,tiny strategy=show {question}"}]
    body = {"model": "smollm2", "max_tokens": 8, "temperature": 0}
    first = (await raw_client.post(proxy.port, CHAT, {**body, "messages": asked})).json()
    answered = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    later = [*asked, answered, {"role": "user", "content": "Why?"}]
    timings = (await raw_client.post(proxy.port, CHAT, {**body, "messages": later})).json()["timings"]
    assert timings["cache_n"] > 300 and timings["prompt_n"] < 100, timings
