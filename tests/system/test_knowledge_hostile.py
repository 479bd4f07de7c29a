"""What clients should not send to the knowledge base gets an error with its reason, and changes nothing."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Proxy, running_proxy, until
from tests.support.knowledge import ANN, PUMPS, asked, client_of, files_below, knowing
from tests.support.raw_client import connected, request


@pytest.fixture(scope="module")
def store(known: Proxy) -> str:
    with client_of(known) as client:
        made = client.vector_stores.create(name="manuals")
        client.vector_stores.files.upload_and_poll(vector_store_id=made.id, file=("pump.md", PUMPS.encode()))
        return made.id


IDS = [
    "none",
    "%00",
    "..%2f..%2fetc%2fpasswd",
    "..",
    "%2e%2e",
    "a%0d%0aX:1",
    "%25",
    "'%20OR%201=1--",
    "%ff",
    "x" * 3000,
]
PATHS = [
    ("GET", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"),
    ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/vector_stores/{}"),
    ("POST", "/v1/vector_stores/{}"),
    ("DELETE", "/v1/vector_stores/{}"),
    ("POST", "/v1/vector_stores/{}/search"),
    ("GET", "/v1/vector_stores/{}/files"),
    ("GET", "/v1/vector_stores/manuals/files/{}"),
    ("GET", "/v1/vector_stores/manuals/files/{}/content"),
    ("GET", "/v1/vector_stores/manuals/file_batches/{}"),
    ("POST", "/v1/vector_stores/manuals/file_batches/{}/cancel"),
    ("GET", "/knowledge/{}"),
    ("PUT", "/knowledge/{}?source=/a"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_ids_of_nothing_are_not_found(known: Proxy, store: str, method: str, path: str) -> None:
    body = {"query": "x"} if method == "POST" else b"x" if method == "PUT" else None
    for name in IDS:
        answer = await asked(known, method, path.format(name), body)
        assert (answer.status, answer.error["type"]) in ((404, "not_found_error"), (404, "invalid_request_error")), name


def deep(levels: int) -> Any:
    value: Any = {"type": "eq", "key": "a", "value": 1}
    for _ in range(levels):
        value = {"type": "and", "filters": [value]}
    return value


@pytest.mark.parametrize(
    "body",
    [
        {"query": "pump", "filters": deep(33)},
        {"query": "pump", "filters": deep(120)},
        {"query": "pump", "filters": {"type": "or", "filters": [deep(0)] * 5000}},
        {"query": "pump", "filters": {"type": "in", "key": "a", "value": [{}]}},
        {"query": "pump", "filters": []},
        {"query": ["pump"] * 33},
        {"query": [["pump"]]},
        {"query": {"a": 1}},
        {"query": "x" * 5000},
        {"query": " \n\t "},
        {"query": "pump", "max_num_results": True},
        {"query": "pump", "max_num_results": 1.5},
        {"query": "pump", "ranking_options": {"ranker": ["auto"]}},
        {"query": "pump", "ranking_options": "auto"},
        {"query": "pump", "ranking_options": {"score_threshold": "1"}},
        {},
    ],
)
async def test_searches_that_are_none_are_refused(known: Proxy, store: str, body: dict[str, Any]) -> None:
    answer = await asked(known, "POST", f"/v1/vector_stores/{store}/search", body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "query",
    [
        'pump" OR *',
        "NEAR(pump, 5) AND NOT column:x",
        "a\0b pump",
        "\ud800 pump",
        "pump ) (",
        "'; DROP TABLE chunks; --",
        "- -pump",
        "😀" * 1000,
        "*",
        "^",
        "\u202e",
    ],
)
async def test_no_query_is_a_program(known: Proxy, store: str, query: str) -> None:
    raw = json.dumps({"query": query}).encode()
    answer = await asked(known, "POST", f"/v1/vector_stores/{store}/search", raw)
    assert answer.status == 200 and answer.json()["object"] == "vector_store.search_results.page"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("source=", 400),
        ("", 400),
        ("source=a%00b", 400),
        ("source=a%0ab", 400),
        (f"source={'a' * 5000}", 400),
        ("url=", 400),
        ("url=file:///etc/passwd", 400),
        ("url=http://127.0.0.1:{port}/health", 400),
        ("url=http://localhost:{port}/health", 400),
        ("url=http://[::1]:{port}/", 400),
        ("url=http://0x7f.1/", 400),
        ("url=http://169.254.169.254/latest/meta-data", 400),
        ("url=gopher://example.org/", 400),
        ("url=http://user:secret@example.org/", 400),
    ],
)
async def test_sources_that_are_none_are_refused_and_no_private_address_is_asked(
    known: Proxy, query: str, status: int
) -> None:
    made = (await asked(known, "POST", "/v1/vector_stores", {"name": "empty"}, key=ANN)).json()["id"]
    answer = await asked(known, "PUT", f"/knowledge/{made}?{query.format(port=known.port)}", b"x", key=ANN)
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert (await asked(known, "GET", f"/knowledge/{made}", key=ANN)).body == b""


async def test_sources_are_names_and_not_paths_of_the_proxy(known: Proxy, known_folder: Path) -> None:
    await asked(known, "POST", "/v1/vector_stores", {"name": "odd"})
    before = files_below(known_folder)
    sources = ["/etc/passwd", "../../../../tmp/evil", "C:\\x", "http://127.0.0.1/", "a" * 4000, "%", "?&=#", "."]
    for number, source in enumerate(sources):
        path = f"/knowledge/odd?source={''.join(f'%{byte:02x}' for byte in source.encode())}"
        answer = await asked(known, "PUT", path, f"text number {number}".encode())
        assert (answer.status, answer.json()["document"]["source"]) == (200, source)
    listed = [json.loads(line) for line in (await asked(known, "GET", "/knowledge/odd")).body.splitlines()]
    assert {one["source"] for one in listed} == set(sources)
    assert all("/" not in one["name"] and one["name"] for one in listed if "://" not in one["source"])
    assert all(file.is_relative_to(known_folder / "state") for file in set(files_below(known_folder)) - set(before))


async def test_one_source_that_is_sent_many_times_at_once_is_one_document(known: Proxy) -> None:
    made = (await asked(known, "POST", "/v1/vector_stores", {"name": "same"})).json()["id"]
    path = f"/knowledge/{made}?source=/same.md"
    answers = await asyncio.gather(*(asked(known, "PUT", path, f"Number {n}.".encode()) for n in range(20)))
    assert {answer.status for answer in answers} == {200}
    [line] = (await asked(known, "GET", f"/knowledge/{made}")).body.splitlines()
    file = json.loads(line)["id"]
    content = (await asked(known, "GET", f"/v1/files/{file}/content")).body
    assert content in {f"Number {n}.".encode() for n in range(20)}
    assert (await asked(known, "PUT", path, content)).json() == {"changed": False, "document": None}


async def test_a_head_has_what_a_get_has_without_its_body(known: Proxy) -> None:
    with client_of(known) as client:
        file = client.files.create(file=("a.txt", b"12345"), purpose="user_data").id
    for method, body in (("GET", b"12345"), ("HEAD", b""), ("GET", b"12345")):
        answer = await asked(known, method, f"/v1/files/{file}/content")
        assert (answer.status, answer.header("content-length"), answer.body) == (200, "5", body)


async def test_what_is_deleted_while_it_is_added_is_gone_and_breaks_nothing(known: Proxy, known_folder: Path) -> None:
    made = (await asked(known, "POST", "/v1/vector_stores", {"name": "race"})).json()["id"]
    with client_of(known) as client:
        files = [client.files.create(file=(f"{n}.md", f"# {n}".encode()), purpose="assistants").id for n in range(30)]
    attach = [asked(known, "POST", f"/v1/vector_stores/{made}/files", {"file_id": file}) for file in files]
    delete = [asked(known, "DELETE", f"/v1/files/{file}") for file in files]
    answers = await asyncio.gather(*(one for pair in zip(attach, delete, strict=True) for one in pair))
    assert {answer.status for answer in answers} <= {200, 404}
    assert all(answer.status == 200 for answer in answers[1::2])

    async def counts() -> dict[str, int]:
        found: dict[str, int] = (await asked(known, "GET", f"/v1/vector_stores/{made}")).json()["file_counts"]
        return found

    async def idle() -> bool:
        return (await counts())["in_progress"] == 0

    await until(idle)
    assert (await counts())["total"] == 0


async def test_a_collection_that_is_deleted_while_it_is_filled_leaves_nothing(known: Proxy, known_folder: Path) -> None:
    made = (await asked(known, "POST", "/v1/vector_stores", {"name": "gone"})).json()["id"]
    before = len(files_below(known_folder / "state" / "knowledge"))
    puts = [asked(known, "PUT", f"/knowledge/{made}?source=/{n}.md", f"# Unique {n}".encode()) for n in range(30)]
    tasks = [asyncio.ensure_future(put) for put in puts]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert (await asked(known, "DELETE", f"/v1/vector_stores/{made}")).status == 200
    assert {(await task).status for task in tasks} <= {200, 404}
    await until(lambda: len(files_below(known_folder / "state" / "knowledge")) == before, what="the removal")


async def test_a_killed_proxy_keeps_no_half_upload(tmp_path: Path) -> None:
    config = knowing(tmp_path)
    kept = tmp_path / "state" / "knowledge"
    head = request("PUT", "/knowledge/k?source=/a.md", headers=[("Content-Length", "1000000")])
    async with running_proxy(config) as proxy:
        made = await asked(proxy, "POST", "/v1/vector_stores", {"name": "k"})
        assert made.status == 200
        async with connected(proxy.port) as client:
            await client.send(head + b"x" * 500_000)
            await until(lambda: files_below(kept), what="the file of the upload")
            proxy.send(signal.SIGKILL)
            await proxy.ended()
    async with running_proxy(config) as proxy:
        assert (await asked(proxy, "GET", "/knowledge/k")).body == b""
        await until(lambda: files_below(kept) == [], what="the removal of what was left")
