"""When a silent server counts as stalled: what is measured of it, and the verdict."""

from __future__ import annotations

import pytest

from llama_smart_proxy.backends.llamacpp.launcher import _report
from llama_smart_proxy.backends.pool.family import Vitals
from llama_smart_proxy.backends.pool.launcher import Report
from llama_smart_proxy.backends.pool.watch import Facts, Sight, Verdict, _changed, _compare, judge, look_s

IDLE, BUSY = 0.03, 1.0


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        pytest.param({"cpu_s": 0.0, "states": "T"}, "stalled", id="stopped"),
        pytest.param({"cpu_s": IDLE}, "stalled", id="answers-nothing"),
        pytest.param({"cpu_s": IDLE, "reported": False}, "stalled", id="reports-no-work"),
        pytest.param({"cpu_s": IDLE, "reported": False, "free": True}, "probe", id="may-have-nothing-to-do"),
        pytest.param({"cpu_s": IDLE, "reported": False, "free": True, "probed": True}, "alive", id="answers-a-probe"),
        pytest.param({"cpu_s": IDLE, "reported": False, "free": True, "probed": False}, "stalled", id="fails-a-probe"),
        pytest.param({"cpu_s": BUSY}, "alive", id="works-on-a-prompt-and-does-not-answer"),
        pytest.param({"cpu_s": IDLE, "reported": True}, "alive", id="works-on-a-gpu"),
        pytest.param({"cpu_s": 0.0, "faults": 1, "states": "D"}, "alive", id="reads-its-model-from-a-slow-disk"),
        pytest.param({"cpu_s": 0.0, "states": "D"}, "stalled", id="uninterruptible"),
        pytest.param({"cpu_s": 0.0, "advanced": True}, "alive", id="a-stream-has-advanced-meanwhile"),
        pytest.param({"cpu_s": BUSY, "reported": False, "free": True}, "alive", id="busy-with-a-free-slot"),
        pytest.param({}, "alive", id="in-a-container-that-does-not-answer"),
        pytest.param({"reported": False}, "stalled", id="in-a-container-that-reports-no-work"),
        pytest.param({"reported": False, "free": True}, "probe", id="in-a-container-with-a-free-slot"),
    ],
)
def test_a_server_is_stalled_only_if_nothing_shows_life(facts: dict[str, object], verdict: str) -> None:
    assert judge(Facts(30.0, **facts)) is Verdict(verdict)  # type: ignore[arg-type]


def test_the_same_processor_time_is_work_in_a_second_and_none_in_a_minute() -> None:
    assert judge(Facts(1.0, cpu_s=0.05)) is Verdict.ALIVE
    assert judge(Facts(60.0, cpu_s=0.05)) is Verdict.STALLED


def test_two_sights_of_a_server_are_compared_by_what_has_changed() -> None:
    before = Sight(30.0, 1.0, Vitals(5.0, 2, "S"), Report([1], True))
    after = Sight(60.0, 1.0, Vitals(5.5, 3, "ST"), Report([1], False))
    assert _compare(before, after) == Facts(30.0, False, 0.5, 1, "ST", reported=False, free=False)
    unknown = _compare(before, Sight(60.0, 2.0, None, None))
    assert unknown == Facts(30.0, True, None, 0, "", reported=None, free=False)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [(None, None, None), ([1], None, None), (None, [1], True), ([1], [1], False), ([1], [2], True)],
)
def test_a_report_that_comes_again_is_work_too(before: object, after: object, changed: bool | None) -> None:
    reports = [Report(work, None) if work is not None else None for work in (before, after)]
    assert _changed(*reports) is changed


SLOT = b'{"id":0,"id_task":7,"is_processing":%s,"n_prompt_tokens_processed":%d,"next_token":[{"n_decoded":%d}]}'


def test_slots_of_llama_server_report_every_step_of_its_work() -> None:
    first = _report(b"[%b]" % (SLOT % (b"true", 512, 0)))
    assert first.free is False
    assert first == _report(b"[%b]" % (SLOT % (b"true", 512, 0)))
    assert first.work != _report(b"[%b]" % (SLOT % (b"true", 1024, 0))).work
    assert first.work != _report(b"[%b]" % (SLOT % (b"true", 512, 1))).work
    assert _report(b"[%b]" % (SLOT % (b"false", 512, 9))).free is True
    assert _report(b'{"error":"no slots"}') == _report(b"<html>") == Report(None, None)


def test_the_limit_is_looked_at_often_enough_and_not_more_than_once_a_second() -> None:
    assert (look_s(60), look_s(0.8), look_s(0)) == (1.0, 0.1, 1.0)
