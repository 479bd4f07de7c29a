"""The packaged units under a real systemd, in a container that is booted from this host's own /usr."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import BOOT_S, Machine, obstacle

DENIED = (
    "write /usr",
    "write /etc",
    "write /boot",
    "write /opt",
    "read /etc/shadow",
    "read /home",
    "read a credential's source",
    "make a user namespace",
    "mount",
    "trace a process",
    "raw socket",
    "packet socket",
)
ALLOWED = ("read a credential", "write its state", "write its models", "read a model")
REFUSED, SERVED = [True, "failed", "0"], [0, "active", 200]
EXPECTED = {
    "ready without its models, which it then shows": [0, "active", "running", 200],
    "reloaded, and not with a bad configuration, beside a stream": [0, [True, "degraded"], True, "whole"],
    "restarted and killed without a refused connection": [["200"], 0, True],
    "no child left of one that was killed": [1, 0, 200],
    "one that hangs is replaced by the watchdog": [True, 1, 0, 200],
    "stopped behind a stream": ["whole", [1, 0], "success", "0", 200],
    "keys from credentials": [0, 401, 200],
    "not restarted with statuses 78 and 2": [[*REFUSED, "78"], SERVED, [*REFUSED, "2"], SERVED],
    "confined": dict.fromkeys(DENIED, "denied") | dict.fromkeys(ALLOWED, "allowed"),
}


def booted(folder: Path, checks: str, deadline_s: float) -> tuple[dict[str, Any], str]:
    """What the checks found in a machine that was booted for them, and what it said meanwhile."""
    folder.mkdir()
    machine = Machine(folder, checks)
    with machine.running() as process, suppress(subprocess.TimeoutExpired):
        process.wait(deadline_s)
    assert machine.left() == []
    return machine.facts(), machine.said()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_service_keeps_its_promises_under_a_real_systemd(tmp_path: Path) -> None:
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    try:
        found, said = booted(tmp_path / "trial", "tests.support.service_checks sandbox", BOOT_S)
    except OSError as exc:
        pytest.skip(f"requires control groups that can be made: {exc}")
    if found != {"sandbox": 0}:
        pytest.skip(f"systemd cannot be booted in a container here, or confines no services there: {said[-1000:]}")
    found, said = booted(tmp_path / "machine", "tests.support.service_checks", 400.0)
    assert found == EXPECTED, said
