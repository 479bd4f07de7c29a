"""Traces by OpenTelemetry, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client, toxic
from tests.support.harness import ROOT, environment, launch, logged, running_proxy, until

needs_otel = pytest.mark.skipif(
    not metadata.packages_distributions().get("opentelemetry", []).count("opentelemetry-exporter-otlp-proto-http"),
    reason="needs the extra otel",
)
CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": USAGE}
SERVER, CLIENT, INTERNAL = 2, 3, 1
"""Kinds of spans. Source: opentelemetry-proto, trace/v1."""
AGENT = """
from llama_smart_proxy import Agent
class Mine(Agent):
    async def on_request(self, request, ctx):
        pass
"""


@contextmanager
def collector(folder: Path) -> Iterator[tuple[str, Path]]:
    """Its URL, and the file of what it got."""
    log = folder / "spans"
    argv = [sys.executable, "-m", "tests.fakes.collector", "--log", str(log)]
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", log
        finally:
            process.kill()


async def traced(folder: Path, config: dict[str, Any], env: dict[str, str], log: Path) -> list[dict[str, Any]]:
    """The spans of a chat, of one that is refused, and of a list of models."""
    (folder / "mine.py").write_text(AGENT)
    async with toxic.raw_upstream() as upstream:
        upstream.script = toxic.stream(toxic.token("x"), toxic.event(LAST), toxic.DONE)
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        config = {"remotes": {"up": remote}, "agents_dirs": [str(folder)], "agents": ["mine"], **config}
        async with running_proxy(config, env=env) as proxy:
            headers = [("Traceparent", f"00-{TRACE}-{PARENT}-01"), ("X-Request-Id", "mine-1")]
            body = {"model": "m", "messages": [{"role": "user", "content": "secret words"}], "stream": True}
            await raw_client.ask(proxy.port, raw_client.request("POST", CHAT, body, headers=headers))
            upstream.script = toxic.plain(b'{"error": {"message": "no"}}', 418)
            await raw_client.post(proxy.port, "/v1/embeddings", {"model": "m", "input": "x"})
            await raw_client.get(proxy.port, "/v1/models")
    await until(lambda: len(logged(log)) >= 5, what="the spans")
    return logged(log)


@needs_otel
@pytest.mark.parametrize("by", ["configuration", "variable"])
async def test_a_request_is_a_trace_of_what_it_went_through(tmp_path: Path, by: str) -> None:
    with collector(tmp_path) as (url, log):
        config = {"telemetry": {"otlp": url}} if by == "configuration" else {}
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url} if by == "variable" else {}
        spans = await traced(tmp_path, config, env, log)
    assert {span["service"] for span in spans} == {"llama-smart-proxy"}
    root = next(span for span in spans if span["parent"] == PARENT)
    below = {span["name"]: span for span in spans if span["parent"] == root["span"]}
    assert (root["name"], root["kind"], root["trace"], root["failed"]) == ("chat m", SERVER, TRACE, False)
    assert root["attributes"].items() >= {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.provider.name": "remote",
        "gen_ai.usage.input_tokens": 11, "gen_ai.usage.output_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 4,
        "http.response.status_code": 200, "llama_smart_proxy.request_id": "mine-1",
    }.items()  # fmt: skip
    assert below["chat m"]["kind"] == CLIENT and below["agent mine"]["kind"] == INTERNAL
    for span in below.values():
        assert root["began"] <= span["began"] <= span["ended"] <= root["ended"]
    refused = next(span for span in spans if span["name"] == "embeddings m" and not span["parent"])
    assert refused["failed"] and refused["attributes"]["error.type"] == "upstream_error"
    assert refused["trace"] != TRACE and "secret words" not in log.read_text()
    assert not [span for span in spans if "models" in span["name"]]


@needs_otel
async def test_a_collector_that_does_not_answer_holds_up_nothing(tmp_path: Path) -> None:
    async with toxic.raw_upstream(toxic.plain(b"{}")) as upstream, toxic.raw_upstream() as silent:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        telemetry = {"otlp": f"http://127.0.0.1:{silent.port}"}
        async with running_proxy({"remotes": {"up": remote}, "telemetry": telemetry}, clean_log=False) as proxy:
            for _ in range(5):
                assert (await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": []})).status == 200


async def test_without_the_extra_the_setting_names_it(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("")  # hides it
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    proxy = launch({"telemetry": {"otlp": "http://127.0.0.1:9"}}, tmp_path, env=env, args=())
    assert await proxy.ended() == 2
    assert "telemetry.otlp: traces require further packages: pip install 'llama-smart-proxy[otel]'" in proxy.log
