"""A terminal that a proxy runs in, and that can be closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

BECOME = """
import os, sys
os.setsid()
os.open(sys.argv[1], os.O_RDWR)  # that makes it the controlling terminal
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Terminal:
    """`within` is for `running_proxy`."""

    def __init__(self) -> None:
        self._ours, self._theirs = os.openpty()
        self.within: Sequence[str] = (sys.executable, "-c", BECOME, os.ttyname(self._theirs))

    def close(self) -> None:
        """As its window does; the kernel then sends SIGHUP."""
        for fd in (self._ours, self._theirs):
            with suppress(OSError):
                os.close(fd)
        self._ours = self._theirs = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()
