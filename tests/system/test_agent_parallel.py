"""The agent `parallel`: several models, or one several times, and one answer of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, DONE, Fakes, events_of, fakes, idle
from tests.support.harness import Proxy, running_proxy, session_proxy, until
from tests.support.ollamas import FakeOllama, running_ollama
from tests.support.stages import running

__all__ = ["fakes"]
STREAM, WHOLE = Way(CHAT, stream=True), Way(CHAT, stream=False)
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
MERGED = [["the one best answer", "merged"]]


def judging(fakes: Fakes, answer: str, grade: str, **manners: Any) -> dict[str, Any]:
    """A model that answers so, and gives that grade to everybody; and merges whatever there is to be merged."""
    replies = [["Grade the answer", grade], *MERGED]
    return fakes.model(fields={"parallel": 4}, ANSWER=answer, IF=json.dumps(replies), **manners)


@dataclass(frozen=True)
class Stage:
    """A proxy with models on the fake llama-server, and one, `distant`, on the fake Ollama."""

    proxy: Proxy
    fakes: Fakes
    ollama: FakeOllama


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    fakes = Fakes(tmp_path_factory.mktemp("parallel"))
    models = {
        "m": fakes.model(fields={"parallel": 4}, IF=json.dumps(MERGED)),
        "pair": fakes.model(fields={"parallel": 2}, STRICT=1),
        "few": fakes.model(fields={"parallel": 1}, STRICT=1, TOKEN_MS=20, IF=json.dumps(MERGED)),
        "a": judging(fakes, "It is A", "10/10"),
        "b": judging(fakes, "It is B", "Grade: 3 out of 10"),
        "c": judging(fakes, "It is 1,000.", "I cannot say."),
        "broken": fakes.model(EXIT=3),
        "endless": fakes.model(TOKEN_MS=50, TOKENS=100_000),
        "team": {"model": "m", "agents": [{"parallel": {"models": ["a", "b"], "strategy": "judge"}}]},
        "hasty": {"model": "m", "agents": [{"parallel": {"models": ["endless", "a", "b"], "member_s": 2}}]},
    }
    with running(running_ollama("distant")) as ollama:
        config = fakes.config(models, keep_alive=-1, size=8) | {"agents": ["parallel"]}
        config |= {"ollama": {"host": f"127.0.0.1:{ollama.port}", "pull": "never"}}
        with session_proxy(config) as proxy:
            yield Stage(proxy, fakes, ollama)


def sent_to(fakes: Fakes, *models: str) -> list[dict[str, Any]]:
    """The bodies that reached these models."""
    bodies = [json.loads(event["body"]) for event in fakes.events("request") if event["path"] == CHAT]
    return [body for body in bodies if body["model"] in models]


async def test_a_model_merges_its_own_answers_in_every_api(stage: Stage) -> None:
    for way in WAYS:
        said = await way.ask(stage.proxy, way.body("/parallel Why?"))
        assert (said.text, said.error) == ("merged", None), way
        assert said.finish in ("stop", "end_turn")
        if way.path != "/v1/completions":  # it has no place for thoughts
            assert "Asking m #1, m #2, m #3." in said.reasoning and "m merges 3 answers." in said.reasoning, way


async def test_samples_of_one_model_are_one_request(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    before = len(sent_to(fakes, "m"))
    body = WHOLE.body("/parallel n=2 strategy=show Why?", max_tokens=5, seed=7, tools=[{"type": "function"}])
    said = await WHOLE.ask(proxy, body)
    (sent,) = sent_to(fakes, "m")[before:]
    assert (sent["n"], sent["max_tokens"], sent["seed"], sent["temperature"]) == (2, 5, 7, 0.8)
    assert "tools" not in sent and sent["messages"][-1]["content"] == "Why?"
    assert said.text == "### m #1\n\nt0#0 t1#0 t2#0 t3#0 t4#0 \n\n### m #2\n\nt0#1 t1#1 t2#1 t3#1 t4#1 "


async def test_a_server_with_fewer_slots_is_asked_several_times(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    body = WHOLE.body("/parallel n=3 strategy=show Why?", model="few", max_tokens=1, seed=7)
    said = await WHOLE.ask(proxy, body)
    assert said.text.count("### few #") == 3
    assert [(body.get("n"), body["seed"]) for body in sent_to(fakes, "few")] == [(None, 7), (None, 8), (None, 9)]
    said = await WHOLE.ask(proxy, {**body, "model": "pair"})
    assert said.text.count("### pair #") == 3
    asked = [(body.get("n"), body["seed"]) for body in sent_to(fakes, "pair")]
    assert asked == [(2, 7), (None, 9)], "never over the number of its slots, which llama-server refuses"
    said = await WHOLE.ask(proxy, {**body, "model": "distant"})
    assert said.text.count("### distant:latest #") == 3
    sampled = [json.loads(event["body"])["options"] for event in stage.ollama.events("request", "/api/chat")]
    assert sampled[0]["seed"] == 7 and {options["seed"] for options in sampled} == {7, 8, 9}, "samples differ"
    assert all(options["temperature"] == 0.8 for options in sampled)


async def test_models_of_several_servers_take_part(stage: Stage) -> None:
    said = await WHOLE.ask(stage.proxy, WHOLE.body("/parallel models=distant,a,a strategy=vote Which?"))
    assert said.text == "It is A" and "Asking distant, a #1, a #2." in said.reasoning


async def test_one_model_can_be_named_and_asked_several_times(stage: Stage) -> None:
    before = len(sent_to(stage.fakes, "a"))
    said = await WHOLE.ask(stage.proxy, WHOLE.body("/parallel models=a n=2 strategy=vote Which?"))
    assert said.text == "It is A" and "2 of 2 agree." in said.reasoning
    (sent,) = sent_to(stage.fakes, "a")[before:]
    assert sent["n"] == 2
    await WHOLE.ask(stage.proxy, WHOLE.body("/parallel models=a strategy=vote Which?", temperature=0.1))
    assert (sent_to(stage.fakes, "a")[-1].get("n"), sent_to(stage.fakes, "a")[-1]["temperature"]) == (None, 0.1)


async def test_a_text_is_continued_by_each(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    of_path: dict[str, dict[str, Any]] = {"/v1/completions": {}, "/api/generate": {"raw": True}}
    for path, fields in of_path.items():
        before = len(fakes.events("request"))
        body = Way(path, stream=False).body("/parallel models=a,b chairman=m Once upon", **fields)
        said = await Way(path, stream=False).ask(proxy, body)
        assert said.text == "merged"
        events = [event for event in fakes.events("request")[before:] if event["method"] == "POST"]
        asked = [(event["path"], json.loads(event["body"])) for event in events]
        texts = [body for path, body in asked if path == "/v1/completions"]
        assert [body["prompt"] for body in texts] == ["Once upon", "Once upon"], path
        assert [body["model"] for path, body in asked if path == CHAT] == ["m"]


async def test_the_whole_conversation_is_asked(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
    ]
    messages = [*history, {"role": "user", "content": "/parallel models=a,b Three?"}]
    before = len(sent_to(fakes, "a", "b", "m"))
    answer = await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": messages})
    assert answer.json()["choices"][0]["message"]["content"] == "merged"
    first, second, merging = sent_to(fakes, "a", "b", "m")[before:]
    assert first["messages"] == second["messages"] == [*history, {"role": "user", "content": "Three?"}]
    assert merging["messages"][:3] == history
    assert merging["messages"][:4] == first["messages"], "the same prompt, as far as it goes"
    assert [merging["messages"][at]["content"] for at in (4, 6)] == ["It is A", "It is B"]


async def test_models_grade_each_other(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    before = len(sent_to(fakes, "a", "b", "c"))
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=a,b strategy=judge Which?"))
    assert said.text == "It is B", "a gives 10 to everybody, b gives 3"
    assert "Grades: a: 3, b: 10. Selected: b." in said.reasoning
    asked = sent_to(fakes, "a", "b", "c")[before:]
    assert sorted(body["model"] for body in asked) == ["a", "a", "b", "b"]
    grading = [body for body in asked if "Grade the answer" in body["messages"][-1]["content"]]
    assert all(body["temperature"] == 0 and "Which?" in body["messages"][-1]["content"] for body in grading)
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=a,b,c strategy=judge Which?"))
    assert "Grades: a: 3, b: 10, c: 6.5." in said.reasoning, "each by the next two; c gives no grade that can be read"
    assert (await WHOLE.ask(proxy, WHOLE.body("Which?", model="team"))).text == "It is B"


async def test_the_majority_wins(stage: Stage) -> None:
    said = await STREAM.ask(stage.proxy, STREAM.body("/parallel models=b,a,a,c strategy=vote Which?"))
    assert said.text == "It is A" and "2 of 4 agree." in said.reasoning


async def test_a_member_that_fails_does_not_spoil_the_answer(stage: Stage) -> None:
    proxy = stage.proxy
    for strategy, text in (("judge", "It is A"), ("vote", "It is A"), ("synthesize", "It is A")):
        said = await STREAM.ask(proxy, STREAM.body(f"/parallel models=broken,a,nobody strategy={strategy} Which?"))
        assert (said.text, said.error) == (text, None)
        assert "nobody failed: model 'nobody' not found" in said.reasoning and "broken failed: " in said.reasoning
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=nobody,a strategy=show Which?"))
    assert "### a\n\nIt is A" in said.text and "### nobody\n\n*model 'nobody' not found" in said.text


async def test_if_nobody_answers_it_is_a_proper_error(stage: Stage) -> None:
    proxy = stage.proxy
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=nobody Which?"))
    assert said.status == 404 and "not found" in (said.error or "")
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=nobody Which?"))
    assert said.status == 404, "nothing has left yet"
    said = await STREAM.ask(proxy, STREAM.body("/parallel chairman=nobody Which?"))
    assert said.status == 404, "there is nobody to merge"
    for strategy in ("vote", "show"):
        said = await STREAM.ask(proxy, STREAM.body(f"/parallel models=broken strategy={strategy} progress=0 Which?"))
        assert said.status == 503
        said = await STREAM.ask(proxy, STREAM.body(f"/parallel models=broken strategy={strategy} Which?"))
        assert (said.status, said.text) == (200, "") and said.error, "the news that it is being asked have left"


async def test_with_too_few_answers_it_fails_as_the_first_that_failed(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    before = len(sent_to(fakes, "a"))
    for strategy in ("synthesize", "judge", "vote", "show"):
        body = WHOLE.body(f"/parallel models=a,nobody quorum=2 strategy={strategy} Which?")
        assert (await WHOLE.ask(proxy, body)).status == 404
    assert len(sent_to(fakes, "a")) == before, "nobody is asked in vain"
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=a,broken quorum=2 strategy=vote Which?"))
    assert said.status == 503
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=a,b,broken quorum=2 strategy=vote Which?"))
    assert said.text == "It is A"


async def test_one_that_takes_too_long_is_left_behind(stage: Stage) -> None:
    proxy, fakes = stage.proxy, stage.fakes
    for model in ("a", "b", "endless"):  # loaded, so that the seconds are the model's own
        await raw_client.post(proxy.port, CHAT, WHOLE.steered(model=model, tokens=1))
    gone = len(fakes.events("closed"))
    async with raw_client.connected(proxy.port) as client:
        body = STREAM.body("/parallel chairman=endless Which?", model="hasty")
        await client.send(raw_client.request("POST", CHAT, body))
        await client.head()
        shown = b""
        while b"t1 " not in shown:  # of who merges, and goes on
            shown += await client.chunk()
        assert b"endless failed: no answer within 2 s" in shown and b"endless merges 2 answers." in shown
        await until(lambda: len(fakes.events("closed")) == gone + 1, what="the end of its own answer")
        client.leave()
    await until(lambda: len(fakes.events("closed")) == gone + 2)


async def test_bad_calls_are_told_in_the_clients_api(stage: Stage) -> None:
    for way in WAYS:
        for text, words in (
            ("/parallel", "requires a question after it"),
            ("/parallel n=0 Why?", "option n of /parallel"),
            ("/parallel strategy=guess Why?", "option strategy of /parallel"),
        ):
            said = await way.ask(stage.proxy, way.body(text))
            assert said.status == 400 and words in (said.error or ""), way


async def test_progress_can_be_off(stage: Stage) -> None:
    said = await STREAM.ask(stage.proxy, STREAM.body("/parallel progress=no Why?"))
    assert (said.reasoning, said.text) == ("", "merged")


async def test_drafts_are_sources_of_the_answer_in_open_webui(stage: Stage) -> None:
    async def drafts(call: str, *headers: tuple[str, str], way: Way = STREAM) -> list[Any]:
        answer = await raw_client.post(stage.proxy.port, CHAT, way.body(f"/parallel {call} Why?"), headers=headers)
        if way is WHOLE:
            return [answer.json()["event"]] if "event" in answer.json() else []
        events = [json.loads(event) for event in events_of(answer.body) if event != DONE]
        return [event["event"] for event in events if "event" in event]

    open_webui = ("X-OpenWebUI-Chat-Id", "6f5e")
    texts = (("a #1", "It is A"), ("a #2", "It is A"), ("c", "It is 1,000."))
    expected = [{"source": {"name": name}, "document": [text], "metadata": [{"source": name}]} for name, text in texts]
    for strategy in ("synthesize", "judge", "vote"):
        found = await drafts(f"models=a,a,broken,c strategy={strategy}", open_webui)
        assert found == [{"type": "source", "data": data} for data in expected], strategy
    assert await drafts("models=a,c strategy=show", open_webui) == [], "they are the answer"
    assert await drafts("models=a,broken", open_webui) == [], "it is the answer"
    assert await drafts("models=a,c") == [] == await drafts("models=a,c", open_webui, way=WHOLE)


@pytest.mark.parametrize("way", [way for way in WAYS if way.path in (CHAT, "/api/chat")], ids=lambda way: way.name)
async def test_no_model_gets_the_progress_of_an_earlier_turn(stage: Stage, way: Way) -> None:
    said = await way.ask(stage.proxy, way.body("/parallel Why?"))
    assert "Asking m #1" in said.reasoning
    ours = "thinking" if way.path == "/api/chat" else "reasoning_content"
    answer = {"role": "assistant", "content": said.text, ours: said.reasoning}
    first, then = ({"role": "user", "content": text} for text in ("/parallel Why?", "And then?"))
    before = len(sent_to(stage.fakes, "m"))
    await way.ask(stage.proxy, {**way.body("?"), "messages": [first, answer, then]})
    (sent,) = sent_to(stage.fakes, "m")[before:]
    assert sent["messages"] == [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "merged"}, then]


async def test_a_client_may_have_all_answers_as_choices(stage: Stage) -> None:
    body = WHOLE.body("/parallel strategy=show Why?", n=2, max_tokens=1)
    answer = (await raw_client.post(stage.proxy.port, CHAT, body)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["t0#0 ", "t0#1 "]
    body = WHOLE.body("/parallel models=nobody,a strategy=show Why?", n=2)
    answer = (await raw_client.post(stage.proxy.port, CHAT, body)).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert "not found" in texts[0] and texts[1] == "It is A", "one for each of the models"
    answer = (await raw_client.post(stage.proxy.port, CHAT, WHOLE.body("/parallel strategy=show Why?", n=99))).json()
    assert "at most 16 answers" in answer["error"]["message"]
    said = await WHOLE.ask(stage.proxy, WHOLE.body("/parallel models=a,b strategy=vote Why?", n=2))
    assert said.text == "It is A", "one answer is made of all"


async def test_what_it_cost_is_told(stage: Stage) -> None:
    body = WHOLE.body("/parallel models=a,b strategy=judge Why?")
    answer = (await raw_client.post(stage.proxy.port, CHAT, body)).json()
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    events = events_of((await raw_client.post(stage.proxy.port, CHAT, body | STREAMED)).body)
    assert json.loads(events[-2])["usage"]["total_tokens"] == 8 and events[-1] == DONE
    merged = await raw_client.post(stage.proxy.port, CHAT, WHOLE.body("/parallel models=a,b Why?"))
    assert merged.json()["usage"]["total_tokens"] == 6, "with who merges"
    told = (await raw_client.post(stage.proxy.port, "/api/chat", body)).json()
    assert (told["prompt_eval_count"], told["eval_count"]) == (4, 4)


async def test_each_model_is_loaded_once_where_not_all_fit(fakes: Fakes) -> None:
    models = {name: judging(fakes, f"It is {name}", "5") for name in "abc"}
    async with running_proxy(fakes.config(models, keep_alive=-1, size=1) | {"agents": ["parallel"]}) as proxy:
        await WHOLE.ask(proxy, WHOLE.body("hi", model="c"))
        said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=a,b,c strategy=vote Which?", model="a"))
        assert said.text == "It is a", "of three that do not agree the first"
        assert [body["model"] for body in fakes.generated()] == ["c", "c", "a", "b"], "the one that is loaded first"
        assert len(fakes.events("start")) == 3
        said = await STREAM.ask(proxy, STREAM.body("/parallel models=a,b,c chairman=a Which?", model="a"))
        assert said.text == "merged" and "Asking b; then c; then a." in said.reasoning, "who merges comes last"
        assert len(fakes.events("start")) == 5
        await STREAM.ask(proxy, STREAM.body("/parallel models=a,b strategy=judge Which?", model="a"))
        assert len(fakes.events("start")) == 7, "b; and then, as it is loaded, b grades before a"


async def test_a_client_that_leaves_takes_everybody_along(fakes: Fakes) -> None:
    models = {name: fakes.model(TOKEN_MS=50, TOKENS=10_000) for name in "ab"}
    async with running_proxy(fakes.config(models, keep_alive=-1) | {"agents": ["parallel"]}) as proxy:
        async with raw_client.connected(proxy.port) as client:
            body = STREAM.body("/parallel models=a,b strategy=show Why?", model="a")
            await client.send(raw_client.request("POST", CHAT, body))
            await client.head()
            shown = b""
            while b"t5 " not in shown:  # while both go on
                shown += await client.chunk()
            assert shown.count(b"###") == 1, "the other one is shown when its turn has come"
            await until(lambda: len(fakes.generated()) == 2)
            client.leave()
        await until(lambda: len(fakes.events("closed")) == 2, what="both answers broken off")
        await until(lambda: idle(proxy))
