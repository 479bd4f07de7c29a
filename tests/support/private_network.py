"""A program for a network namespace of its own: tries to fetch from listeners on private addresses there, and prints
which connections they got, for a fetcher as it is and for one that may."""

from __future__ import annotations

import asyncio
import json
import subprocess

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
MORE = ["[::ffff:10.1.2.3]", "[64:ff9b::10.1.2.3]", "[2002:0a01:0203::1]", "0xa010203", "167838211", "10.1.515"]


async def main() -> None:
    """Print the connections of both fetchers, as JSON."""
    connections: list[str] = []

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer.get_extra_info("sockname")[0])
        writer.close()

    servers = [await asyncio.start_server(heard, host, PORT) for host in ("0.0.0.0", "::")]
    found = []
    for allowed in ([], ["0.0.0.0/0", "::/0"]):
        fetcher = Fetcher(allow_private=allowed)
        for host in [*(f"[{address}]" if ":" in address else address for address in ADDRESSES), *MORE]:
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
    for address in ADDRESSES:
        subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True)
    asyncio.run(main())
