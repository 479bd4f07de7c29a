"""Servers whose pages are fetched, and who fetches them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from llama_smart_proxy.proxy.fetching import Fetcher, Pages
from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader
from tests.support.harness import free_port
from tests.support.toxic import Link, RawUpstream, Request, head, raw_upstream

LOCAL = ("127.0.0.0/8",)
HTML = ("Content-Type", "text/html; charset=UTF-8")
PAGE = head(200, [HTML, ("Content-Length", "2")]) + b"ok"
MISSING = head(404, [("Content-Length", "0")])
TEXT = "text/plain"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = _has_ipv6()
"""Whether this machine has the address ::1."""


@asynccontextmanager
async def fetching(fetcher: Fetcher) -> AsyncIterator[Fetcher]:
    """The fetcher, closed at the end."""
    try:
        yield fetcher
    finally:
        await fetcher.close()


@asynccontextmanager
async def canaries() -> AsyncIterator[tuple[int, list[str]]]:
    """Listeners on all of 127/8 and on ::1 at one port, and the addresses at which they got connections."""
    connections: list[str] = []

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer.get_extra_info("sockname")[0])
        writer.write(PAGE)
        writer.close()

    port = free_port()
    async with AsyncExitStack() as stack:
        for host in ("0.0.0.0", "::1") if HAS_IPV6 else ("0.0.0.0",):
            await stack.enter_async_context(await asyncio.start_server(heard, host, port))
        yield port, connections


def sent(body: str | bytes, media_type: str = TEXT, *more: tuple[str, str], status: int = 200) -> bytes:
    """An answer with this body and more headers."""
    data = body.encode() if isinstance(body, str) else body
    return head(status, [("Content-Type", media_type), ("Content-Length", str(len(data))), *more]) + data


def path_of(request: Request) -> str:
    """The path of its URL, with the query."""
    return request.line.split()[1]


@asynccontextmanager
async def site(paths: Mapping[str, bytes], host: str = "127.0.0.1") -> AsyncIterator[tuple[RawUpstream, str]]:
    """A server with these answers, and its URL."""

    async def script(link: Link, request: Request) -> None:
        await link.send(paths.get(path_of(request), MISSING))

    async with raw_upstream(script, host=host) as server:
        yield server, f"http://{host}:{server.port}"


@asynccontextmanager
async def reading() -> AsyncIterator[Pages]:
    """Pages of this machine, without pauses between them."""
    pages = Pages(Fetcher(ports=None, allow_private=LOCAL), DocumentReader(), pause_s=0.0)
    try:
        yield pages
    finally:
        await pages.close()
