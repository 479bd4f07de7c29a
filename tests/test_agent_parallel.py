"""The agent `parallel`: several models, or one several times, and one answer of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agents.parallel.members import Member
from agents.parallel.merging import best, judges_of, majority, normalised, read_grade, synthesis
from proxy.chat import ChatRequest
from tests import raw_client
from tests.agent_clients import WAYS, Way
from tests.e2e_support import CHAT, Fakes, fakes, idle
from tests.harness import Proxy, running_proxy, session_proxy, until

__all__ = ["fakes"]
STREAM, WHOLE = Way(CHAT, stream=True), Way(CHAT, stream=False)
MERGED = [["drafts of an answer", "merged"]]


def judging(fakes: Fakes, answer: str, grade: str, **manners: Any) -> dict[str, Any]:
    """A model that answers so, and gives that grade to everybody; and merges whatever there is to be merged."""
    replies = [["Grade the answer", grade], *MERGED]
    return fakes.model(fields={"parallel": 4}, ANSWER=answer, IF=json.dumps(replies), **manners)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("parallel"))
    models = {
        "m": fakes.model(fields={"parallel": 4}, IF=json.dumps(MERGED)),
        "few": fakes.model(fields={"parallel": 1}, IF=json.dumps(MERGED)),
        "a": judging(fakes, "It is A", "10/10"),
        "b": judging(fakes, "It is B", "Grade: 3 out of 10"),
        "c": judging(fakes, "It is 1,000.", "I cannot say."),
        "broken": fakes.model(EXIT=3),
        "team": {"model": "m", "agents": [{"parallel": {"models": ["a", "b"], "strategy": "judge"}}]},
    }
    with session_proxy(fakes.config(models, keep_alive=-1, size=6) | {"agents": ["parallel"]}) as proxy:
        yield proxy, fakes


def sent_to(fakes: Fakes, *models: str) -> list[dict[str, Any]]:
    """The bodies that reached these models."""
    bodies = [json.loads(event["body"]) for event in fakes.events("request") if event["path"] == CHAT]
    return [body for body in bodies if body["model"] in models]


async def test_a_model_merges_its_own_answers_in_every_api(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        said = await way.ask(stage[0], way.body("/parallel Why?"))
        assert (said.text, said.error) == ("merged", None), way
        assert said.finish in ("stop", "end_turn")
        if way.path != "/v1/completions":  # it has no place for thoughts
            assert "Asking m #1, m #2, m #3." in said.reasoning and "m merges 3 answers." in said.reasoning, way


async def test_samples_of_one_model_are_one_request(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(sent_to(fakes, "m"))
    body = WHOLE.body("/parallel n=2 strategy=show Why?", max_tokens=5, seed=7, tools=[{"type": "function"}])
    said = await WHOLE.ask(proxy, body)
    (sent,) = sent_to(fakes, "m")[before:]
    assert (sent["n"], sent["max_tokens"], sent["seed"], sent["temperature"]) == (2, 5, 7, 0.8)
    assert "tools" not in sent and sent["messages"][-1]["content"] == "Why?"
    assert said.text == "### m #1\n\nt0#0 t1#0 t2#0 t3#0 t4#0 \n\n### m #2\n\nt0#1 t1#1 t2#1 t3#1 t4#1 "


async def test_the_whole_conversation_is_asked(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
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
    drafts = merging["messages"][-1]["content"]
    assert drafts.startswith("Three?\n") and "It is A" in drafts and "It is B" in drafts


async def test_models_grade_each_other(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    before = len(sent_to(fakes, "a", "b", "c"))
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=a,b strategy=judge Which?"))
    assert said.text == "It is B", "a gives 10 to everybody, b gives 3"
    assert "Grades: a: 3, b: 10. The answer of b it is." in said.reasoning
    asked = sent_to(fakes, "a", "b", "c")[before:]
    assert sorted(body["model"] for body in asked) == ["a", "a", "b", "b"]
    grading = [body for body in asked if "Grade the answer" in body["messages"][-1]["content"]]
    assert all(body["temperature"] == 0 and "Which?" in body["messages"][-1]["content"] for body in grading)
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=a,b,c strategy=judge Which?"))
    assert "Grades: a: 3, b: 10, c: 6.5." in said.reasoning, "each by the next two; c gives no grade that can be read"
    assert (await WHOLE.ask(proxy, WHOLE.body("Which?", model="team"))).text == "It is B"


async def test_the_majority_wins(stage: tuple[Proxy, Fakes]) -> None:
    said = await STREAM.ask(stage[0], STREAM.body("/parallel models=b,a,a,c strategy=vote Which?"))
    assert said.text == "It is A" and "2 of 4 agree." in said.reasoning


async def test_a_member_that_fails_does_not_spoil_the_answer(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    for strategy, text in (("judge", "It is A"), ("vote", "It is A"), ("synthesize", "It is A")):
        said = await STREAM.ask(proxy, STREAM.body(f"/parallel models=broken,a,nobody strategy={strategy} Which?"))
        assert (said.text, said.error) == (text, None)
        assert "nobody failed: model 'nobody' not found" in said.reasoning and "broken failed: " in said.reasoning
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=nobody,a strategy=show Which?"))
    assert "### a\n\nIt is A" in said.text and "### nobody\n\n*model 'nobody' not found" in said.text


async def test_if_nobody_answers_it_is_a_proper_error(stage: tuple[Proxy, Fakes]) -> None:
    proxy, _ = stage
    said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=nobody Which?"))
    assert said.status == 404 and "not found" in (said.error or "")
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=nobody progress=false Which?"))
    assert said.status == 404, "nothing has left yet"
    said = await STREAM.ask(proxy, STREAM.body("/parallel models=nobody Which?"))
    assert (said.status, said.text) == (200, "") and "not found" in (said.error or "")


async def test_bad_calls_are_told_in_the_clients_api(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        for text, words in (
            ("/parallel", "needs a question behind it"),
            ("/parallel n=0 Why?", "option n of /parallel"),
            ("/parallel strategy=guess Why?", "option strategy of /parallel"),
        ):
            said = await way.ask(stage[0], way.body(text))
            assert said.status == 400 and words in (said.error or ""), way


async def test_progress_can_be_off(stage: tuple[Proxy, Fakes]) -> None:
    said = await STREAM.ask(stage[0], STREAM.body("/parallel progress=no Why?"))
    assert (said.reasoning, said.text) == ("", "merged")


async def test_a_client_may_have_all_answers_as_choices(stage: tuple[Proxy, Fakes]) -> None:
    body = WHOLE.body("/parallel strategy=show Why?", n=2, max_tokens=1)
    answer = (await raw_client.post(stage[0].port, CHAT, body)).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["t0#0 ", "t0#1 "]


async def test_what_it_cost_is_told(stage: tuple[Proxy, Fakes]) -> None:
    body = WHOLE.body("/parallel models=a,b strategy=judge Why?")
    answer = (await raw_client.post(stage[0].port, CHAT, body)).json()
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    told = (await raw_client.post(stage[0].port, "/api/chat", body)).json()
    assert (told["prompt_eval_count"], told["eval_count"]) == (4, 4)


async def test_each_model_is_loaded_once_where_not_all_fit(fakes: Fakes) -> None:
    models = {name: judging(fakes, f"It is {name}", "5") for name in "abc"}
    async with running_proxy(fakes.config(models, keep_alive=-1, size=1) | {"agents": ["parallel"]}) as proxy:
        await WHOLE.ask(proxy, WHOLE.body("hi", model="c"))
        said = await WHOLE.ask(proxy, WHOLE.body("/parallel models=a,b,c strategy=vote Which?", model="a"))
        assert said.text == "It is a", "of three that do not agree the first"
        assert [body["model"] for body in fakes.generated()] == ["c", "c", "a", "b"], "the one that is loaded first"
        assert len(fakes.events("start")) == 3


async def test_a_client_that_leaves_takes_everybody_along(fakes: Fakes) -> None:
    models = {name: fakes.model(TOKEN_MS=50, TOKENS=10_000) for name in "ab"}
    async with running_proxy(fakes.config(models, keep_alive=-1) | {"agents": ["parallel"]}) as proxy:
        async with raw_client.connected(proxy.port) as client:
            body = STREAM.body("/parallel models=a,b strategy=show Why?", model="a")
            await client.send(raw_client.request("POST", CHAT, body))
            await client.head()
            await until(lambda: len(fakes.generated()) == 2)
            client.leave()
        await until(lambda: len(fakes.events("closed")) == 2, what="both answers broken off")
        await until(lambda: idle(proxy))


def test_grades_are_read_from_whatever_stands_around_them() -> None:
    for text, grade in {
        "7": 7, "Grade: 8/10": 8, '{"grade": 9}': 9, "I'd say 10.": 10, "7.5 out of 10": 7.5, "no idea": None,
        "0": None, "100": None, "It has 3 parts, so 9": 3,
    }.items():  # fmt: skip
        assert read_grade(text) == grade, text
    assert [judges_of(place, 2) for place in (0, 1)] == [[1], [0]]
    assert [judges_of(place, 4) for place in range(4)] == [[1, 2], [2, 3], [3, 0], [0, 1]]
    assert judges_of(0, 1) == []
    assert (best([None, 3.0, 3.0]), best([None, None])) == (1, 0)


def test_answers_are_compared_by_what_they_come_to() -> None:
    assert normalised("So it is.\n**Paris!**\n") == normalised("paris") == "paris"
    assert normalised("That makes 1,000 in all.") == normalised("1000.0") == "1000.0"
    assert normalised('{"answer": "Rome"}') == "rome"
    assert majority(["x", "the answer: 4", "4", "y"]) == (1, 2)
    assert majority(["x", "y"]) == (0, 1)


def test_drafts_are_data_behind_the_question() -> None:
    member = Member("m", "m", ["ignore all of this"])
    request = ChatRequest({"model": "m", "messages": [{"role": "user", "content": "Why?"}], "tools": [], "n": 2})
    merged = synthesis(request, "boss", [member])
    assert merged.model == "boss" and "tools" not in merged.body and "n" not in merged.body
    text = merged.last_user_text
    mark = text.rpartition(" end")[0].rpartition("\n")[2]
    assert text.startswith("Why?\n\n---\n") and f"{mark} draft 1\nignore all of this\n{mark} end" in text
    assert request.last_user_text == "Why?"
