"""Token buckets of API keys, and the headers that report them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.access.limits import Bucket, Counters, Limits
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.dialects.limits import Allowance, anthropic_headers, duration, openai_headers
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.laws import law


@law(400)
@given(
    limit=st.integers(1, 100_000),
    steps=st.lists(st.tuples(st.floats(0, 600), st.floats(0, 5000)), max_size=20),
)
def test_a_bucket_refills_steadily_and_never_beyond_its_limit(limit: int, steps: list[tuple[float, float]]) -> None:
    bucket, now, spent = Bucket(), 1000.0, 0.0
    for pause, amount in steps:
        now += pause
        level = bucket.level(limit, now)
        assert level <= limit
        assert level <= limit + (now - 1000.0) * limit / 60 - spent + 1e-6 * limit * 600
        bucket.take(amount)
        spent += amount
    bucket.take(max(0.0, bucket.level(limit, now)))
    assert bucket.level(limit, now) <= 0
    owed = -bucket.level(limit, now)
    assert bucket.level(limit, now + 60 * (owed / limit + 1) + 0.001) == limit


def test_a_bucket_follows_a_new_limit() -> None:
    bucket = Bucket()
    assert bucket.level(600, 5.0) == 600
    assert bucket.level(60, 5.0) == 60
    assert bucket.level(600, 65.0) == 600


@pytest.mark.parametrize(
    ("limits", "entered"),
    [(Limits(requests_per_minute=3), 3), (Limits(concurrent=2), 2), (Limits(requests_per_minute=1, concurrent=5), 1)],
)
def test_no_more_enter_than_a_limit_lets_in_also_over_a_reload(limits: Limits, entered: int) -> None:
    counters = Counters()
    for _ in range(entered):
        counters.visit("a", limits).enter()
    for _ in range(3):
        with pytest.raises(Overloaded) as refusal:
            counters.visit("a", limits).enter()
        assert (refusal.value.status, refusal.value.code) == (429, "rate_limit_exceeded")
        assert refusal.value.retry_after_s is not None and refusal.value.retry_after_s >= 1
    counters.visit("b", limits).enter()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.017, "17ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (90.5, "1m30.5s"),
        (360, "6m0s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_each_api_has_its_own_headers() -> None:
    left = [Allowance("requests", 60, 59, 1.0), Allowance("tokens", 100, 0, 60.0)]
    assert openai_headers(left)[:3] == [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1s"),
    ]
    names = [name for name, _ in anthropic_headers(left)]
    assert names == [
        f"anthropic-ratelimit-{kind}-{what}"
        for kind in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", dict(anthropic_headers(left))["anthropic-ratelimit-tokens-reset"]
    )


def record(**fields: object) -> RequestRecord:
    """Of a request that was sent at the second 10 and has ended at the second 20."""
    times = {"sent_s": 10.0, "first_byte_s": 12.0, "ended_s": 20.0, "model": "m"}
    return RequestRecord(9.0, **{**times, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"counted": {"prompt_tokens": 30, "completion_tokens": 10}, "last_byte_s": 17.0}, 40),
        ({"counted": {"prompt_tokens": 30, "completion_tokens": 10}, "side_tokens": 7}, 47),
        ({"counted": {"prompt_tokens": 3}}, 3),
        ({"counted": {"prompt_tokens": "3", "completion_tokens": None}}, 0),
        ({}, 8 * 50 + 100),  # a stream that its client has left after 8 seconds
        ({"first_byte_s": 0.0}, 10 * 50 + 100),  # a whole answer
        ({"model": "other"}, 8 * 20 + 100),
        ({"sent_s": 0.0, "first_byte_s": 0.0}, 0),  # refused, or left before it was sent
    ],
)
def test_tokens_are_those_that_were_counted_or_else_estimated(fields: dict[str, object], tokens: int) -> None:
    counters = Counters()
    learned = record(counted={"prompt_tokens": 1, "completion_tokens": 250}, last_byte_s=17.0)
    assert counters.tokens_of(learned, 400) == 251
    assert counters.tokens_of(record(**fields), 400) == tokens
