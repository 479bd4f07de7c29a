"""Logging to stderr: the journal or the terminal takes it from there."""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


def configure(level: str) -> None:
    """Send the program's log to stderr at `level`, one of `LEVELS`."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", force=True
    )
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.raiseExceptions = False  # a log that cannot be written must not disturb the stream being served
