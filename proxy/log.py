"""Logging to stderr: the journal or the terminal takes it from there."""

from __future__ import annotations

import logging
import sys

from llama_smart_proxy.proxy.chat import RequestRecord

access = logging.getLogger("proxy.access")
LEVELS = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Send the program's log to stderr at `level`, one of `LEVELS`."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.raiseExceptions = False  # a log that cannot be written must not disturb the stream being served


def access_line(record: RequestRecord) -> None:
    """The access line of a request that has ended."""
    if access.isEnabledFor(logging.INFO):
        spent_ms = (record.ended_s - record.arrived_s) * 1000
        access.info(
            "%s %s %d model=%s %.0f ms %s",
            record.method, record.path, record.status, shown(record.model), spent_ms, record.request_id,
        )  # fmt: skip


def shown(name: str) -> str:
    """A client's name of something for a log line: what is not printable ASCII would forge lines."""
    name = name[:255]
    return name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
