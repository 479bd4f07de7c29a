"""What the observers of requests cost: `python -m tests.bench.observers` prints microseconds per request, in processor
time, each the best of several runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.dialects import OPENAI
from llama_smart_proxy.proxy.log.access import AccessLog
from llama_smart_proxy.proxy.log.formats import Json, Logfmt, Text
from llama_smart_proxy.proxy.log.writer import Writer
from llama_smart_proxy.proxy.metrics import Metrics

REQUESTS, RUNS = 20_000, 7
_HEAD = b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" hello"}}],"created":1764537000,'
_TAIL = b'"id":"chatcmpl-Zbcdefghijklmnopqrstuvwxyz012345","model":"smollm2","object":"chat.completion.chunk"'
LAST_FRAMES = (
    _HEAD + _TAIL + b"}\n\n" + _HEAD + _TAIL + b',"timings":{"cache_n":10,"prompt_n":31,"prompt_ms":57.12,'
    b'"prompt_per_token_ms":1.84,"prompt_per_second":542.7,"predicted_n":64,"predicted_ms":1021.4,'
    b'"predicted_per_token_ms":15.9,"predicted_per_second":62.6}}\n\ndata: [DONE]\n\n'
)


class Nowhere(Writer):
    """Takes lines, and drops them."""

    def __init__(self) -> None:
        """It has no thread."""

    def hold(self, line: str) -> None:
        """Drop it."""


def ended() -> RequestRecord:
    """The record of a streamed chat with llama-server."""
    now = time.monotonic()
    record = RequestRecord(now, now + 0.0003, {}, "91e84acd-5f", "POST", "/v1/chat/completions", "openai")
    record.model, record.backend, record.slot, record.status = "smollm2", "llama.cpp", True, 200
    record.resolved_s, record.first_byte_s, record.last_byte_s = now + 0.0001, now + 0.05, now + 1.0
    record.ended_s, record.count_usage = now + 1.01, partial(OPENAI.usage, LAST_FRAMES)
    return record


def microseconds(observe: Callable[[RequestRecord], object], records: list[RequestRecord]) -> float:
    """The processor time of one call, in the best of the runs."""
    best = float("inf")
    for _ in range(RUNS):
        begun = time.process_time()
        for record in records:
            observe(record)
        best = min(best, time.process_time() - begun)
    return best / len(records) * 1e6


def main() -> None:
    records = [ended() for _ in range(REQUESTS)]
    print(f"token counts, parsed once   {microseconds(lambda record: record.count_usage(), records):5.1f}")  # type: ignore[misc]
    for record in records:
        _ = record.usage
    print(f"metrics                     {microseconds(Metrics(lambda name: True).observe, records):5.1f}")
    for form in (Text(), Logfmt(), Json()):
        log = AccessLog()
        log.connect(Nowhere(), form)
        print(f"line of the log, {type(form).__name__:<10} {microseconds(log.line, records):5.1f}")


if __name__ == "__main__":
    main()
