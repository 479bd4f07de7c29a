"""Filters of requests: what they change in a body, and what they may not name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.config import FiltersConfig, read_config
from llama_smart_proxy.proxy.config.filters import PROTECTED

BODY = {"model": "m", "temperature": 1, "options": {"top_k": 4, "num_ctx": 8}, "stop": ["a"]}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, BODY),
        ({"strip": ["temperature", "absent"]}, {k: v for k, v in BODY.items() if k != "temperature"}),
        ({"strip": "temperature, stop"}, {"model": "m", "options": BODY["options"]}),
        ({"set": {"temperature": 0.5, "top_p": None}}, BODY | {"temperature": 0.5, "top_p": None}),
        ({"strip": ["stop"], "set": {"stop": ["b"]}}, BODY | {"stop": ["b"]}),
        ({"strip": ["options.top_k"]}, BODY | {"options": {"num_ctx": 8}}),
        ({"strip": ["stop.0", "none.at.all", "temperature.x"]}, BODY),
        ({"set": {"options.top_k": 1}}, BODY | {"options": {"top_k": 1, "num_ctx": 8}}),
        ({"set": {"a.b.c": 1, "a.d": 2}}, BODY | {"a": {"b": {"c": 1}, "d": 2}}),
        ({"set": {"temperature.x": 1}}, BODY | {"temperature": {"x": 1}}),
        ({"set": {"options": {"a": 1}}}, BODY | {"options": {"a": 1}}),
    ],
)
def test_fields_are_removed_and_then_set(filters: dict[str, Any], expected: dict[str, Any]) -> None:
    body, before = dict(BODY), copy.deepcopy(BODY)
    FiltersConfig.model_validate(filters).apply(body)
    assert body == expected
    assert before == BODY, "values that the body shares with others are replaced, not modified"


@pytest.mark.parametrize("name", [*sorted(PROTECTED), "messages.0", "", ".", "a.", ".a", "a..b"])
@pytest.mark.parametrize("kind", ["strip", "set"])
@pytest.mark.parametrize("where", ["models", "virtual", "remotes", "ollama"])
def test_what_a_request_is_about_cannot_be_filtered(tmp_path: Path, kind: str, name: str, where: str) -> None:
    entries: dict[str, Any] = {
        "models": ("models", {"path": "m.gguf"}),
        "virtual": ("models", {"model": "org/x"}),
        "remotes": ("remotes", {"url": "http://h"}),
        "ollama": ("models", {"backend": "ollama"}),
    }
    section, entry = entries[where]
    value = {name: 1} if kind == "set" else [name]
    file = tmp_path / "c.json"
    file.write_text(json.dumps({section: {"m": entry | {"filters": {kind: value}}}}))
    reading = read_config(file, env={})
    assert reading.config is None
    assert all(f": {section}.m.filters.{kind}." in problem for problem in reading.problems), reading.problems
    assert any("must" in problem for problem in reading.problems)
