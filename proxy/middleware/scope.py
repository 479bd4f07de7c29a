"""Everything that runs for one request with agents, and the end of it.

The work of the request is a task of its own. When the client leaves or the work ends, it and every task that was
started in an agent's code are cancelled, repeatedly if need be, until they have ended.
"""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio.tasks import _unregister_task
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.proxy.errors import AgentError, ProxyError

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_S = 0.1
"""How late a hanging agent may be noticed, and how long after that it is cancelled again."""
AGAIN_S = 0.03
"""Time between two cancellations of a task that goes on all the same."""
BLOCKED_S = 0.5
"""Code that runs for longer without awaiting anything is logged: no request goes on meanwhile."""
PATIENCE_S = 2.0
"""Then a task is abandoned, with a log entry: nothing in Python can end it."""


class HookTimer:
    """How long an agent has kept its request waiting: a clock that runs while its own code does, or awaits.

    `spent_s` counts all of that. Time in which it awaits the answer of a model does not count as hanging. `below` is
    the answer that it gets, once there is one.
    """

    __slots__ = (
        "_began",
        "_scope",
        "_waited_until",
        "_waiting",
        "below",
        "cancels",
        "deadline_s",
        "name",
        "running",
        "spent_s",
    )

    def __init__(self, scope: Scope, name: str, deadline_s: float) -> None:
        self.name = name
        self.below: object = None
        self.spent_s = 0.0
        self._scope = scope
        self.deadline_s = deadline_s
        self._began = 0.0
        self._waiting = 0
        self._waited_until = 0.0
        self.cancels = 0
        self.running = False
        scope.timers.append(self)

    def begin(self) -> None:
        """The agent's code runs from here on."""
        self.running = True
        _own(self._scope)
        self._began = _now()

    def end(self) -> None:
        """It does no more."""
        if self.running:
            self.running = False
            took_s = _now() - self._began
            self.spent_s += took_s
            if took_s >= BLOCKED_S:
                _clock.check(max(self._began, self._waited_until), [self.name])
        _own(None)

    @property
    def busy(self) -> bool:
        """Whether the agent's code runs, or awaits something other than a model."""
        return self.running and not self._waiting

    @contextmanager
    def awaiting_model(self) -> Iterator[None]:
        """Around an agent's wait for a model. What is started for that meanwhile is not the agent's: a model that is
        loaded stays so when the request is over."""
        _own(None)
        self._waiting += 1
        try:
            yield
        finally:
            _own(self._scope)
            self._waiting -= 1
            self._waited_until = time.perf_counter()

    def disown(self) -> None:
        """What the current task starts from here on is not the agent's."""
        _own(None)

    def overdue(self, now: float) -> bool:
        return not self._waiting and now - max(self._began, self._waited_until) > self.deadline_s

    def cancel(self, work: asyncio.Task[Any]) -> None:
        """It hangs."""
        self.cancels += 1
        work.cancel()

    def hung(self) -> AgentError:
        """The error that the client gets for that."""
        return AgentError(self.name, f"did not go on within {self.deadline_s:g} s", status=504, code="agent_timeout")

    def was_cancelled(self) -> bool:
        """Whether it hung; if so, its task is not to be cancelled any more, unless for another reason."""
        if not self.cancels:
            return False
        task = asyncio.current_task()
        for _ in range(self.cancels):
            if task is not None:
                task.uncancel()
        self.cancels = 0
        return True


class Scope:
    """The tasks of one request, and the `turns` of its agents. The code of one runs now, or of none; of several where
    one reads the answer in a task of its own."""

    def __init__(self) -> None:
        self.timers: list[HookTimer] = []
        self.closing = False
        self._work: asyncio.Task[Any] | None = None
        self._lost: asyncio.Future[HookTimer] | None = None
        self._timed_out: HookTimer | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. When this returns, or is cancelled, nothing of the request runs any more.

        Raises: what `work` does; AgentError for an agent that ignores cancellation.
        """
        loop = asyncio.get_running_loop()
        task: asyncio.Task[T] = loop.create_task(_Contained(work))
        self._work, self._lost = task, loop.create_future()
        _watch(self)
        ends: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            _scopes.discard(self)
            await self._end()
        if self._lost.done() and (not task.done() or task.cancelled()):
            reason = "does not end when it is cancelled"
            raise AgentError(self._lost.result().name, reason, status=504, code="agent_timeout")
        if self._timed_out is not None and task.cancelled():  # the one that hung ran in a task of another agent's
            raise self._timed_out.hung()
        return task.result()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the request at the latest. It is not an agent's: nothing it starts is ours to end."""
        owner = _owner.get()
        _owner.set(None)
        task = asyncio.get_running_loop().create_task(work)
        _owner.set(owner)
        self.own(task)
        return task

    def own(self, task: asyncio.Task[Any]) -> None:
        """End this task with the request."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self.closing:
            task.cancel()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(
            error, ProxyError | StopAsyncIteration
        ):  # reported where they came from
            logger.warning("a task of an agent failed: %s: %s", _shown(task), error.__class__.__name__, exc_info=error)

    def check(self, now: float) -> None:
        """Break off the hook of an agent that hangs."""
        for timer in self.timers:
            if timer.running and self._work is not None and timer.overdue(now):
                self._timed_out = timer
                timer.cancel(self._work)
                if timer.cancels * SWEEP_S > PATIENCE_S and self._lost is not None and not self._lost.done():
                    self._lost.set_result(timer)

    async def _end(self) -> None:
        self.closing = True
        lost = self._lost is not None and self._lost.done()
        deadline = time.perf_counter() + (AGAIN_S if lost else PATIENCE_S)
        cancelled = False
        while pending := {task for task in (self._work, *self._tasks) if task is not None and not task.done()}:
            if time.perf_counter() > deadline:
                await self._give_up(pending)
                break
            for task in pending:
                task.cancel()
            try:
                await asyncio.wait(pending, timeout=AGAIN_S)
            except asyncio.CancelledError:
                cancelled = True  # cancelled twice: what is left still has to end
        self.timers.clear()  # they refer to this scope, and to the answer: nothing is left to the garbage collector
        if self._work is not None and self._work.done() and not self._work.cancelled():
            self._work.exception()  # `run` may not come to ask for it
        if cancelled and self._work is not None and self._work.done():
            raise asyncio.CancelledError

    async def _give_up(self, pending: set[asyncio.Task[Any]]) -> None:
        """Abandon these tasks, but let them hold no model, and do not wait for them at shutdown."""
        logger.error("%d tasks of agents do not end: %s", len(pending), ", ".join(map(_shown, pending)))
        for task in pending:
            _unregister_task(task)
        for timer in self.timers:
            if timer.running and isinstance(timer.below, AsyncGenerator):
                with suppress(RuntimeError):  # that it is read just now
                    await timer.below.aclose()


_owner: ContextVar[Scope | None] = ContextVar("owner", default=None)
"""The request whose agent's code is running."""
_own = _owner.set
_now = time.perf_counter
_scopes: set[Scope] = set()


class _LoopClock:
    """When the event loop was last seen to go on: a long time since then is one in which no request went on."""

    def __init__(self) -> None:
        self.seen_s = 0.0

    def check(self, since_s: float, agents: Iterable[str]) -> None:
        """Log that the loop was blocked, if it was: since `since_s` at the earliest, while the code of `agents` ran."""
        now = _now()
        blocked_s, self.seen_s = now - max(since_s, self.seen_s), now
        if blocked_s >= BLOCKED_S and (names := " or ".join(sorted(set(agents)))):
            message = "agent %s blocked the process, and with it every request, for %.1f s; await what takes long"
            logger.warning(f"{message}, or use a thread", names, blocked_s)


_clock = _LoopClock()


def _look() -> bool:
    now = time.perf_counter()
    _clock.check(0.0, (timer.name for scope in _scopes for timer in scope.timers if timer.busy))
    for scope in list(_scopes):
        scope.check(now)
    return bool(_scopes)


_sweeper = Sweeper(SWEEP_S, _look)


def _watch(scope: Scope) -> None:
    if not _scopes:
        _clock.seen_s = _now()
    _scopes.add(scope)
    _sweeper.wake()


def make_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
    """A task factory for the event loop: what an agent's code starts, by any means, belongs to its request."""
    scope = _owner.get()
    if scope is None:
        return asyncio.Task(work, loop=loop, **options)
    task = asyncio.Task(_Contained(work), loop=loop, **options)
    scope.own(task)
    return task


class _Contained(Coroutine[Any, Any, Any]):
    """The coroutine of a task in which what ends more than itself is an error like any other.

    `SystemExit` and `KeyboardInterrupt`, raised by any task, end the event loop. `GeneratorExit`, raised by what a task
    awaits, does not arrive where it is awaited: Python closes all coroutines of the task but the outermost.
    """

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self.__qualname__ = getattr(work, "__qualname__", type(work).__name__)

    def send(self, value: Any) -> Any:
        try:
            return self._work.send(value)
        except _ENDING as exc:
            raise _contained(exc) from exc

    def throw(self, error: Any, *more: Any) -> Any:
        try:
            return self._work.throw(_contained(error) if isinstance(error, GeneratorExit) else error, *more)
        except _ENDING as exc:
            raise _contained(exc) from exc

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._work.__await__()


_ENDING = (SystemExit, KeyboardInterrupt, GeneratorExit)


def _contained(exc: BaseException) -> RuntimeError:
    error = RuntimeError(f"{type(exc).__name__} was raised")
    error.__cause__ = exc
    return error


def _shown(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", task.get_name())
