"""Problems are looked for at every question, and what does not answer delays it once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.proxy.models.inspection import Inspection


class Source:
    """What is looked at: it answers once `free` is set, with what `found` then is."""

    def __init__(self, *found: Problem) -> None:
        self.found: Sequence[Problem] = found
        self.looks = 0
        self.free = asyncio.Event()
        self.free.set()

    async def problems(self) -> Sequence[Problem]:
        self.looks += 1
        await self.free.wait()
        return self.found


async def test_every_question_looks_anew_and_those_at_one_time_share_a_look() -> None:
    source, other = Source(Problem("a", "x")), Source(Problem("b", "y", fatal=True))
    inspection = Inspection({"a": source.problems, "b": other.problems})
    assert await inspection.problems() == [Problem("b", "y", fatal=True), Problem("a", "x")], "fatal ones first"
    source.found = other.found = ()
    assert not any(await asyncio.gather(inspection.problems(), inspection.problems()))
    assert source.looks == other.looks == 2


async def test_a_look_that_does_not_end_is_a_problem_and_not_repeated_and_others_are_heard() -> None:
    mute, other = Source(Problem("m", "old")), Source()
    inspection = Inspection({"mute": mute.problems, "other": other.problems}, limit_s=0.05)
    await inspection.problems()
    mute.free.clear()
    mute.found = ()
    for looks, limit_s in enumerate((0.05, 3600, 3600), 2):  # after the first time, nothing may wait for it
        inspection.limit_s = limit_s
        late = Problem("mute", f"cannot be checked: no answer within {limit_s:g} s")
        assert await inspection.problems() == [Problem("m", "old"), late]
        assert (mute.looks, other.looks) == (2, looks)
    mute.free.set()
    await inspection.problems()  # may be the last without it
    assert await inspection.problems() == []
    await inspection.close()


async def test_a_look_that_fails_is_a_problem_of_its_own() -> None:
    async def fails() -> Sequence[Problem]:
        raise OSError("no more threads")

    assert await Inspection({"x": fails}).problems() == [Problem("x", "cannot be checked: no more threads")]


async def test_closing_ends_what_is_looking() -> None:
    mute = Source()
    mute.free.clear()
    inspection = Inspection({"mute": mute.problems}, limit_s=0.01)
    await inspection.problems()
    await inspection.close()
    assert len(asyncio.all_tasks()) == 1


def test_health_answers_within_a_second_although_something_does_not_end() -> None:
    assert Inspection({}).limit_s <= 0.75
