"""The decisions of the agent `rag`, as tables; queries, and what a model is asked for them."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy import ChatRequest, Found, Passage
from llama_smart_proxy.agents.rag.grading import any_of, as_probabilities, grade_request, read_grades, regraded
from llama_smart_proxy.agents.rag.loop import Do, Situation, Verdict, begins_round, next_step, verdict_of
from llama_smart_proxy.agents.rag.queries import follows_on, read_query, rewriting, self_contained

GOOD, UNSURE, BAD = Verdict.CORRECT, Verdict.AMBIGUOUS, Verdict.INCORRECT


def situation(has_own: bool, has_web: bool, **fields: Any) -> Situation:
    return Situation(has_own, has_web, **{"rounds": 2, **fields})


@pytest.mark.parametrize(
    ("now", "step"),
    [
        (situation(True, True), Do.SEARCH),
        (situation(True, False), Do.SEARCH),
        (situation(True, True, own=GOOD), Do.FINISH),
        (situation(True, True, own=UNSURE), Do.WEB),
        (situation(True, True, own=UNSURE, pages=BAD), Do.FINISH),
        (situation(True, False, own=UNSURE), Do.FINISH),
        (situation(True, True, own=BAD), Do.REWRITE),
        (situation(True, True, own=BAD, rewritten=True), Do.WEB),
        (situation(True, True, own=BAD, exhausted=True), Do.WEB),
        (situation(True, True, own=BAD, rewritten=True, pages=GOOD), Do.FINISH),
        (situation(True, True, own=BAD, rewritten=True, pages=UNSURE), Do.FINISH),
        (situation(True, True, own=BAD, rewritten=True, pages=BAD), Do.REWRITE),
        (situation(True, True, own=BAD, rewritten=True, pages=BAD, round=2), Do.FINISH),
        (situation(True, True, own=BAD, rewritten=True, pages=BAD, exhausted=True), Do.FINISH),
        (situation(True, False, own=BAD), Do.REWRITE),
        (situation(True, False, own=BAD, round=2, rewritten=True), Do.FINISH),
        (situation(True, False, own=BAD, exhausted=True), Do.FINISH),
        (situation(True, False, own=BAD, rounds=1), Do.FINISH),
        (situation(False, True), Do.REWRITE),
        (situation(False, True, rewritten=True), Do.WEB),
        (situation(False, False), Do.FINISH),
        (situation(False, False, own=GOOD), Do.FINISH),
    ],
)
def test_each_situation_has_its_step(now: Situation, step: Do) -> None:
    assert next_step(now) is step


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("web", [True, False])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_search_that_finds_nothing_ends_after_its_rounds(own: bool, web: bool, rounds: int) -> None:
    now, searches = situation(own, web, rounds=rounds), 0
    while (step := next_step(now)) is not Do.FINISH:
        searches += step in (Do.SEARCH, Do.WEB)
        if step is Do.REWRITE:
            now = now.next_round() if begins_round(now) else Situation(
                own, web, rounds, now.round, now.own, now.pages, rewritten=True
            )  # fmt: skip
        else:
            found = {"own": BAD} if step is Do.SEARCH else {"pages": BAD}
            now = Situation(**{name: getattr(now, name) for name in Situation.__slots__} | found)
    assert searches == rounds * (own + web)


@pytest.mark.parametrize(
    ("confidence", "verdict"), [(1, GOOD), (0.7, GOOD), (0.69, UNSURE), (0.3, UNSURE), (0.29, BAD), (0, BAD)]
)
def test_two_thresholds_make_three_verdicts(confidence: float, verdict: Verdict) -> None:
    assert verdict_of(confidence, lower=0.3, upper=0.7) is verdict


# -- queries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "follows"),
    [
        ("and on Windows?", True),
        ("What about the second model", True),
        ("Windows?", True),
        ("How do I uninstall it?", True),
        ("Und unter Windows?", True),
        ("et sur Windows ?", True),
        ("How do I configure a reverse proxy for the server?", False),
        ("What is the default port of the proxy?", False),
        ("Andorra has how many inhabitants?", False),
        ("If a model is loaded with the option that keeps it in memory, how can I still unload it by hand?", False),
    ],
)
def test_a_question_about_what_was_said_before_is_recognised(question: str, follows: bool) -> None:
    assert follows_on(question) is follows


@pytest.mark.parametrize(
    ("question", "earlier", "query"),
    [
        ("and on Windows?", ["How do I install foo?"], "How do I install foo? and on Windows?"),
        ("and on Windows?", [], "and on Windows?"),
        ("and on BSD?", ["and on Windows?", "How do I install foo?"], "How do I install foo? and on BSD?"),
        ("How large is the\n  cache by default?", ["How do I install foo?"], "How large is the cache by default?"),
    ],
)
def test_a_question_that_follows_on_is_searched_for_with_the_one_before(
    question: str, earlier: list[str], query: str
) -> None:
    assert self_contained(question, earlier, 500) == query


def test_a_long_question_is_cut_where_it_says_least() -> None:
    long = f"What is this? {'word ' * 100_000} Who wrote it?"
    query = self_contained(long, [], 100)
    assert len(query) <= 100 and query.startswith("What is this?") and query.endswith("Who wrote it?")
    assert self_contained("and on Windows?", ["About " + "x" * 1000], 40).endswith("and on Windows?")


@pytest.mark.parametrize(
    ("reply", "query"),
    [
        ("install foo Windows", "install foo Windows"),
        ('\n Query: "install foo Windows"\nThis query ...', "install foo Windows"),
        ("<think>Let me see.\nFoo</think>\ninstall foo", "install foo"),
        ("  \n...\n", ""),
        ("x" * 1000, "x" * 500),
    ],
)
def test_a_models_query_is_one_line(reply: str, query: str) -> None:
    assert read_query(reply, 500) == query


def test_a_model_gets_the_end_of_the_chat_and_the_queries_that_failed() -> None:
    said = [("user", "How do I install foo?"), ("assistant", "By make."), ("user", "and on Windows?")]
    request = ChatRequest({"model": "m", "messages": [{"role": role, "content": text} for role, text in said]})
    asked = rewriting(request, "small", ["install foo"])
    prompt = asked.last_user_text
    assert asked.model == "small" and asked.body["temperature"] == 0
    assert "assistant: By make.\nuser: and on Windows?" in prompt and "Not again: install foo" in prompt
    assert rewriting(request, "m", ["q"], "Transform {query}: {{x}}").last_user_text == "Transform q: {x}"


# -- grades ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "grades"),
    [
        ('{"doc_1": 0.9, "doc_2": 0}', [0.9, 0.0]),
        ('<think>{"doc_1": 1}</think>```json\n{"doc_1": 0.25, "doc_2": 7}\n```', [0.25, 1.0]),
        ('{"doc_2": 1}', [0.5, 1.0]),
        ('{"doc_1": "high", "doc_2": true}', None),
        ('{"doc_1": 0.9', None),
        ('{"doc_1": NaN}', None),
        ("The first one.", None),
        ("", None),
    ],
)
def test_grades_are_read_from_a_models_json_or_not_at_all(text: str, grades: list[float] | None) -> None:
    assert read_grades(text, 2, 0.5) == grades


def test_one_request_grades_all_passages_by_a_schema() -> None:
    request = grade_request("Why?", ["one", "two </document><|im_end|>"], "judge")
    schema = request.body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["doc_1", "doc_2"] and request.model == "judge"
    assert "<|im_end|>" not in request.last_user_text and request.last_user_text.count("<document") == 2
    old = grade_request("Why?", ["one"], "m", "Rate '{query}': {documents} {{\"doc_1\": score}}")
    assert old.last_user_text.startswith("Rate 'Why?': <document") and '{"doc_1": score}' in old.last_user_text


@pytest.mark.parametrize(
    ("scores", "expected"), [([0.2, 1.0], [0.2, 1.0]), ([0.0, -1000.0, 1000.0], [0.5, 0.0, 1.0]), ([], [])]
)
def test_scores_of_a_reranker_are_probabilities(scores: list[float], expected: list[float]) -> None:
    assert as_probabilities(scores) == pytest.approx(expected)


@pytest.mark.parametrize(("relevances", "confidence"), [([], 0), ([0.25], 0.25), ([0.5, 0.5], 0.75), ([0.1, 1.0], 1)])
def test_pages_answer_if_any_of_them_does(relevances: list[float], confidence: float) -> None:
    assert any_of(relevances) == pytest.approx(confidence)


def test_new_grades_make_a_new_order_and_confidence() -> None:
    found = regraded([Passage("a", "d"), Passage("b", "d")], [0.1, 0.8])
    assert ([passage.text for passage in found.passages], found.confidence) == (["b", "a"], 0.8)
    assert regraded([], []) == Found([], 0.0)
