"""Names of hosts are resolved as for the proxy's own servers: in a thread of their own, which delays nothing else."""

from __future__ import annotations

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from llama_smart_proxy.backends.http.resolver import resolver


class Names(AbstractResolver):
    """The resolver of this process, for aiohttp."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of `host`. Raises: OSError."""
        return [
            ResolveResult(
                hostname=host, host=address[0], port=port, family=found, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for found, _, protocol, _, address in await resolver.addresses(host, port)
            if family in (socket.AF_UNSPEC, found)
        ]

    async def close(self) -> None:
        """The resolver stays."""
