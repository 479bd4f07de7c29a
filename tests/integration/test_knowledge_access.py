"""Whose collections are: without keys, those of this machine are the operator's, and all others one stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.here import served_here
from tests.support.raw_client import Answer, ask, request

FORWARDED = ("X-Forwarded-For", "192.0.2.7")
ANN, BOB = "key-of-ann-12345678901234567", "key-of-bob-12345678901234567"


async def asked(port: int, method: str, path: str, body: Any = None, *headers: tuple[str, str]) -> Answer:
    return await ask(port, request(method, path, body, headers=headers, close=True), method=method)


async def names(port: int, *headers: tuple[str, str]) -> set[str]:
    answer = await asked(port, "GET", "/v1/vector_stores", None, *headers)
    return {store["name"] for store in answer.json()["data"]}


async def test_without_keys_a_stranger_searches_what_the_operator_made_and_changes_its_own(tmp_path: Path) -> None:
    async with served_here({"state_dir": str(tmp_path)}) as (_, port):
        ours = (await asked(port, "POST", "/v1/vector_stores", {"name": "ours"})).json()["id"]
        theirs = (await asked(port, "POST", "/v1/vector_stores", {"name": "theirs"}, FORWARDED)).json()["id"]
        assert await names(port) == await names(port, FORWARDED) == {"ours", "theirs"}
        for method, path, body in (
            ("DELETE", f"/v1/vector_stores/{ours}", None),
            ("POST", f"/v1/vector_stores/{ours}", {"name": "mine"}),
            ("PUT", f"/knowledge/{ours}?source=/a", b"text"),
        ):
            assert (await asked(port, method, path, body, FORWARDED)).status == 403
        assert (await asked(port, "DELETE", f"/v1/vector_stores/{theirs}", None, FORWARDED)).status == 200
        assert (await asked(port, "POST", f"/v1/vector_stores/{ours}", {"name": "renamed"})).status == 200
        assert await names(port) == {"renamed"}


async def test_what_a_key_may_search_follows_its_configuration(tmp_path: Path) -> None:
    root = {"name": "root", "key": "key-of-the-admin-1234567890", "scopes": "admin"}

    def settings(**ann: Any) -> dict[str, Any]:
        keys = [root, {"name": "ann", "key": ANN, **ann}, {"name": "bob", "key": BOB}]
        return {"state_dir": str(tmp_path), "server": {"api_keys": keys}}

    admin, ann, bob = (("x-api-key", key) for key in (str(root["key"]), ANN, BOB))
    async with served_here(settings()) as (_, port):
        for name in ("open-1", "closed"):
            await asked(port, "POST", "/v1/vector_stores", {"name": name}, admin)
        await asked(port, "POST", "/v1/vector_stores", {"name": "of-ann"}, ann)
        assert await names(port, ann) == {"open-1", "closed", "of-ann"} and await names(port, bob) == {
            "open-1",
            "closed",
        }
    async with served_here(settings(collections=["open-?"])) as (_, port):
        assert await names(port, ann) == {"open-1", "of-ann"} and await names(port, admin) >= {"closed", "of-ann"}
    async with served_here(settings(collections=[])) as (_, port):
        assert await names(port, ann) == {"of-ann"}


async def test_what_adds_documents_counts_for_the_limits_of_a_key_and_what_reads_does_not(tmp_path: Path) -> None:
    server = {"api_keys": [{"name": "ann", "key": ANN, "requests_per_minute": 3}]}
    key = ("x-api-key", ANN)
    async with served_here({"state_dir": str(tmp_path), "server": server}) as (_, port):
        assert (await asked(port, "POST", "/v1/vector_stores", {"name": "a"}, key)).status == 200
        for _ in range(5):
            assert (await asked(port, "GET", "/knowledge/a", None, key)).status == 200
        assert (await asked(port, "PUT", "/knowledge/a?source=/1", b"text", key)).status == 200
        assert (await asked(port, "POST", "/v1/files", {}, key)).status == 400  # no form, and a request all the same
        for method, path in (("PUT", "/knowledge/a?source=/2"), ("POST", "/v1/files")):
            answer = await asked(port, method, path, b"text", key)
            assert (answer.status, answer.error["code"]) == (429, "rate_limit_exceeded")


ROUTES = [
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/file-1/content"),
    ("POST", "/v1/vector_stores"),
    ("POST", "/v1/vector_stores/a/search"),
    ("DELETE", "/v1/vector_stores/a"),
    ("PUT", "/knowledge/a?source=/x"),
    ("GET", "/knowledge/a"),
]


async def test_pages_of_other_origins_neither_read_nor_change_documents(tmp_path: Path) -> None:
    async with served_here({"state_dir": str(tmp_path)}) as (_, port):
        for header in (("Origin", "https://evil.example"), ("Origin", "null"), ("Sec-Fetch-Site", "cross-site")):
            for method, path in ROUTES:
                body = {"query": "x"} if method == "POST" else None
                answer = await asked(port, method, path, body, header)
                assert (answer.status, answer.error["code"]) == (403, "forbidden_origin"), (method, path, header)
        assert not (tmp_path / "knowledge").exists()  # nothing of it was opened
