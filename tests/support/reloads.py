"""A running proxy whose configuration file a test changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import raw_client
from tests.support.harness import Proxy, running_proxy


@dataclass
class Reloadable:
    """The proxy, its file, and what was written there when it was started."""

    proxy: Proxy
    file: Path
    config: Mapping[str, Any]

    def write(self, **sections: Any) -> None:
        """Replace the file, at once, by what it was at the start, with these sections in place of its own; None leaves
        one out."""
        whole = {**self.config, **sections}
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({name: value for name, value in whole.items() if value is not None}))
        new.rename(self.file)

    async def reload(self) -> dict[str, Any]:
        """The answer of `POST /admin/reload`, which is what has changed."""
        answer = await raw_client.post(self.proxy.port, "/admin/reload", b"")
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    async def apply(self, **sections: Any) -> dict[str, Any]:
        """`write`, then `reload`."""
        self.write(**sections)
        return await self.reload()

    async def refused(self) -> list[str]:
        """The problems that it reports, without the folder of the file."""
        answer = await raw_client.post(self.proxy.port, "/admin/reload", b"")
        error = answer.json()["error"]
        assert answer.status == 400 and error["code"] == "invalid_configuration", answer.body
        return [problem.replace(f"{self.file.parent}/", "") for problem in error["problems"]]


@asynccontextmanager
async def reloadable(
    config: Mapping[str, Any],
    folder: Path,
    *,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    within: Sequence[str] = (),
) -> AsyncIterator[Reloadable]:
    """A proxy with this configuration, in a file in `folder`; see `running_proxy`."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    async with running_proxy(config, beside=folder, env=env, args=args, within=within) as proxy:
        file = folder / "config.yaml"
        yield Reloadable(proxy, file, json.loads(await asyncio.to_thread(file.read_text)))
