"""A system that has no more threads for a moment fails what requires one then, and nothing later."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from llama_smart_proxy.proxy.http.aside import Worker, in_thread
from llama_smart_proxy.proxy.http.hosts import Hosts
from llama_smart_proxy.proxy.http.memory import GROWTH_BYTES, Memory
from llama_smart_proxy.proxy.store import Store
from tests.support.harness import until


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on no thread can be started; until what it returns is called."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return monkeypatch.undo


async def long_work(worker: Worker) -> int:
    return await in_thread(abs, -1, urgent=False, worker=worker)


async def stored(store: Store) -> int:
    return await store.run(lambda sql: 1)


@pytest.mark.parametrize(("kind", "use"), [(Worker, long_work), (partial(Store, None), stored)])
async def test_what_could_not_get_its_thread_gets_it_the_next_time(
    kind: Callable[[], Any], use: Callable[[Any], Awaitable[int]], no_threads: Callable[[], None]
) -> None:
    user = kind()
    with pytest.raises(RuntimeError, match="start new thread"):
        await use(user)
    no_threads()
    assert await use(user) == 1


async def test_memory_is_given_back_once_there_is_a_thread_again(no_threads: Callable[[], None]) -> None:
    calls: list[int] = []
    memory = Memory(lambda: calls.append(1))
    memory._least -= GROWTH_BYTES + 1
    memory.check(idle=True)
    assert calls == []
    no_threads()
    memory.check(idle=True)
    await until(lambda: calls == [1])


async def test_a_proxy_starts_without_a_thread_for_its_full_name(no_threads: Callable[[], None]) -> None:
    hosts = Hosts([])
    hosts.learn_own()
    assert hosts.serve("localhost")
