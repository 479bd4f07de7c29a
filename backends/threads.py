"""Blocking calls, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from llama_smart_proxy.proxy.errors import StartFailed

T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """The result of `call()`, made in a daemon thread of its own.

    Not an executor: its threads are joined at exit, and a download of many gigabytes would hold that up; nor could it
    block calls of others there. When the caller is cancelled the call goes on, unheard.

    Raises: what `call` raises; `StartFailed` (code `spawn_failed`) when there can be no more threads.
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
        result, error = None, None
        try:
            result = call()
        except BaseException as exc:  # the border to the thread: all of it goes to the caller
            error = exc
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as exc:
        raise StartFailed("The system refused to start another thread.", code="spawn_failed") from exc
    return await future
