"""How a process is ended: by a command of its own, by SIGTERM, by SIGKILL."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from llama_smart_proxy.backends.pool.launcher import Command
from llama_smart_proxy.backends.pool.messages import describe_exit
from llama_smart_proxy.backends.pool.spawn import Child, spawn
from llama_smart_proxy.proxy.errors import StartFailed

logger = logging.getLogger(__name__)

STOP_SHARE = 0.75
"""The part of the time that the command that ends a server has, before the signals."""
LOST_S = 5.0
"""Seconds after its SIGKILL in which a process must be gone; then the kernel cannot end it, and we continue without."""


async def end(name: str, child: Child, command: Command, grace_s: float, printed: Callable[[bytes], None]) -> None:
    """Return once the process is reaped, or will not be. `printed` gets the output of the command that ends it.

    Within `grace_s` seconds: its `stop` command, if it has one, SIGTERM, SIGTERM once more; then SIGKILL.
    """
    begun = time.monotonic()
    if command.stop is not None and child.returncode is None and grace_s > 0:
        await _stop_by_command(name, child, command, grace_s * STOP_SHARE, printed)
    left_s = grace_s - (time.monotonic() - begun)
    for patience_s in (left_s / 4, left_s * 3 / 4):
        if child.returncode is None and patience_s > 0:
            child.terminate()
            if await _ended(child, patience_s):
                return
    child.kill()
    if not await _ended(child, LOST_S):
        logger.error("%s: process %d does not end; its place goes to others", name, child.pid)


async def _ended(child: Child, limit_s: float) -> bool:
    """Whether it is reaped within `limit_s` seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await child.wait()
            return True
    return False


async def _stop_by_command(
    name: str, child: Child, command: Command, limit_s: float, printed: Callable[[bytes], None]
) -> None:
    """Run the command that ends the server, and wait for both to end, at most `limit_s` seconds."""
    assert command.stop is not None
    try:
        argv, confined = command.stop(child.pid), command.confined
        stopper = spawn(argv, command.env, printed, lambda returncode: None, confined=confined)
    except StartFailed as exc:
        logger.warning("%s: the command that stops it was not run: %s", name, exc.message)
        return
    try:
        async with asyncio.timeout(limit_s):
            returncode = await stopper.wait()
            if returncode != 0:
                logger.warning("%s: the command that stops it %s", name, describe_exit(returncode))
            else:
                await child.wait()
    except TimeoutError:
        running = "does not end" if stopper.returncode is None else "has not ended it"
        logger.warning("%s: the command that stops it %s within %g s", name, running, limit_s)
    finally:
        if stopper.returncode is None:
            stopper.kill()
            await stopper.wait()
