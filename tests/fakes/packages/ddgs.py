"""Stands in for the package ddgs, which asks public search engines. What a query finds depends on its text."""

from __future__ import annotations

import logging
import threading
from typing import Any

gate = threading.Event()
"""Searches for `slow` wait for it."""
calls: list[tuple[int, str, dict[str, Any]]] = []
"""Timeout, query and options of each search."""


class DDGS:
    """Source: ddgs 9.16, README."""

    def __init__(self, timeout: int = 5) -> None:
        self.timeout = timeout

    def text(self, query: str, **options: Any) -> list[dict[str, str]]:
        """Pages for `query`. Raises: an exception, if it finds nothing."""
        logging.getLogger("ddgs.ddgs").info("Error in engine %s: %r", "x", f"https://search.example/?q={query}")
        calls.append((self.timeout, query, options))
        if query == "slow":
            gate.wait(60)
        if query == "nothing":
            raise RuntimeError("No results found.")
        if query == "broken":
            raise TimeoutError(f"https://search.example/?q={query}")
        return [{"href": "http://found.example/", "title": f"About {query}", "body": "A page that was found."}]
