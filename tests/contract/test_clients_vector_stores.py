"""OpenAI's own Python client with files and vector stores."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.support.harness import Proxy
from tests.support.knowledge import ADMIN, ANN, BOB, CATS, PUMPS, client_of


@pytest.fixture
def client(known: Proxy) -> Iterator[openai.OpenAI]:
    with client_of(known) as client:
        yield client


def upload(client: openai.OpenAI, name: str = "pump.md", text: str = PUMPS, purpose: Any = "assistants") -> str:
    return client.files.create(file=(name, text.encode()), purpose=purpose).id


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_uploaded(client: openai.OpenAI) -> None:
    data = bytes(range(256)) * 2000
    made = client.files.create(file=("Übersicht 文.bin", data), purpose="user_data")
    assert (made.filename, made.bytes, made.purpose, made.object) == (
        "Übersicht 文.bin",
        len(data),
        "user_data",
        "file",
    )
    assert made.id.startswith("file-") and client.files.retrieve(made.id) == made
    answer = client.files.with_raw_response.content(made.id)
    assert answer.content == data
    assert answer.headers["content-disposition"].startswith("attachment")  # a browser must not show it as a page
    assert answer.headers["x-content-type-options"] == "nosniff"
    deleted = client.files.delete(made.id)
    assert deleted.deleted and deleted.id == made.id
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_files_are_listed_by_purpose_and_in_pages(known: Proxy) -> None:
    with client_of(known, BOB) as client:  # for whom those of other tests do not exist
        upload(client)
        ids = [upload(client, f"{number}.txt", "x", "evals") for number in range(5)]
        assert [file.id for file in client.files.list(purpose="evals")] == ids[::-1]
        pages = [*client.files.list(purpose="evals", limit=2, order="asc").iter_pages()]
        assert [[file.id for file in page.data] for page in pages] == [ids[:2], ids[2:4], ids[4:]]
        assert [page.has_more for page in pages] == [True, True, False]
        answer = client.files.with_raw_response.list(purpose="evals", limit=2).http_response.json()
        assert (answer["first_id"], answer["last_id"], answer["object"]) == (ids[4], ids[3], "list")


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"])
def test_every_documented_purpose_is_kept(client: openai.OpenAI, purpose: Any) -> None:
    assert client.files.retrieve(upload(client, purpose=purpose)).purpose == purpose


# -- vector stores -----------------------------------------------------------------------------------------------------


def test_a_vector_store_is_made_changed_listed_and_deleted(client: openai.OpenAI) -> None:
    made = client.vector_stores.create(
        name="Manuals", metadata={"a": "1"}, expires_after={"anchor": "last_active_at", "days": 7}
    )
    assert (made.object, made.name, made.metadata, made.status) == ("vector_store", "Manuals", {"a": "1"}, "completed")
    assert made.expires_after is not None and made.expires_after.days == 7
    assert made.expires_at == (made.last_active_at or 0) + 7 * 86400
    assert made.file_counts.total == made.usage_bytes == 0
    changed = client.vector_stores.update(made.id, name="Handbooks", metadata={"b": "2"})
    assert (changed.id, changed.name, changed.metadata) == (made.id, "Handbooks", {"b": "2"})
    assert client.vector_stores.retrieve(made.id).name == "Handbooks"
    others = [client.vector_stores.create().id for _ in range(3)]
    listed = [store.id for store in client.vector_stores.list(limit=2)]
    assert listed[:4] == [*others[::-1], made.id]
    before = client.vector_stores.list(before=made.id, limit=2)
    assert [store.id for store in before.data] == [others[1], others[0]]
    assert client.vector_stores.delete(made.id).deleted
    for gone in (client.vector_stores.retrieve, client.vector_stores.delete):
        with pytest.raises(openai.NotFoundError) as failure:
            gone(made.id)
        assert failure.value.type == "not_found_error"


def test_a_file_is_uploaded_polled_searched_and_removed(client: openai.OpenAI) -> None:
    store = client.vector_stores.create(name="pumps")
    added = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("pump.md", PUMPS.encode()), attributes={"year": 2021, "draft": False}
    )
    assert (added.status, added.last_error, added.attributes) == ("completed", None, {"year": 2021, "draft": False})
    assert added.vector_store_id == store.id and added.usage_bytes > 0
    counts = client.vector_stores.retrieve(store.id).file_counts
    assert (counts.completed, counts.total) == (1, 1)
    found = client.vector_stores.search(store.id, query="hold the red button to reset", max_num_results=1)
    [result] = found.data
    assert (result.file_id, result.filename, result.attributes) == (added.id, "pump.md", added.attributes)
    assert "seven seconds" in result.content[0].text and result.content[0].type == "text" and 0 <= result.score <= 1
    texts = [part.text or "" for part in client.vector_stores.files.content(added.id, vector_store_id=store.id)]
    assert any("twelve kilograms" in text for text in texts)
    changed = client.vector_stores.files.update(added.id, vector_store_id=store.id, attributes={"year": 2022})
    assert changed.attributes == {"year": 2022}
    assert client.vector_stores.files.retrieve(added.id, vector_store_id=store.id).attributes == {"year": 2022}
    assert client.vector_stores.files.delete(added.id, vector_store_id=store.id).deleted
    assert client.vector_stores.files.list(store.id).data == []
    assert client.vector_stores.search(store.id, query="red button").data == []
    assert client.files.retrieve(added.id).id == added.id  # which stays


def test_a_file_that_cannot_be_read_is_failed_with_its_reason(client: openai.OpenAI) -> None:
    store = client.vector_stores.create()
    added = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("a.bin", b"\0\1\2\3" * 99))
    assert added.status == "failed" and added.last_error is not None
    assert added.last_error.code == "invalid_file" and added.last_error.message
    assert [file.id for file in client.vector_stores.files.list(store.id, filter="failed")] == [added.id]
    assert client.vector_stores.files.list(store.id, filter="completed").data == []


def test_a_batch_is_uploaded_polled_and_listed(client: openai.OpenAI) -> None:
    store = client.vector_stores.create()
    texts = [io.BytesIO(f"# Item {number}\n\nItem number {number} is here.".encode()) for number in range(5)]
    for number, text in enumerate(texts):
        text.name = f"item{number}.md"
    batch = client.vector_stores.file_batches.upload_and_poll(store.id, files=texts)
    assert batch.id.startswith("vsfb_") and batch.object == "vector_store.files_batch"
    assert (batch.status, batch.file_counts.completed, batch.file_counts.total) == ("completed", 5, 5)
    again = client.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id)
    assert again == batch
    pages = client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store.id, limit=2, order="asc")
    assert [len(page.data) for page in pages.iter_pages()] == [2, 2, 1]
    named = upload(client, "other.md", CATS)
    files: Any = [{"file_id": named, "attributes": {"kind": "cat"}}]
    second = client.vector_stores.file_batches.create_and_poll(store.id, files=files)
    assert second.id != batch.id and second.file_counts.total == 1
    assert client.vector_stores.files.retrieve(named, vector_store_id=store.id).attributes == {"kind": "cat"}


def test_of_files_one_of_which_does_not_exist_none_is_added(client: openai.OpenAI) -> None:
    file, store = upload(client), client.vector_stores.create()
    stores = {one.id for one in client.vector_stores.list()}
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.file_batches.create(store.id, file_ids=[file, "file-none"])
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.create(file_ids=[file, "file-none"])
    assert client.vector_stores.files.list(store.id).data == []
    assert {one.id for one in client.vector_stores.list()} == stores


def test_a_search_is_filtered_and_ranked(client: openai.OpenAI) -> None:
    pump, cats = upload(client), upload(client, "cats.md", CATS)
    store = client.vector_stores.create(file_ids=[pump, cats], chunking_strategy={"type": "auto"})
    for file, year in ((pump, 2020), (cats, 2024)):
        client.vector_stores.files.poll(file, vector_store_id=store.id)
        client.vector_stores.files.update(file, vector_store_id=store.id, attributes={"year": year})

    def found(query: Any = "pump cat", **options: Any) -> list[str]:
        return [result.file_id for result in client.vector_stores.search(store.id, query=query, **options)]

    assert set(found()) == {pump, cats}
    assert set(found(filters={"type": "gt", "key": "year", "value": 2020})) == {cats}
    both: Any = [{"type": "gte", "key": "year", "value": 2020}, {"type": "lt", "key": "year", "value": 2024}]
    assert set(found(filters={"type": "and", "filters": both})) == {pump}
    assert found(filters={"type": "eq", "key": "year", "value": 1999}) == []
    assert set(found(query=["the red button", "hunts at dawn"], rewrite_query=True)) == {pump, cats}
    assert len(found(max_num_results=1)) == 1
    assert found(ranking_options={"ranker": "none", "score_threshold": 1.0}) in ([], [pump], [cats])


def test_chunks_have_the_size_that_was_asked_for(client: openai.OpenAI) -> None:
    text = "\n\n".join(f"Sentence {number} about nothing at all." for number in range(200))
    store = client.vector_stores.create()
    counts = []
    for size in (100, 800):
        strategy: Any = {
            "type": "static",
            "static": {"max_chunk_size_tokens": size, "chunk_overlap_tokens": 0},
        }
        added = client.vector_stores.files.upload_and_poll(
            vector_store_id=store.id, file=("long.txt", text.encode()), chunking_strategy=strategy
        )
        assert added.chunking_strategy is not None and added.chunking_strategy.to_dict() == strategy
        counts.append(len(client.vector_stores.files.content(added.id, vector_store_id=store.id).data))
    assert counts[0] > 2 * counts[1]


def test_all_of_a_list_can_be_deleted_page_by_page(known: Proxy) -> None:
    with client_of(known, BOB) as client:
        ids = {client.vector_stores.create().id for _ in range(7)}
        for store in client.vector_stores.list(limit=3):
            if store.id in ids:  # and not one of the operator
                client.vector_stores.delete(store.id)
        assert not ids & {store.id for store in client.vector_stores.list()}


# -- who may what ------------------------------------------------------------------------------------------------------


def test_what_belongs_to_others_does_not_exist(known: Proxy, client: openai.OpenAI) -> None:
    with client_of(known, ANN) as ann, client_of(known, BOB) as bob:
        file, store = upload(ann), ann.vector_stores.create(name="open-ann")
        ann.vector_stores.files.create_and_poll(file, vector_store_id=store.id)
        batch = ann.vector_stores.file_batches.create(store.id, file_ids=[file])
        own = bob.vector_stores.create()
        tries: list[Callable[[], object]] = [
            lambda: bob.files.retrieve(file),
            lambda: bob.files.content(file),
            lambda: bob.files.delete(file),
            lambda: bob.vector_stores.retrieve(store.id),
            lambda: bob.vector_stores.retrieve("open-ann"),
            lambda: bob.vector_stores.update(store.id, name="mine"),
            lambda: bob.vector_stores.delete(store.id),
            lambda: bob.vector_stores.search(store.id, query="pump"),
            lambda: bob.vector_stores.files.list(store.id),
            lambda: bob.vector_stores.files.retrieve(file, vector_store_id=store.id),
            lambda: bob.vector_stores.files.content(file, vector_store_id=store.id),
            lambda: bob.vector_stores.files.delete(file, vector_store_id=store.id),
            lambda: bob.vector_stores.files.create(own.id, file_id=file),
            lambda: bob.vector_stores.create(file_ids=[file]),
            lambda: bob.vector_stores.file_batches.create(own.id, file_ids=[file]),
            lambda: bob.vector_stores.file_batches.retrieve(batch.id, vector_store_id=store.id),
            lambda: bob.vector_stores.file_batches.retrieve(batch.id, vector_store_id=own.id),
            lambda: bob.vector_stores.file_batches.cancel(batch.id, vector_store_id=store.id),
        ]
        for number, attempt in enumerate(tries):
            with pytest.raises(openai.NotFoundError):
                attempt()
                pytest.fail(f"attempt {number}")
        assert file not in [one.id for one in bob.files.list()]
        assert store.id not in [one.id for one in bob.vector_stores.list()]
        assert bob.vector_stores.files.list(own.id).data == []
        assert client.vector_stores.retrieve(store.id).name == "open-ann"  # the administrator sees all
        assert ann.files.content(file).read() == PUMPS.encode()


def test_a_key_searches_those_of_the_operator_that_it_is_allowed_and_changes_none(
    known: Proxy, client: openai.OpenAI
) -> None:
    shared = client.vector_stores.create(name="open-manuals", file_ids=[upload(client)])
    secret = client.vector_stores.create(name="salaries")
    with client_of(known, ANN) as ann, client_of(known, BOB) as bob:
        for key in (ann, bob):
            assert key.vector_stores.retrieve(shared.id).name == "open-manuals"
            with pytest.raises(openai.PermissionDeniedError):
                key.vector_stores.delete(shared.id)
            with pytest.raises(openai.PermissionDeniedError):
                key.vector_stores.update(shared.id, name="mine")
            with pytest.raises(openai.PermissionDeniedError):
                key.vector_stores.files.create(shared.id, file_id=upload(key))
        assert secret.id in [store.id for store in ann.vector_stores.list()]
        assert secret.id not in [store.id for store in bob.vector_stores.list()]
        with pytest.raises(openai.NotFoundError):
            bob.vector_stores.search(secret.id, query="pump")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_invalid_is_refused_with_the_field(client: openai.OpenAI) -> None:
    store = client.vector_stores.create().id
    file = upload(client)
    stores: Any = client.vector_stores
    big = {f"key{number}": "x" for number in range(17)}
    refused: list[tuple[str, Callable[[], object]]] = [
        ("purpose", lambda: upload(client, purpose="anything")),
        ("metadata", lambda: stores.create(metadata=big)),
        ("metadata", lambda: stores.create(metadata={"a": "x" * 513})),
        ("metadata", lambda: stores.create(metadata={"a": 1})),
        ("metadata", lambda: stores.create(metadata={"": "x"})),
        ("metadata", lambda: stores.create(metadata={"a\0": "x"})),
        ("name", lambda: stores.create(name="x" * 257)),
        ("name", lambda: stores.create(name="a\0b")),
        ("name", lambda: stores.create(name=["a"])),
        ("expires_after", lambda: stores.create(expires_after={"anchor": "created_at", "days": 1})),
        ("days", lambda: stores.create(expires_after={"anchor": "last_active_at", "days": 0})),
        ("file_ids", lambda: stores.create(file_ids="file-1")),
        ("file_ids", lambda: stores.create(file_ids=[f"file-{number}" for number in range(10_000)])),
        ("file_id", lambda: stores.files.create(store, file_id=7)),
        ("attributes", lambda: stores.files.create(store, file_id=file, attributes={"a": [1]})),
        (
            "chunking_strategy",
            lambda: stores.files.create(store, file_id=file, chunking_strategy={"type": "x"}),
        ),
        ("file_ids", lambda: stores.file_batches.create(store, file_ids=[])),
        ("file_ids", lambda: stores.file_batches.create(store, extra_body={"files": [], "file_ids": []})),
    ]
    check_refused(refused)


def test_an_invalid_question_is_refused_with_the_field(client: openai.OpenAI) -> None:
    stores: Any = client.vector_stores
    store = stores.create().id
    refused: list[tuple[str, Callable[[], object]]] = [
        ("query", lambda: stores.search(store, query="")),
        ("query", lambda: stores.search(store, query=["a", 1])),
        ("max_num_results", lambda: stores.search(store, query="a", max_num_results=51)),
        ("filters", lambda: stores.search(store, query="a", filters={"type": "like", "key": "a", "value": "b"})),
        ("ranking_options", lambda: stores.search(store, query="a", ranking_options={"score_threshold": 2})),
        ("limit", lambda: stores.list(limit=0)),
        ("limit", lambda: stores.list(limit=101)),
        ("order", lambda: stores.list(order="up")),
        ("after", lambda: stores.list(after="vs_none")),
        ("filter", lambda: stores.files.list(store, filter="done")),
    ]
    check_refused(refused)


def check_refused(refused: list[tuple[str, Callable[[], object]]]) -> None:
    for param, attempt in refused:
        with pytest.raises(openai.BadRequestError) as failure:
            attempt()
            pytest.fail(param)
        assert failure.value.param == param and failure.value.type == "invalid_request_error", failure.value


def test_a_file_beyond_the_limit_is_refused_with_the_setting(client: openai.OpenAI) -> None:
    assert client.files.create(file=("fits", b"x" * 2**20), purpose="user_data").bytes == 2**20
    with pytest.raises(openai.APIStatusError, match=r"knowledge\.max_file_mib") as failure:
        client.files.create(file=("large", b"x" * (2**20 + 1)), purpose="user_data")
    assert failure.value.status_code == 413
    assert ADMIN not in str(failure.value)
