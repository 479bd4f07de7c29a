"""Which collections exist for a client, and which of them it may change."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llama_smart_proxy.proxy.access.grants import ALL, REMOTE, STRANGERS
from llama_smart_proxy.proxy.access.policy import Access
from llama_smart_proxy.proxy.config import ServerConfig
from llama_smart_proxy.proxy.knowledge.base import Viewer

KEYS: list[dict[str, object]] = [
    {"name": "root", "key": "key-of-the-admin-1234567890", "scopes": ["admin"]},
    {"name": "ann", "key": "key-of-ann-12345678901234567"},
    {"name": "bob", "key": "key-of-bob-12345678901234567", "collections": "manuals,hr-?"},
    {"name": "eve", "key": "key-of-eve-12345678901234567", "collections": []},
]


def viewer(name: str) -> Viewer:
    grants = Access(ServerConfig.model_validate({"api_keys": KEYS})).grants
    return next(grant.viewer for grant in grants if grant.client == name)


@pytest.mark.parametrize(
    ("name", "owner", "collection", "search", "change"),
    [
        ("root", "", "manuals", True, True),
        ("root", "ann", "private", True, True),
        ("ann", "", "manuals", True, False),
        ("ann", "ann", "private", True, True),
        ("ann", "bob", "manuals", False, False),
        ("ann", STRANGERS, "manuals", False, False),
        ("bob", "", "manuals", True, False),
        ("bob", "", "Manuals", False, False),
        ("bob", "", "hr-1", True, False),
        ("bob", "", "hr-12", False, False),
        ("bob", "bob", "anything", True, True),
        ("bob", "ann", "manuals", False, False),
        ("eve", "", "manuals", False, False),
        ("eve", "eve", "mine", True, True),
    ],
)
def test_a_key_searches_its_own_and_the_allowed_of_the_operator(
    name: str, owner: str, collection: str, search: bool, change: bool
) -> None:
    assert (viewer(name).may_search(owner, collection), viewer(name).may_change(owner)) == (search, change)


def test_without_keys_this_machine_is_the_operator_and_others_are_one_stranger() -> None:
    assert ALL.viewer == Viewer() == viewer("root")
    assert REMOTE.viewer.may_search("", "manuals") and not REMOTE.viewer.may_change("")
    assert REMOTE.viewer.may_change(STRANGERS)


def test_collections_of_a_key_with_scope_admin_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave out collections"):
        ServerConfig.model_validate({"api_keys": [{**KEYS[0], "collections": ["a"]}]})


def test_no_key_can_be_called_as_strangers_are() -> None:
    with pytest.raises(ValidationError, match="a key's name is"):
        ServerConfig.model_validate({"api_keys": [{"name": STRANGERS, "key": "key-of-ann-12345678901234567"}]})
