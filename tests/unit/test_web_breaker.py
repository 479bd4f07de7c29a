"""The circuit breaker of web search: for all sequences of what can happen, and for the usual ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.agents.rag.web.breaker import Breaker, State
from tests.support.laws import law

FAILURES, RECOVERY_S, SUCCESSES = 3, 10.0, 2
STEPS = st.sampled_from(["begin", "succeeded", "failed", "abandoned"]) | st.sampled_from([1.0, 9.0, 10.0, 30.0])


class Trace:
    """A breaker, and what has happened to it: `periods` counts the changes of its state, and `running` has the tickets
    of requests with the period in which they began."""

    def __init__(self) -> None:
        self.breaker = Breaker(FAILURES, RECOVERY_S, SUCCESSES)
        self.now_s = self.opened_s = 0.0
        self.periods = self.failures = self.successes = 0
        self.running: list[tuple[int, int]] = []
        self.before = State.CLOSED

    @property
    def state(self) -> State:
        return self.breaker.state(self.now_s)

    def step(self, what: str | float, which: int) -> None:
        if isinstance(what, float):
            self.now_s += what
            waited = self.before is State.OPEN and self.now_s >= self.opened_s + RECOVERY_S
            self.now_in(State.HALF_OPEN if waited else self.before)
        elif what == "begin":
            self.begin()
        elif self.running:
            self.end(what, *self.running.pop(which % len(self.running)))

    def begin(self) -> None:
        state = self.state
        trial = any(period == self.periods for _, period in self.running)
        ticket = self.breaker.begin(self.now_s)
        assert (ticket is not None) == (state is State.CLOSED or (state is State.HALF_OPEN and not trial))
        if ticket is not None:
            self.running.append((ticket, self.periods))

    def end(self, outcome: str, ticket: int, period: int) -> None:
        getattr(self.breaker, outcome)(ticket, self.now_s)
        expected = self.before
        if period == self.periods:  # or it began before the last change, and changes nothing
            self.failures = {"failed": self.failures + 1, "succeeded": 0}.get(outcome, self.failures)
            self.successes += outcome == "succeeded"
            if self.before is State.HALF_OPEN:
                expected = State.OPEN if self.failures else expected
                expected = State.CLOSED if self.successes == SUCCESSES else expected
            elif self.failures == FAILURES:
                expected = State.OPEN
        self.now_in(expected)

    def now_in(self, state: State) -> None:
        assert self.state is state
        if state is not self.before:
            self.before, self.failures, self.successes = state, 0, 0
            self.periods += 1
            self.opened_s = self.now_s
        assert self.breaker.retry_s(self.now_s) == (
            self.opened_s + RECOVERY_S - self.now_s if state is State.OPEN else 0
        )


@law(4000)
@given(st.lists(st.tuples(STEPS, st.integers(0, 5)), max_size=60))
def test_it_is_opened_and_closed_by_what_it_counts_and_by_nothing_else(steps: list[tuple[str | float, int]]) -> None:
    trace = Trace()
    for what, which in steps:
        trace.step(what, which)


def test_a_server_that_asks_to_be_left_alone_is_left_alone_at_once_and_for_so_long() -> None:
    breaker = Breaker(FAILURES, RECOVERY_S, SUCCESSES)
    ticket = breaker.begin(0.0)
    assert ticket is not None
    breaker.failed(ticket, 1.0, rest_s=100.0)
    assert breaker.begin(100.9) is None and breaker.retry_s(100.9) > 0
    assert breaker.begin(101.0) is not None and breaker.state(101.0) is State.HALF_OPEN
