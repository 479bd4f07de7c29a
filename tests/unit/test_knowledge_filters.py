"""Filters of searches by attributes, as OpenAI documents them."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.knowledge import filters

FILE = {"year": 2021, "price": 9.5, "region": "EU", "draft": False}


def compare(kind: str, key: str, value: Any) -> dict[str, Any]:
    return {"type": kind, "key": key, "value": value}


@pytest.mark.parametrize(
    ("kind", "key", "value", "holds"),
    [
        ("eq", "year", 2021, True),
        ("eq", "year", 2021.0, True),
        ("eq", "year", "2021", False),
        ("eq", "draft", False, True),
        ("eq", "draft", 0, False),
        ("eq", "none", "EU", False),
        ("ne", "year", 2021, False),
        ("ne", "year", "2021", True),
        ("ne", "none", "EU", True),
        ("gt", "year", 2021, False),
        ("gt", "year", 2020.5, True),
        ("gte", "year", 2021, True),
        ("lt", "price", 10, True),
        ("lte", "price", 9.5, True),
        ("lte", "price", 9.4, False),
        ("gt", "region", "DE", True),
        ("gt", "region", 1, False),
        ("gt", "none", 1, False),
        ("lt", "none", 1, False),
        ("gt", "draft", -1, False),
        ("in", "region", ["EU", "US"], True),
        ("in", "region", ["US"], False),
        ("in", "region", [], False),
        ("in", "year", [1, 2021], True),
        ("in", "draft", [0, 1], False),
        ("in", "none", ["EU"], False),
        ("nin", "region", ["US"], True),
        ("nin", "region", ["EU"], False),
        ("nin", "none", ["EU"], True),
    ],
)
def test_a_comparison_holds_for_values_of_its_own_kind(kind: str, key: str, value: Any, holds: bool) -> None:
    assert filters.parsed(compare(kind, key, value))(FILE) is holds


def test_filters_are_combined() -> None:
    eu, us = compare("eq", "region", "EU"), compare("eq", "region", "US")
    old = compare("lt", "year", 2000)
    both = {"type": "and", "filters": [eu, {"type": "or", "filters": [us, old]}]}
    assert filters.parsed({"type": "or", "filters": [us, eu]})(FILE)
    assert not filters.parsed({"type": "and", "filters": [us, eu]})(FILE)
    assert not filters.parsed(both)(FILE) and filters.parsed(both)({"region": "EU", "year": 1999})


def nested(levels: int) -> dict[str, Any]:
    value = compare("eq", "a", 1)
    for _ in range(levels):
        value = {"type": "and", "filters": [value]}
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("year = 1", "must be an object"),
        ({"type": "like", "key": "a", "value": 1}, "has the type 'like'; there are eq, ne, gt"),
        ({"key": "a", "value": 1}, "has the type 'None'"),
        ({"type": ["eq"], "key": "a", "value": 1}, "has the type"),
        (compare("eq", "", 1), "requires a key"),
        (compare("eq", "a", None), "requires a value"),
        (compare("eq", "a", [1]), "requires a value"),
        (compare("in", "a", 1), "requires a list"),
        (compare("in", "a", [[1]]), "requires a list"),
        (compare("gt", "a", True), "requires a number or a text"),
        ({"type": "and", "filters": []}, "requires a list of filters"),
        ({"type": "or", "filters": {"type": "eq"}}, "requires a list of filters"),
        (nested(filters.DEEPEST + 1), "nested deeper than"),
        ({"type": "or", "filters": [compare("eq", "a", 1)] * filters.MOST}, "has over 1000 parts"),
    ],
)
def test_a_filter_that_is_none_is_refused_with_the_reason(value: Any, text: str) -> None:
    with pytest.raises(BadRequest, match=text) as failure:
        filters.parsed(value)
    assert failure.value.param == "filters"


def test_as_many_and_as_deep_filters_as_documented_are_taken() -> None:
    assert filters.parsed(nested(filters.DEEPEST))({"a": 1})
    assert filters.parsed({"type": "or", "filters": [compare("eq", "a", 1)] * (filters.MOST - 1)})({"a": 1})
