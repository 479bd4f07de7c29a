"""Limits of keys: requests and tokens in a minute (token buckets), and requests at one time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from aiohttp import web

from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.dialects.limits import Allowance
from llama_smart_proxy.proxy.errors import Overloaded

MINUTE_S = 60.0
BYTES_PER_TOKEN = 4
"""Of a request whose tokens were not counted, as its client left before its end: roughly those of its prompt."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a key; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class Bucket:
    """What is left of a limit, which refills steadily within a minute; full at first. Negative if more was used than
    there was, as with tokens, which are known only afterwards."""

    __slots__ = ("_at_s", "_level")

    def __init__(self) -> None:
        self._level = math.inf
        self._at_s = 0.0

    def level(self, limit: int, now_s: float) -> float:
        """What is left at this time of `time.monotonic()`; the limit may be another one than before."""
        self._level = min(float(limit), self._level + (now_s - self._at_s) * limit / MINUTE_S)
        self._at_s = now_s
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount


class _Used:
    """What one key has used."""

    def __init__(self) -> None:
        self.requests = Bucket()
        self.tokens = Bucket()
        self.running = 0


class Counters:
    """What each key has used, by its name. They live as long as the process, and so outlive a reload."""

    def __init__(self) -> None:
        self._by_client: dict[str, _Used] = {}

    def visit(self, client: str, limits: Limits) -> Visit:
        """One request of this client."""
        return Visit(client, limits, self._by_client.setdefault(client, _Used()))


class Visit:
    """One request of a key with limits, from `enter` to `leave`."""

    def __init__(self, client: str, limits: Limits, used: _Used) -> None:
        self._client = client
        self._limits = limits
        self._used = used
        self._entered = False

    def enter(self) -> None:
        """Count the request. Raises: Overloaded 429 if a limit is reached; then it is not counted."""
        now, limits, used = time.monotonic(), self._limits, self._used
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        if requests is not None and (level := used.requests.level(requests, now)) < 1:
            raise self._refusal(f"{requests} requests in a minute", (1 - level) * MINUTE_S / requests)
        if tokens is not None and (level := used.tokens.level(tokens, now)) <= 0:
            raise self._refusal(f"{tokens} tokens in a minute", -level * MINUTE_S / tokens)
        if limits.concurrent is not None and used.running >= limits.concurrent:
            raise self._refusal(f"{limits.concurrent} requests at one time", 0)
        used.requests.take(1 if requests is not None else 0)
        used.running += 1
        self._entered = True

    def _refusal(self, limit: str, wait_s: float) -> Overloaded:
        seconds = max(1, math.ceil(wait_s))
        message = f"the API key {self._client} has reached its limit of {limit}; try again in {seconds} s"
        return Overloaded(message, code="rate_limit_exceeded", retry_after_s=seconds, status=429)

    def leave(self, http: web.BaseRequest, record: RequestRecord) -> None:
        """The request has ended, in any way: it takes no place any more, and its tokens are known."""
        if self._entered:
            self._entered = False
            self._used.running -= 1
            if self._limits.tokens_per_minute is not None:
                self._used.tokens.take(_tokens(http, record))

    def allowances(self) -> list[Allowance]:
        """What is left now."""
        now, limits, found = time.monotonic(), self._limits, []
        kinds = ("requests", limits.requests_per_minute, self._used.requests)
        for kind, limit, bucket in (kinds, ("tokens", limits.tokens_per_minute, self._used.tokens)):
            if limit is not None:
                level = bucket.level(limit, now)
                found.append(Allowance(kind, limit, max(0, math.floor(level)), (limit - level) * MINUTE_S / limit))
        return found


def _tokens(http: web.BaseRequest, record: RequestRecord) -> int:
    """The tokens of the prompt and of all answers, as the servers counted them."""
    usage = record.usage
    if usage is None:
        return record.side_tokens + ((http.content_length or 0) // BYTES_PER_TOKEN if record.sent_s else 0)
    counted = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return record.side_tokens + sum(max(0, count) for count in counted if isinstance(count, int))
