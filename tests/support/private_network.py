"""A program for a network namespace of its own: fetches from listeners on private addresses there, with a fetcher as it
is and with one that may."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

from llama_smart_proxy.proxy.fetching import Fetcher, FetchError

ADDRESSES = [
    "10.1.2.3",
    "172.16.5.5",
    "192.168.9.9",
    "100.64.0.7",
    "169.254.169.254",
    "198.18.0.1",
    "fd00::7",
    "fec0::1",
]
PORT = 8080
_ANY = ("0.0.0.0", "::") if Path("/proc/net/if_inet6").exists() else ("0.0.0.0",)
MORE = ["[::ffff:10.1.2.3]", "[64:ff9b::10.1.2.3]", "[2002:0a01:0203::1]", "0xa010203", "167838211", "10.1.515"]


async def main(addresses: list[str]) -> None:
    """Print these addresses and those where each fetcher has connected to, as JSON."""
    connections: list[str] = []

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer.get_extra_info("sockname")[0])
        writer.close()

    servers = [await asyncio.start_server(heard, host, PORT) for host in _ANY]
    found = [addresses]
    for allowed in ([], ["0.0.0.0/0", "::/0"]):
        fetcher = Fetcher(allow_private=allowed)
        for host in [*(f"[{address}]" if ":" in address else address for address in addresses), *MORE]:
            try:
                await fetcher.get(f"http://{host}:{PORT}/")
            except FetchError:
                continue
        await fetcher.close()
        found.append(sorted(set(connections)))
        connections.clear()
    for server in servers:
        server.close()
    print(json.dumps(found))


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    add = ("ip", "address", "add")
    asyncio.run(main([address for address in ADDRESSES if not subprocess.run([*add, address, "dev", "lo"]).returncode]))
