"""The explanation of a request, from its record."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.api.why import explained
from llama_smart_proxy.proxy.chat import Json, RequestRecord

AT = 1000.0


def record(**fields: Any) -> RequestRecord:
    """A request that arrived at `AT`; times are seconds after that."""
    times = {name: AT + value for name, value in fields.items() if name.endswith("_s")}
    whole: Json = {"request_id": "r", "method": "POST", "path": "/v1/x", "model": "m", "status": 200, **fields, **times}
    return RequestRecord(AT, **whole)


def done(**fields: Any) -> RequestRecord:
    times = {"resolved_s": 0.0, "sent_s": 1.0, "first_byte_s": 1.5, "last_byte_s": 3.5, "ended_s": 4.0}
    return record(**{**times, **fields})


USAGE = {"prompt_tokens": 100, "completion_tokens": 21, "prompt_tokens_details": {"cached_tokens": 80}}


def test_times_and_tokens_are_those_of_the_record() -> None:
    answer = explained(done(counted=USAGE))
    assert answer["total_s"] == 4.0 and answer["outcome"] == "ok" and answer["retries"] == 0
    assert answer["times"] == {
        "queue_s": 0,
        "load_s": 0,
        "download_s": 0,
        "agents_s": 0,
        "first_token_s": 1.5,
        "prefill_s": 0.5,
        "decode_s": 2.0,
    }
    assert answer["tokens"] == {"prompt": 100, "cached": 80, "completion": 21, "per_second": 10.0}
    assert answer["sentence"] == (
        "POST /v1/x for m took 4.00 s: 500 ms at its server until the answer began, 100 tokens of the prompt, 80 of "
        "them cached; 2.00 s for the answer, 21 tokens of the answer at 10.0/s."
    )


STEPS: list[tuple[StepKind, Json, str]] = [
    (StepKind.QUEUE, {"model": "m"}, "250 ms in the queue for m"),
    (
        StepKind.QUEUE,
        {"model": "m", "ahead": 2, "behind": ["a", "b"], "places": ["n", "o"]},
        "250 ms in the queue for m, as n, o had the places, with 2 before it (behind a, b)",
    ),
    (StepKind.LOAD, {"model": "m"}, "250 ms until m was loaded"),
    (StepKind.DOWNLOAD, {"model": "m"}, "250 ms for the download of m"),
    (StepKind.EVICT, {"model": "n", "why": "it was idle"}, "n was stopped to make room, as it was idle"),
    (StepKind.RETRY, {"why": "it crashed"}, "it was sent again: it crashed"),
    (StepKind.AGENT, {"agent": "rag"}, "250 ms in the agent rag"),
]


@pytest.mark.parametrize(("kind", "detail", "text"), STEPS)
def test_every_kind_of_step_is_a_part_of_the_sentence_and_of_the_figures(
    kind: StepKind, detail: Json, text: str
) -> None:
    one = done()
    one.note(kind, AT + 0.5, AT + 0.75, **detail)
    answer = explained(one)
    assert f"took 4.00 s: {text}; 500 ms at its server" in answer["sentence"]
    after_s = None if kind is StepKind.AGENT else 0.5
    assert answer["steps"] == [{"kind": kind.value, "after_s": after_s, "seconds": 0.25, **detail}]
    assert answer["retries"] == (kind is StepKind.RETRY)
    if (name := {StepKind.AGENT: "agents"}.get(kind, kind.value) + "_s") in answer["times"]:
        assert answer["times"][name] == 0.25


def test_every_kind_of_step_is_tested() -> None:
    assert {kind for kind, _, _ in STEPS} == set(StepKind)


@pytest.mark.parametrize(
    ("fields", "outcome", "end"),
    [
        ({"status": 499}, "client_left", "Its client left before the end."),
        ({"status": 503}, "upstream_error", "It failed with status 503."),
        ({"status": 503, "error": "queue_timeout"}, "queue_timeout", "It failed with status 503 (queue_timeout)."),
        (
            {"error": "upstream_disconnected"},
            "upstream_disconnected",
            "It failed after its answer had begun (upstream_disconnected).",
        ),
        ({"status": 410, "cancelled": True}, "cancelled", "It was cancelled."),
        ({"ended_s": -AT, "status": 0}, "under way", "It is under way."),
    ],
)
def test_the_end_of_a_request_is_named(fields: Json, outcome: str, end: str) -> None:
    answer = explained(done(**fields))
    assert answer["outcome"] == outcome and answer["sentence"].endswith(f" {end}")


def test_what_did_not_happen_has_no_time() -> None:
    answer = explained(record(ended_s=0.5, model="-", status=404))
    assert answer["model"] is None and answer["tokens"]["completion"] is None
    assert [answer["times"][f"{name}_s"] for name in ("first_token", "prefill", "decode")] == [None] * 3
    assert answer["sentence"] == "POST /v1/x took 500 ms, and waited for nothing. It failed with status 404."


def test_a_whole_answer_has_one_time_at_its_server() -> None:
    answer = explained(done(last_byte_s=1.5, counted={"completion_tokens": 1}))
    assert answer["times"]["decode_s"] is None and answer["tokens"]["per_second"] is None
    assert "500 ms at its server, 1 token of the answer." in answer["sentence"]
    unseen = explained(done(first_byte_s=-AT, counted={"completion_tokens": 9}))  # 0: an agent saw it first
    assert unseen["tokens"]["per_second"] is None


def test_the_part_of_an_answer_that_was_sent_until_it_was_broken_off_has_its_time() -> None:
    answer = explained(done(last_byte_s=-AT, ended_s=4.5, cancelled=True))
    assert answer["times"]["decode_s"] == 3.0 and "3.00 s for the answer. It was cancelled." in answer["sentence"]


def test_a_load_at_the_server_is_no_part_of_its_prefill() -> None:
    one = done()
    one.note(StepKind.LOAD, AT + 1.0, AT + 1.25, model="m")
    assert explained(one)["times"]["prefill_s"] == 0.25


def test_a_wait_under_way_is_explained_and_not_noted() -> None:
    now = time.monotonic()
    one = RequestRecord(now - 2, request_id="r", method="POST", model="m", resolved_s=now - 2)
    one.pending = lambda journal: journal.note(StepKind.LOAD, now - 2, now, model="m")
    for _ in range(2):
        assert "2.00 s until m was loaded" in explained(one, path="/v1/y")["sentence"]
    assert one.steps is None


@pytest.mark.parametrize("details", [[1], "many", 7])
def test_details_of_tokens_may_have_any_form(details: object) -> None:
    tokens = explained(done(counted={**USAGE, "prompt_tokens_details": details}))["tokens"]
    assert (tokens["prompt"], tokens["cached"]) == (100, None)
