"""Limits of keys: requests and tokens in a minute (token buckets), and requests at one time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.dialects.limits import Allowance
from llama_smart_proxy.proxy.errors import Overloaded

MINUTE_S = 60.0
BYTES_PER_TOKEN = 4
"""Of a prompt whose tokens were not counted, as its client left before the end of the answer: an estimate."""
TOKENS_PER_S = 20.0
"""Speed of a model that has not completed an answer yet, for the same estimate."""
_MOST_MODELS = 1000


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
        self._speeds: dict[str, float] = {}

    def visit(self, client: str, limits: Limits) -> Visit:
        """One request of this client."""
        return Visit(client, limits, self._by_client.setdefault(client, _Used()), self.tokens_of)

    def tokens_of(self, record: RequestRecord, size: int) -> int:
        """The tokens of a request of `size` bytes that has ended, and of all answers to it, as the servers counted
        them. Without a count, which comes at the end of an answer, they are estimated: by the time that the model
        generated, and its speed in its last answer."""
        usage = record.usage
        prompt, completion = (
            (usage.get(name) for name in ("prompt_tokens", "completion_tokens")) if usage else (None, None)
        )
        end_s = record.last_byte_s or record.ended_s
        began_s = record.first_byte_s if 0 < record.first_byte_s < end_s else record.sent_s
        seconds = max(0.0, end_s - began_s) if record.sent_s else 0.0
        if isinstance(completion, int) and completion > 0:
            if seconds > 0:
                self._learn(record.model, completion / seconds)
        elif usage is None:
            completion = int(seconds * self._speeds.get(record.model, TOKENS_PER_S))
            prompt = size // BYTES_PER_TOKEN if record.sent_s else 0
        counted = (prompt, completion, record.side_tokens)
        return sum(max(0, count) for count in counted if isinstance(count, int))

    def _learn(self, model: str, speed: float) -> None:
        if len(self._speeds) >= _MOST_MODELS:
            self._speeds.clear()
        self._speeds[model] = speed


class Visit:
    """One request of a key with limits, from `enter` to `leave`."""

    def __init__(
        self, client: str, limits: Limits, used: _Used, tokens_of: Callable[[RequestRecord, int], int]
    ) -> None:
        self._client = client
        self._tokens_of = tokens_of
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

    def leave(self, record: RequestRecord, size: int) -> None:
        """The request, of `size` bytes, has ended, in any way: it takes no place any more, and its tokens are known."""
        if self._entered:
            self._entered = False
            self._used.running -= 1
            if self._limits.tokens_per_minute is not None:
                self._used.tokens.take(self._tokens_of(record, size))

    def allowances(self) -> list[Allowance]:
        """What is left now."""
        now, limits, found = time.monotonic(), self._limits, []
        kinds = ("requests", limits.requests_per_minute, self._used.requests)
        for kind, limit, bucket in (kinds, ("tokens", limits.tokens_per_minute, self._used.tokens)):
            if limit is not None:
                level = bucket.level(limit, now)
                found.append(Allowance(kind, limit, max(0, math.floor(level)), (limit - level) * MINUTE_S / limit))
        return found
