"""How many models are loaded at one time: as many as llama-swap would run, by its groups or its matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.cli.importing.groups import largest_set, processes
from tests.unit.test_import import SERVE, imported, loaded


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ({}, 1),
        ({"g": {"members": ["a", "b", "c"]}}, 1),
        ({"g": {"members": ["a", "b"], "swap": False}}, 2),
        ({"g": {"members": ["a", "b"], "swap": False, "exclusive": False}}, 3),
        ({"g": {"members": ["a"], "persistent": True}, "h": {"members": ["b", "c"], "swap": False}}, 3),
        ({"g": {"members": ["x"], "persistent": True}}, 1),
    ],
)
def test_the_pool_has_as_many_places_as_models_ran_at_one_time(groups: dict[str, Any], count: int) -> None:
    assert processes(["a", "b", "c"], groups) == count


def test_members_of_a_persistent_group_are_pinned(tmp_path: Path) -> None:
    groups = {
        "forever": {"persistent": True, "swap": False, "exclusive": False, "members": ["a", "b", "gone"]},
        "swapped": {"persistent": True, "members": ["c"]},
    }
    theirs = tmp_path / "groups.yaml"
    theirs.write_text(json.dumps({"models": {name: {"cmd": SERVE} for name in "abcd"}, "groups": groups}))
    config = loaded(tmp_path, theirs)
    assert {name: model.pinned for name, model in config.models.items()} == dict(a=True, b=True, c=False, d=False)
    assert config.server_pool.size == 4


@pytest.mark.parametrize(
    ("expressions", "count"),
    [
        ([], 1),
        (["a"], 1),
        (["a & b", "c"], 2),
        (["a|b|c"], 1),
        (["(a | b & c) & d & e"], 4),
        (["(a | b) & (c | d)"], 2),
        (["a & b & c", "+s0 & d | e"], 4),
        (["+s0 & a", "+s2", "+s1"], 2),
        (["org/x.y:z & b", "&& |", "((("], 2),
        ([""], 1),
    ],
)
def test_a_matrix_is_as_large_as_its_largest_set(expressions: list[str], count: int) -> None:
    sets = {f"s{number}": expression for number, expression in enumerate(expressions)}
    assert largest_set({"sets": sets}) == count


def test_the_matrix_in_use_decides_about_the_places(tmp_path: Path) -> None:
    models = {name: {"cmd": SERVE} for name in "abc"}
    matrix = {"sets": {"all": "a & b & c"}}
    router = {"use": "matrix", "settings": {"matrix": matrix, "groups": {"g": {"members": ["a"]}}}}
    for theirs in ({"matrix": matrix}, {"routing": {"router": router}}):
        assert imported(tmp_path, {"models": models, **theirs}).data["server_pool"]["size"] == 3
    router["use"] = "group"
    assert imported(tmp_path, {"models": models, "routing": {"router": router}}).data["server_pool"]["size"] == 1
