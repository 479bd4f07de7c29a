"""How long a model that fails is left alone."""

from __future__ import annotations

from llama_smart_proxy.backends.pool.backoff import BUDGET, WINDOW_S, Backoff


def test_first_failures_cost_one_and_two_seconds() -> None:
    backoff = Backoff()
    assert backoff.wait_s(100) == 0
    backoff.failed(100)
    assert backoff.wait_s(100) == 1
    assert backoff.wait_s(100.4) == 0.6 or abs(backoff.wait_s(100.4) - 0.6) < 1e-9
    assert backoff.wait_s(101) == 0
    backoff.failed(101)
    assert backoff.wait_s(101) == 2


def test_no_more_than_three_failing_starts_a_minute() -> None:
    backoff = Backoff()
    starts: list[float] = []
    now = 0.0
    while now < 1000:
        now += backoff.wait_s(now)
        starts.append(now)
        backoff.failed(now)
    for index in range(len(starts) - BUDGET):
        assert starts[index + BUDGET] - starts[index] >= WINDOW_S


def test_delay_grows_to_a_minute_and_not_beyond() -> None:
    backoff = Backoff()
    for step in range(2000):
        now = step * 1000.0
        backoff.failed(now)
        assert backoff.wait_s(now) == min(60.0, 2.0 ** min(step, 10))


def test_work_done_forgets_failures() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.failed(10)
    backoff.worked()
    assert backoff.wait_s(10) == 0
    backoff.failed(11)
    assert backoff.wait_s(11) == 1


def test_first_early_crash_is_forgiven_the_next_is_not() -> None:
    backoff = Backoff()
    backoff.crashed(5)
    assert backoff.wait_s(5) == 0
    backoff.crashed(6)
    assert backoff.wait_s(6) == 1
    backoff.crashed(7)
    assert backoff.wait_s(7) == 58  # three within a minute: the first was at 5
