"""What laws are tested with: how many examples, bodies with fields nobody knows, and bytes cut anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import Json

_T = TypeVar("_T", bound=Callable[..., Any])
FEWEST = 10


def law(examples: int, **more: Any) -> Callable[[_T], _T]:
    """Decorates a test by hypothesis: so many examples with `--hypothesis-profile full`, three times as many with
    `search`, under which it counts as a `full` test; else a fortieth of them. `more` are other settings."""

    def decorate(test: _T) -> _T:
        times = {"full": 1, "search": 3}.get(settings.get_current_profile_name())
        if times:
            pytest.mark.full(test)
        return settings(max_examples=examples * times if times else max(FEWEST, examples // 40), **more)(test)

    return decorate


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
"""Texts that JSON can carry: anything but lone surrogates."""

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, width=32) | TEXT
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
"""Any JSON value, small."""


def objects_in(value: Any) -> list[Json]:
    """Every JSON object in `value`, itself included."""
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in objects_in(item))]
    return [found for item in value for found in objects_in(item)] if isinstance(value, list) else []


@st.composite
def unknown_fields(draw: st.DrawFn, body: Json, known: Collection[str] = ()) -> Json:
    """A copy of `body` with fields added at every level, under names that are neither there yet nor in `known`, not
    even in another case."""
    result = copy.deepcopy(body)
    taken = {name.casefold() for name in known}
    for target in objects_in(result):
        for name, value in draw(st.dictionaries(TEXT, JSON_VALUES, max_size=2)).items():
            if name not in target and name.casefold() not in taken:
                target[name] = value
    return result


@st.composite
def splits(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """`data` cut into pieces anywhere, also inside characters; joined they are `data` again."""
    places = st.integers(0, len(data))
    cuts = sorted(draw(st.lists(places, max_size=12, unique=True)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def same(one: Any, other: Any) -> bool:
    """Equal as JSON values, where 1, 1.0 and true are three different things."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
