"""The guarded client in a network of its own, which has the private addresses that this machine has not."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("unshare", "--map-root-user", "--net")


@cache
def networks() -> bool:
    """Whether a process may have a network of its own."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


async def test_no_private_address_of_a_network_is_connected_to() -> None:
    if not networks():
        pytest.skip("needs `ip`, `unshare` and the right to make network namespaces")
    process = await asyncio.create_subprocess_exec(
        *(*ALONE, sys.executable, "-m", "tests.support.private_network"),
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=subprocess.PIPE,
    )
    output, _ = await process.communicate()
    addresses, guarded, allowed = json.loads(output)
    assert guarded == [] and set(allowed) >= set(addresses) and "10.1.2.3" in addresses
