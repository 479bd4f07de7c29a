"""A circuit breaker: an engine that fails again and again is left alone for some time."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Of a breaker: requests pass; none does; one at a time does, as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


class Breaker:
    """Decides whether a request may be made. `failures` in a row open it; `recovery_s` later it is half open, and one
    trial at a time may be made; `successes` of them in a row close it, and a failure opens it again.

    Each request that `begin` permits gets a ticket, with which its end is reported. The end of a request that began in
    an earlier state changes nothing. All times are seconds of one clock, given by the caller.
    """

    def __init__(self, failures: int = 5, recovery_s: float = 60.0, successes: int = 3) -> None:
        self._most_failures, self._recovery_s, self._enough = failures, recovery_s, successes
        self._state = State.CLOSED
        self._epoch = 0
        """The number of changes of the state so far."""
        self._in_a_row = 0
        """Failures while it is closed, successes while it is half open."""
        self._until_s = 0.0
        self._trial = False

    def state(self, now_s: float) -> State:
        """The state at this time."""
        if self._state is State.OPEN and now_s >= self._until_s:
            self._enter(State.HALF_OPEN)
        return self._state

    def begin(self, now_s: float) -> int | None:
        """The ticket of a request that may be made now; None if none may."""
        state = self.state(now_s)
        if state is State.OPEN or (state is State.HALF_OPEN and self._trial):
            return None
        self._trial = state is State.HALF_OPEN
        return self._epoch

    def succeeded(self, ticket: int, now_s: float) -> None:
        """The request was answered."""
        if not self._current(ticket, now_s):
            return
        if self._state is State.CLOSED:
            self._in_a_row = 0
            return
        self._trial = False
        self._in_a_row += 1
        if self._in_a_row >= self._enough:
            self._enter(State.CLOSED)

    def failed(self, ticket: int, now_s: float, rest_s: float | None = None) -> None:
        """The request failed. With `rest_s`, its server has asked to be left alone for so long."""
        if not self._current(ticket, now_s):
            return
        self._in_a_row += self._state is State.CLOSED
        if self._state is State.HALF_OPEN or rest_s is not None or self._in_a_row >= self._most_failures:
            self._until_s = now_s + (self._recovery_s if rest_s is None else rest_s)
            self._enter(State.OPEN)

    def abandoned(self, ticket: int, now_s: float) -> None:
        """The request was cancelled, which says nothing about its server."""
        if self._current(ticket, now_s):
            self._trial = False

    def retry_s(self, now_s: float) -> float:
        """Seconds until a trial may be made; 0 if it is not open."""
        return self._until_s - now_s if self.state(now_s) is State.OPEN else 0.0

    def _current(self, ticket: int, now_s: float) -> bool:
        self.state(now_s)
        return ticket == self._epoch

    def _enter(self, state: State) -> None:
        self._state, self._in_a_row, self._trial = state, 0, False
        self._epoch += 1
