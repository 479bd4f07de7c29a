"""What `/metrics` exports is what the documentation lists and the dashboard asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.metrics import Metrics
from llama_smart_proxy.proxy.metrics.export import AgentCounts, Now, collected, encoded
from tests.support.harness import ROOT

DASHBOARD = ROOT / "packaging" / "grafana-dashboard.json"
DOCUMENT = ROOT / "docs" / "observability.md"
ROW = re.compile(r"^\| `(llama_smart_proxy_\w+)` \| (counter|gauge|histogram) \| ((?:`\w+`(?:, )?)*) ?\| .+ \|$", re.M)
NAME = re.compile(r"\b(?:llama_smart_proxy|process)_\w+")
GROUPED = re.compile(r"\bby \(([\w, ]+)\)")
SELECTED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")


def export() -> dict[str, tuple[str, set[str]]]:
    """The type and the labels of every family, with a sample of each, by its documented name."""
    metrics = Metrics(lambda name: True, lambda: [{"model": "m", "starts": 1, "restarts": 1, "evictions": 1}])
    record = RequestRecord(1.0, 1.1, model="m", api="openai", status=200, slot=True, resolved_s=1.0, error="overloaded")
    record.first_byte_s, record.last_byte_s, record.ended_s, record.client = 1.2, 1.3, 1.3, "alice"
    record.counted = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    record.note(StepKind.QUEUE, 1.0, 1.1)
    metrics.observe(record)
    instance = {"model": "m", "state": "ready", "pid": 1, "queue": 0, "leases": 1, "rss_bytes": 1}
    body, _ = encoded(collected(metrics, Now([instance], [AgentCounts("a", 1, 1, 1.0)])), "")
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(body.decode()):
        assert family.samples, family.name
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = family.type, {key for sample in family.samples for key in sample.labels} - {"le"}
    return found


def panels(value: Any) -> Iterator[str]:
    """Every expression of the dashboard."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr" or (key == "query" and isinstance(item, str) and "label_values" in item):
                yield item
            yield from panels(item)
    elif isinstance(value, list):
        for item in value:
            yield from panels(item)


def test_every_metric_is_documented_with_its_type_and_labels_and_no_other_is() -> None:
    rows = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in ROW.findall(DOCUMENT.read_text())}
    ours = {name: what for name, what in export().items() if not name.startswith("process_")}
    assert rows == ours


def test_the_dashboard_asks_for_nothing_but_what_is_exported() -> None:
    exported_now = export()
    series = {f"{name}{end}": name for name in exported_now for end in ("", "_bucket", "_sum", "_count")}
    expressions = list(panels(json.loads(DASHBOARD.read_text())))
    assert len(expressions) > 20
    for expression in expressions:
        names = NAME.findall(expression)
        assert names, expression
        for name in names:
            assert name in series, expression
            kind = exported_now[series[name]][0]
            assert (kind == "histogram") == (name != series[name]), expression
        known = set.intersection(*(exported_now[series[name]][1] for name in names)) | {"le"}
        used = {part.strip() for group in GROUPED.findall(expression) for part in group.split(",")}
        used |= set(SELECTED.findall(expression))
        assert used <= known, expression


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    asked = " ".join(panels(json.loads(DASHBOARD.read_text())))
    assert [name for name in export() if name.startswith("llama_smart_proxy_") and name not in asked] == [
        "llama_smart_proxy_build_info"
    ]
