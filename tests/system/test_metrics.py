"""`GET /metrics`: what is counted, and that its labels are bounded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.metrics import Metrics
from llama_smart_proxy.proxy.metrics.counts import MOST_CODES, MOST_MODELS, MOST_SERIES
from llama_smart_proxy.proxy.metrics.export import Now, collected, encoded
from tests.support import raw_client, toxic
from tests.support.harness import Proxy
from tests.support.reloads import reloadable
from tests.support.stages import Stage
from tests.support.toxic import RawUpstream

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def samples(body: bytes) -> Iterator[Sample]:
    for family in text_string_to_metric_families(body.decode()):
        yield from family.samples


async def scraped(proxy: Proxy) -> dict[str, float]:
    """All samples, by name and labels as they are written."""
    answer = await raw_client.get(proxy.port, "/metrics")
    assert answer.status == 200
    return {f"{sample.name}{sorted(sample.labels.items())}": sample.value for sample in samples(answer.body)}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What has changed, by name alone, of the series for model `m`."""
    found: dict[str, float] = {}
    for key, value in after.items():
        name, _, labels = key.partition("[")
        if "('model', 'm')" in labels and "_bucket" not in name and (more := value - before.get(key, 0)):
            found[name.removeprefix("llama_smart_proxy_")] = more
    return found


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_request_is_counted_once_with_its_times_and_tokens(
    proxy: Proxy, upstream: RawUpstream, streamed: bool
) -> None:
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}
    whole = {"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}], "usage": USAGE}
    upstream.script = (
        toxic.stream(toxic.token("x"), toxic.event(last), toxic.DONE) if streamed else toxic.plain(orjson.dumps(whole))
    )
    before = await scraped(proxy)
    await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": [], "stream": streamed})
    found = grown(before, await scraped(proxy))
    assert {name for name in found if name.endswith("_sum")} >= {"prefill_seconds_sum", "request_seconds_sum"}
    counts = {name: value for name, value in found.items() if not name.endswith("_sum")}
    assert counts.pop("decode_tokens_per_second_count", streamed) == streamed
    assert counts == {
        "requests_total": 1,
        "queue_seconds_count": 1,
        "load_seconds_count": 1,
        "prefill_seconds_count": 1,
        "first_token_seconds_count": 1,
        "request_seconds_count": 1,
        "prompt_tokens_total": 11,
        "completion_tokens_total": 3,
        "kv_cache_looked_up_tokens_total": 11,
        "kv_cache_hit_tokens_total": 4,
    }


async def test_a_model_of_the_pool_has_its_state_its_memory_and_its_starts(stage: Stage) -> None:
    await raw_client.post(
        stage.proxy.port, "/api/chat", {"model": "local", "messages": [{"role": "user", "content": "x"}]}
    )
    found = await scraped(stage.proxy)
    of_local = {key: value for key, value in found.items() if "('model', 'local')" in key}

    def value(name: str, **labels: str) -> float:
        return of_local[f"llama_smart_proxy_{name}{sorted({'model': 'local', **labels}.items())}"]

    assert [value("model_state", state=state) for state in ("loaded", "loading", "unloaded")] == [1, 0, 0]
    assert value("instance_resident_memory_bytes") > 0 and value("model_starts_total") >= 1
    assert value("queue_depth") == value("model_restarts_total") == value("model_evictions_total") == 0
    assert value("load_seconds_sum") > 0 or value("load_seconds_count") >= 1
    assert found["llama_smart_proxy_requests_in_progress[]"] == 1  # the scrape


async def test_a_reload_resets_no_counter_and_new_models_are_counted(tmp_path: Path) -> None:
    async with toxic.raw_upstream(toxic.plain(b"{}")) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with reloadable({"remotes": {"up": remote}}, tmp_path) as running:
            await raw_client.post(running.proxy.port, CHAT, {"model": "m", "messages": []})
            await running.apply(remotes={"up": {**remote, "models": ["m", "n"]}})
            for model in ("m", "n"):
                await raw_client.post(running.proxy.port, CHAT, {"model": model, "messages": []})
            found = await scraped(running.proxy)
    labels = {"dialect": "openai", "status": "200", "key": ""}
    counts = [found[f"llama_smart_proxy_requests_total{sorted({'model': m, **labels}.items())}"] for m in ("m", "n")]
    assert counts == [2, 1]


def test_names_of_models_that_do_not_exist_make_no_series() -> None:
    metrics = Metrics(is_model=lambda name: False)
    for number in range(10_000):
        record = RequestRecord(1.0, model=f"none-{number}", api="openai", status=404, error="model_not_found")
        record.resolved_s = number % 2  # a name that a server could have is found, and then is not there
        metrics.observe(record)
    assert metrics.requests == {("-", "openai", 404, ""): 10_000}
    assert metrics.errors == {"model_not_found": 10_000} and not metrics.models and not metrics.tokens


def test_no_client_and_no_server_can_make_series_without_end() -> None:
    metrics = Metrics(is_model=lambda name: True)
    for number in range(3 * MOST_SERIES):
        record = RequestRecord(1.0, 1.0, model=f"m-{number}", api="openai", status=500, slot=True, resolved_s=1.0)
        record.error, record.client, record.counted = f"code_{number}", f"key-{number}", USAGE
        metrics.observe(record)
    assert len(metrics.models) == MOST_MODELS and len(metrics.errors) <= MOST_CODES + 1
    assert len(metrics.requests) <= MOST_SERIES + 1 and sum(metrics.requests.values()) == 3 * MOST_SERIES
    assert len(metrics.tokens) <= MOST_SERIES


def test_the_model_of_a_request_that_fails_has_its_name() -> None:
    metrics = Metrics(is_model=lambda name: name == "m")
    metrics.observe(RequestRecord(1.0, model="m", api="openai", status=503, resolved_s=1.0))
    assert metrics.requests == {("m", "openai", 503, ""): 1}


def test_a_wait_in_vain_is_counted_too() -> None:
    metrics = Metrics(is_model=lambda name: True)
    record = RequestRecord(1.0, model="m", api="openai", status=503, resolved_s=1.0, slot=True)
    record.note(StepKind.QUEUE, 1.0, 61.0)
    metrics.observe(record)
    counts = metrics.models["m"]
    assert counts.queue.total == 60 and sum(counts.queue.counts) == 1 and not sum(counts.request.counts)


def test_names_are_in_the_form_that_prometheus_recommends() -> None:
    body, kind = encoded(collected(Metrics(is_model=lambda name: True), Now()), "")
    assert kind.startswith("text/plain")
    for family in text_string_to_metric_families(body.decode()):
        if not family.name.startswith("process_"):
            assert re.fullmatch(r"llama_smart_proxy_[a-z_]+", family.name)
            assert family.documentation
            timed = family.type == "histogram"
            assert not timed or family.name.endswith(("_seconds", "_per_second"))


async def test_whoever_understands_open_metrics_gets_it(proxy: Proxy) -> None:
    accept = [("Accept", "application/openmetrics-text;version=1.0.0")]
    answer = await raw_client.ask(proxy.port, raw_client.request("GET", "/metrics", headers=accept))
    assert (answer.header("content-type") or "").startswith("application/openmetrics-text") and b"# EOF" in answer.body
