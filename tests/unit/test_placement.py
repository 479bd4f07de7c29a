"""Which process makes room: decisions computed from what there is, without any process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.placement import (
    Evict,
    Limits,
    Never,
    Start,
    Wait,
    areas_of,
    choose_victim,
    decide,
    plan_drains,
)
from tests.support.laws import law


@dataclass(frozen=True)
class Standing:
    """What the decisions depend on."""

    state: State = State.READY
    pinned: bool = False
    leases: int = 0
    awaited: bool = False
    draining: bool = False
    unloading: bool = False
    ready_at: float = 0.0
    released_at: float = 0.0
    closed_since: float = math.inf
    awaited_urgently: bool = False
    helper: bool = False


@dataclass(frozen=True)
class Cold:
    """A model that requires a process."""

    ending: bool = False


IDLE, BUSY, PINNED = Standing(), Standing(leases=1), Standing(pinned=True)
LOADING = Standing(State.STARTING, awaited=True, ready_at=math.inf, released_at=math.inf)
STOPPING = Standing(State.STOPPING)

standings = st.lists(
    st.builds(
        Standing,
        state=st.sampled_from(State),
        pinned=st.booleans(),
        leases=st.integers(0, 2),
        awaited=st.booleans(),
        draining=st.booleans(),
        unloading=st.booleans(),
        ready_at=st.floats(0, 100),
        released_at=st.floats(0, 100),
        closed_since=st.floats(0, 100),
        helper=st.booleans(),
    ),
    max_size=6,
)


@law(1000)
@given(standings)
def test_leased_pinned_or_ending_instances_are_never_victims(running: list[Standing]) -> None:
    victim = choose_victim(running)
    if victim is not None:
        assert victim.leases == 0 and not victim.pinned
        assert victim.state in (State.READY, State.STARTING)
        assert not victim.awaited or (victim.draining and victim.state is State.READY)
    else:
        assert not [s for s in running if s.state is State.READY and not (s.leases or s.pinned or s.awaited)]


def test_the_least_recently_released_goes_first() -> None:
    old, new = Standing(released_at=1), Standing(released_at=2)
    assert choose_victim([new, old]) is old
    assert choose_victim([old, Standing(leases=1)]) is old
    assert choose_victim([old, Standing(draining=True, awaited=True, released_at=9)]) != old
    assert choose_victim([new, Standing(state=State.STARTING)]) is new
    assert choose_victim([Standing(state=State.STARTING, awaited=True)]) is None
    busy = Standing(leases=1, released_at=2)
    assert plan_drains([0], [Standing(leases=1, released_at=3), busy], 0, 0).begin == [busy]


@pytest.mark.parametrize(
    ("running", "size", "promised", "decision"),
    [
        pytest.param([], 1, 0, Start(), id="an empty pool"),
        pytest.param([BUSY, LOADING], 3, 0, Start(), id="room"),
        pytest.param([BUSY, STOPPING], 3, 0, Start(), id="room beside one that is stopping"),
        pytest.param([BUSY, IDLE], 2, 0, Evict([IDLE]), id="an idle one makes room"),
        pytest.param([IDLE, STOPPING], 2, 0, Wait(promised=True), id="one that is stopping makes room first"),
        pytest.param([IDLE, STOPPING], 2, 1, Evict([IDLE]), id="unless another model comes before"),
        pytest.param([BUSY, STOPPING], 2, 1, Wait(promised=False), id="all others are in use"),
        pytest.param([BUSY, LOADING], 2, 0, Wait(promised=False), id="in use is what loads, too"),
        pytest.param([PINNED, PINNED], 2, 0, Never(), id="all are pinned"),
        pytest.param([PINNED, BUSY], 2, 0, Wait(promised=False), id="one is not pinned"),
        pytest.param([Standing(pinned=True, leases=1, unloading=True)], 1, 0, Wait(promised=False), id="unloaded soon"),
        pytest.param([IDLE, IDLE, IDLE], 1, 0, Evict([IDLE]), id="one at a time when the pool has shrunk"),
    ],
)
def test_a_model_starts_evicts_waits_or_never_gets_a_place(
    running: Sequence[Standing], size: int, promised: int, decision: object
) -> None:
    assert decide(Cold(), running, Limits(size, promised)) == decision


def test_a_model_whose_last_process_still_ends_waits_for_that() -> None:
    assert decide(Cold(ending=True), [BUSY, STOPPING], Limits(4)) == Wait(promised=True)


@law(1000)
@given(standings, st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_every_decision_keeps_the_limits(running: list[Standing], size: int, promised: int, ending: bool) -> None:
    decision = decide(Cold(ending), running, Limits(size, promised))
    if isinstance(decision, Start):
        assert len(running) < size and not ending
    elif isinstance(decision, Evict):
        assert all(process in running and not process.pinned and not process.leases for process in decision.victims)
    elif isinstance(decision, Never):
        assert all(process.pinned for process in running)
    else:
        assert len(running) >= size or ending
        assert decision.promised == (sum(process.state is State.STOPPING for process in running) > promised)


@law(300)
@given(standings, st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_nothing_is_decided_for_a_helper_about_other_models_nor_for_them_about_helpers(
    running: list[Standing], size: int, helpers: int, helper: bool
) -> None:
    target = Standing(helper=helper)
    [area] = [area for area in areas_of(size, helpers) if area.has(target)]
    assert area.size == (helpers if helper and helpers else size)
    others = [process for process in running if helpers and process.helper is not helper]
    assert len(area.of(running)) + len(others) == len(running)
    decision = decide(Cold(), area.of(running), Limits(area.size))
    assert decision == decide(Cold(), [process for process in running if process not in others], Limits(area.size))
    if isinstance(decision, Evict):
        assert all(not helpers or process.helper is helper for process in decision.victims)


# -- draining ----------------------------------------------------------------------------------------------------------


def test_a_busy_process_is_drained_once_another_model_has_starved_long_enough() -> None:
    early, due = plan_drains([5.0], [BUSY], 1.0, 5.5), plan_drains([5.0], [BUSY], 1.0, 6.0)
    assert (early.begin, early.end, early.again_at) == ([], [], 6.0)
    assert (due.begin, due.end, due.again_at) == ([BUSY], [], 7.0)


def test_a_process_is_not_drained_soon_after_it_was_loaded() -> None:
    fresh = Standing(leases=1, ready_at=5.5)
    plan = plan_drains([5.0], [fresh, LOADING, PINNED], 1.0, 6.0)
    assert (plan.begin, plan.again_at) == ([], 6.5)
    assert plan_drains([5.0], [fresh], 1.0, 6.5).begin == [fresh]


def test_one_that_drains_already_is_enough_for_one_model_until_it_takes_too_long() -> None:
    draining = Standing(leases=1, draining=True, closed_since=6.0)
    assert plan_drains([5.0], [draining, BUSY], 1.0, 6.5) == plan_drains([5.0], [draining], 1.0, 6.5)
    assert plan_drains([5.0], [draining, BUSY], 1.0, 7.0).begin == [BUSY]
    assert plan_drains([5.0, 5.0], [draining, BUSY], 1.0, 6.5).begin == [BUSY]


def test_one_that_drains_accepts_requests_again_when_no_model_starves() -> None:
    draining = [Standing(leases=1, draining=True, closed_since=at) for at in (1.0, 2.0)]
    plan = plan_drains([], draining, 1.0, 9.0)
    assert (plan.begin, list(plan.end), plan.again_at) == ([], draining[::-1], math.inf)
    unloading = Standing(leases=1, unloading=True, closed_since=8.5)
    assert plan_drains([5.0], [unloading, draining[0]], 1.0, 9.0).begin == []
    assert list(plan_drains([], [unloading], 1.0, 9.0).end) == []


@law(1000)
@given(standings, st.lists(st.floats(0, 100), max_size=4), st.floats(0, 10), st.floats(0, 100))
def test_every_plan_keeps_the_rules(running: list[Standing], starved: list[float], swap: float, now: float) -> None:
    plan = plan_drains(starved, running, swap, now)
    assert len(plan.begin) <= len(starved) and not (plan.begin and plan.end)
    assert all(process.draining for process in plan.end)
    for process in plan.begin:
        assert process.state is State.READY and not (process.pinned or process.draining or process.unloading)
        assert now >= process.ready_at + swap
