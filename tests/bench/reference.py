"""The plainest proxy aiohttp can be asked for, to show what the relay saves: `... reference PORT UPSTREAM_PORT`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

SESSION = web.AppKey("session", aiohttp.ClientSession)
KEPT = ("Content-Type", "Content-Length")


async def forward(request: web.Request) -> web.StreamResponse:
    url = f"http://127.0.0.1:{sys.argv[2]}{request.raw_path}"
    headers = {"Content-Type": request.headers["Content-Type"]}
    async with request.app[SESSION].post(url, data=await request.read(), headers=headers) as upstream:
        kept = {name: upstream.headers[name] for name in KEPT if name in upstream.headers}
        response = web.StreamResponse(status=upstream.status, headers=kept)
        await response.prepare(request)
        async for piece in upstream.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def session(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app[SESSION]:
        yield


def main() -> None:
    app = web.Application()
    app.router.add_post("/{path:.*}", forward)
    app.cleanup_ctx.append(session)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
