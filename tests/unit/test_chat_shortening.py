"""Which messages of a chat that is too long may be left out, and which of them together."""

from __future__ import annotations

import pytest

from llama_smart_proxy.proxy.api.refusals import leaving
from llama_smart_proxy.proxy.chat import Json

ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}


@pytest.mark.parametrize(
    ("roles", "groups"),
    [
        ("u", []),
        ("su", []),
        ("uau", [[0, 1]]),
        ("suauau", [[1, 2], [3, 4]]),
        ("uasdau", [[0, 1, 4]]),
        ("auau", [[0], [1, 2]]),
        ("uuu", [[0], [1]]),
        ("uattattau", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("uauat", [[0, 1]]),
        ("uauatat", [[0, 1], [3, 4]]),
        ("uatattat", [[1, 2], [3, 4, 5]]),
        ("uaus", [[0, 1]]),
        ("aaa", [[0], [1]]),
        ("atat", [[0, 1]]),
        ("t", []),
        ("tt", []),
        ("s", []),
    ],
)
def test_whole_turns_go_oldest_first_and_a_tool_call_goes_with_its_results(roles: str, groups: list[list[int]]) -> None:
    messages: list[Json] = [{"role": ROLES[role], "content": ""} for role in roles]
    assert leaving(messages) == groups
