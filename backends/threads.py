"""Runs blocking calls outside of the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from llama_smart_proxy.proxy.errors import StartFailed

T = TypeVar("T")


async def run_in_thread(call: Callable[[], T]) -> T:
    """The result of `call()`, run in a new daemon thread.

    Not in an executor: its threads are joined at exit, which a large download would delay, and long calls would block
    others in its queue. If the caller is cancelled, the call continues, and its result is dropped.

    Raises: what `call` raises; `StartFailed` (code `spawn_failed`) if no thread can be started.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a T whenever there is no error

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except StopIteration as exc:  # which no future takes
            error = RuntimeError("StopIteration was raised in a thread")
            error.__cause__ = exc
        except BaseException as exc:  # re-raised in the caller
            error = exc
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as exc:
        raise StartFailed("The system refused to start another thread.", code="spawn_failed") from exc
    return await future
