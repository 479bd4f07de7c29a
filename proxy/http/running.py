"""The requests that are being processed, and how one of them is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from llama_smart_proxy.proxy.chat import Json, RequestRecord
from llama_smart_proxy.proxy.http.headers import RECORD, shown_path

END_S = 2.0
"""Longest wait for a cancelled request to end, in seconds."""


class Running:
    """The requests that are being processed, oldest first: `requests` by the task that processes each.

    Clients choose their ids, which need not be unique.
    """

    def __init__(self) -> None:
        self.requests: dict[asyncio.Task[Any] | None, web.BaseRequest] = {}

    def shown(self, client: str | None = None) -> list[Json]:
        """One object for each request, but for the one that asks; with `client` for those with the API key of that
        name, none if it is empty. `state` is `waiting` before its model is known,
        `queued` until its server answers, `answering` before the first byte and `streaming` then; `seconds` is how long
        ago it came."""
        now, asking = time.monotonic(), asyncio.current_task()
        return [
            _shown(http, now)
            for task, http in self.requests.items()
            if task is not asking and (client is None or (client and http[RECORD].client == client))
        ]

    def find(self, request_id: str) -> dict[asyncio.Task[Any], web.BaseRequest]:
        """The requests with this id, but for the one that asks."""
        asking = asyncio.current_task()
        return {
            task: http
            for task, http in self.requests.items()
            if task is not None and task is not asking and http[RECORD].request_id == request_id
        }


async def cancel(found: Mapping[asyncio.Task[Any], web.BaseRequest]) -> None:
    """Cancel these requests, and return when they have ended, or after `END_S` seconds, as for clients that do not read
    the end. A client gets the error `Cancelled`; its connection is closed if it has been cancelled before."""
    for task, http in found.items():
        http[RECORD].cancelled = True
        task.cancel()
    await asyncio.wait(found, timeout=END_S)


def _shown(http: web.BaseRequest, now: float) -> Json:
    record = http[RECORD]
    return {
        "id": record.request_id,
        "method": record.method,
        "path": shown_path(http),
        "api": record.api,
        "key": record.client,
        "model": record.model if record.model != "-" else None,
        "backend": record.backend or None,
        "agents": list(record.agents),
        "state": _state(http, record),
        "seconds": round(now - record.arrived_s, 3),
    }


def _state(http: web.BaseRequest, record: RequestRecord) -> str:
    if record.first_byte_s:
        return "streaming"
    if record.sent_s:
        return "answering"
    if record.resolved_s:
        return "queued"
    return "streaming" if http.writer.output_size > 0 else "waiting"  # events, or the progress of a pull
