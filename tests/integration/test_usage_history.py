"""Usage and recent requests, in SQLite and in Postgres: what is counted, bounded, survives, and what never happens."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.store import FILE, MIGRATIONS, History, KeyValues, Store, history
from llama_smart_proxy.proxy.store.schema import Sql, Unavailable
from tests.support.disks import small_disk
from tests.support.harness import until
from tests.support.postgres import Server, postgres

__all__ = ["postgres"]
Opened = Callable[[], Store]


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Opens the same database each time."""
    if request.param == "sqlite":
        return lambda: Store(tmp_path)
    url: str = request.getfixturevalue("database")
    return lambda: Store(None, url)


@pytest.fixture
def database(postgres: Server) -> str:
    """The URL of a new one."""
    return postgres.database()


def today() -> str:
    return time.strftime("%Y-%m-%d")


def kept(store: Store, **limits: int) -> History:
    return History(store, **{"most": 10_000, "days": 90, **limits})


def ended(number: int = 1, *, model: str = "m", **fields: Any) -> RequestRecord:
    """A request that has taken a second."""
    arrived = time.monotonic() - 1
    record = RequestRecord(arrived, request_id=f"r{number}", method="POST", path="/v1/chat/completions", api="openai")
    record.model, record.status, record.resolved_s, record.ended_s = model, 200, arrived, arrived + 1
    record.slot = True
    record.counted = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    for name, value in fields.items():
        setattr(record, name, value)
    return record


async def test_usage_is_summed_up_by_key_model_and_day_over_a_restart(opened: Opened) -> None:
    begun = today()
    store = opened()
    first = kept(store)
    first.observe(ended(client="a"))
    first.observe(ended(client="a", status=500, counted=None))
    first.observe(ended(client="b", model="n", status=499, counted={"prompt_tokens": "x", "completion_tokens": -1}))
    first.observe(ended(model="-", resolved_s=0.0, slot=False))
    first.observe(ended(slot=False))
    store.close()
    again = kept(store := opened())
    again.observe(ended(client="a"))
    assert await again.usage(["key", "model"]) == [
        {"key": "a", "model": "m", "requests": 3, "errors": 1, "prompt_tokens": 20, "completion_tokens": 10,
         "cached_tokens": 8, "seconds": 3},
        {"key": "b", "model": "n", "requests": 1, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0,
         "cached_tokens": 0, "seconds": 1},
    ]  # fmt: skip
    assert [line["requests"] for line in await again.usage([])] == [4]
    days = {line["day"] for line in await again.usage(["day"], since=begun, until=today())}
    assert days and days <= {begun, today()}
    assert await again.usage(["day"], until="2001-01-01") == [] == await again.usage([], until="2001-01-01")
    store.close()


async def test_recent_requests_have_their_timeline_newest_first(opened: Opened) -> None:
    seen = kept(store := opened())
    record = ended(1, agents=["think"], backend="llama.cpp", client="k")
    record.sent_s = record.arrived_s + 0.5
    record.note(StepKind.LOAD, record.arrived_s + 0.1, record.arrived_s + 0.4, model="m")
    seen.observe(record)
    seen.observe(ended(2, status=404, error="not_found", model="n", path="/\udcff" + "x" * 9000))
    seen.observe(ended(3, cancelled=True, error="cancelled", status=410))
    seen.observe(failed := ended(4, status=401, resolved_s=0.0, slot=False))
    assert await seen.find("r4") is failed and await seen.find("r1") is record, "the newest ones are in memory"
    third, second, first = await seen.requests()
    again = await kept(store).find("r1")
    assert again is not None and again.spent_s(StepKind.LOAD) == pytest.approx(0.3)
    assert again.usage == {**record.counted, "prompt_tokens_details": {"cached_tokens": 4}}  # type: ignore[dict-item]
    assert await kept(store).find("r4") is None
    assert first["steps"] == [{"kind": "load", "began_s": 0.1, "ended_s": 0.4, "model": "m"}]
    assert (first["agents"], first["sent_s"], first["first_byte_s"], first["ended_s"]) == (["think"], 0.5, None, 1)
    assert (first["prompt_tokens"], first["cached_tokens"], first["outcome"]) == (10, 4, "ok")
    assert (second["outcome"], third["outcome"], len(second["path"])) == ("not_found", "cancelled", 200)
    for wanted, found in (
        ({"request_id": "r2"}, ["r2"]),
        ({"model": "m"}, ["r3", "r1"]),
        ({"key": "k"}, ["r1"]),
        ({"status": "4xx"}, ["r3", "r2"]),
        ({"status": "404"}, ["r2"]),
        ({"limit": 1}, ["r3"]),
    ):
        assert [entry["id"] for entry in await seen.requests(**wanted)] == found, wanted
    store.close()


async def test_what_is_kept_is_bounded(opened: Opened) -> None:
    begun = today()
    seen = kept(store := opened(), most=100)
    for number in range(300):
        record = ended(number)
        for step in range(60):
            record.note(StepKind.AGENT, 0.0, 1.0, agent=f"agent {step} " + "é" * 40)
        seen.observe(record)
        if number % 40 == 0:
            await seen.requests(limit=1)
    newest = await seen.requests(limit=1000)
    assert [entry["id"] for entry in newest[:100]] == [f"r{number}" for number in range(299, 199, -1)]
    assert len(newest) <= 200, "the oldest ones are removed by the hundred"
    assert all(entry["cut"] for entry in newest)
    rows = await store.run(lambda sql: sql.execute("SELECT max(length(entry)) FROM requests"))
    assert rows[0][0] <= history.MAX_ENTRY
    old = "INSERT INTO usage VALUES ('2001-01-01', '', 'm', 'openai', 1, 0, 0, 0, 0, 1.0)"
    await store.run(lambda sql: sql.execute(old))
    store.close()
    again = kept(store := opened())
    again.observe(ended())
    days = {line["day"] for line in await again.usage(["day"])}
    assert days and days <= {begun, today()}, "what is older than `days` is removed"
    store.close()


async def test_a_commit_whose_answer_was_lost_is_not_counted_twice(opened: Opened) -> None:
    class Lossy(Store):
        lost = False

        def do(self, work: Any, *, essential: bool = True) -> Any:
            result = super().do(work, essential=essential)
            if not essential and not self.lost:
                self.lost = True
                raise Unavailable("the answer to COMMIT is lost")
            return result

    plain = opened()
    plain.close()
    store = Lossy.__new__(Lossy)
    store.__dict__.update(plain.__dict__)
    seen = kept(store)
    seen.observe(ended(1))
    assert [line["requests"] for line in await seen.usage([])] == [1]
    seen.observe(ended(2))
    assert [line["requests"] for line in await seen.usage([])] == [2]
    assert [entry["id"] for entry in await seen.requests()] == ["r2", "r1"]
    store.close()


async def test_what_cannot_be_stored_does_not_keep_the_rest_from_being_stored(
    opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    seen = kept(store := opened())
    seen.observe(ended(1, client="\udcff"))  # no text in any database
    assert await seen.requests() == [] and seen.dropped == 1
    seen.observe(ended(2, client="a\0b"))  # none in Postgres
    assert len(await seen.requests()) + seen.dropped == 2
    seen.observe(ended(3))
    assert (await seen.requests())[0]["id"] == "r3"
    assert [record.levelname for record in caplog.records] == ["ERROR"] * seen.dropped
    store.close()


async def test_values_of_agents_are_kept_in_either(opened: Opened) -> None:
    values = KeyValues(store := opened(), "mine")
    await values.set("k", {"n": [1, None, "é"]})
    await values.set("k", 2)
    await values.set("k%", 3)
    await values.delete("absent")
    store.close()
    values = KeyValues(store := opened(), "mine")
    assert (await values.get("k"), await values.keys(), await values.keys("k%")) == (2, ["k", "k%"], ["k%"])
    assert await KeyValues(store, "other").get("k", "none") == "none"
    store.close()


async def test_a_failure_of_the_work_changes_nothing(opened: Opened) -> None:
    store = opened()

    def work(sql: Sql) -> None:
        sql.execute("INSERT INTO kept VALUES (?, ?, ?, ?)", ("a", "k", b"1", 0.0))
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await store.run(work)
    assert await KeyValues(store, "a").keys() == []
    store.close()


async def test_a_file_of_the_first_version_is_migrated(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as old:
        old.executescript(MIGRATIONS[0] + "PRAGMA user_version = 1; INSERT INTO kept VALUES ('a', 'k', '7', 0);")
    old.close()
    store = Store(tmp_path)
    seen = kept(store)
    seen.observe(ended())
    assert await KeyValues(store, "a").get("k") == 7
    assert len(await seen.requests()) == 1
    store.close()


async def test_while_the_file_is_locked_requests_wait_and_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llama_smart_proxy.proxy.store.sqlite.BUSY_S", 0.01)
    monkeypatch.setattr(history, "RETRY_S", 0.02)
    monkeypatch.setattr(history, "MAX_WAITING", 10)
    store = Store(tmp_path)
    seen = kept(store)
    await store.run(lambda sql: None)
    with sqlite3.connect(tmp_path / FILE, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        for number in range(50):
            seen.observe(ended(number))
        store.submit(seen._flush)
        await until(lambda: caplog.records, what="the line in the log")
        seen.observe(ended(99))
        other.execute("ROLLBACK")
    other.close()
    await until(lambda: not seen.waiting, what="the end of the backlog")
    assert [line["requests"] for line in await seen.usage([])] == [51], "usage is complete"
    assert (len(await seen.requests()), seen.dropped) == (11, 40)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "usage and recent requests cannot be written, and are kept for a while"
    ]
    store.close()


async def test_what_cannot_be_written_to_a_full_disk_waits_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(history, "RETRY_S", 0.02)
    with small_disk(tmp_path / "disk", 1 << 20):
        store = Store(tmp_path / "disk")
        seen = kept(store)
        seen.observe(ended(0))
        assert len(await seen.requests()) == 1
        filler = tmp_path / "disk" / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        for number in range(1, 500):
            seen.observe(ended(number))
        store.submit(seen._flush)
        await until(lambda: caplog.records, what="the line in the log")
        assert seen.waiting > 0  # a few that the thread has taken first may fit into what the file has already
        filler.unlink()
        await until(lambda: not seen.waiting, what="the end of the backlog")
        assert [line["requests"] for line in await seen.usage([])] == [500]
        assert (len(await seen.requests(limit=1000)), seen.dropped, len(caplog.records)) == (500, 0, 1)
        store.close()


async def test_a_postgres_that_is_away_is_waited_for_and_its_password_is_not_logged(
    postgres: Server, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("llama_smart_proxy.proxy.store.postgres.RETRY_S", 0.05)
    monkeypatch.setattr(history, "RETRY_S", 0.05)
    store = Store(None, database)
    seen = kept(store)
    seen.observe(ended(1))
    assert [line["requests"] for line in await seen.usage([])] == [1]
    postgres.stop()
    try:
        seen.observe(ended(2))
        store.submit(seen._flush)
        await until(lambda: len(caplog.records) >= 2, what="the lines in the log")
        with pytest.raises(Unavailable):
            await seen.usage([])
        seen.observe(ended(3))
    finally:
        postgres.start()
    await until(lambda: not seen.waiting, what="the end of the backlog")
    assert [line["requests"] for line in await seen.usage([])] == [3]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2 and "secret-of-tests" not in caplog.text
    store.close()


async def test_a_connection_that_was_cut_while_idle_is_replaced_at_once(postgres: Server, database: str) -> None:
    seen = kept(store := Store(None, database))
    assert await seen.usage([]) == []
    await asyncio.to_thread(postgres.stop)
    await asyncio.to_thread(postgres.start)
    seen.observe(ended())
    assert ([line["requests"] for line in await seen.usage([])], seen.problem) == ([1], "")
    store.close()


async def test_two_proxies_that_write_the_same_lines_lose_none(database: str, caplog: pytest.LogCaptureFixture) -> None:
    stores = [Store(None, database) for _ in range(2)]
    both = [kept(store) for store in stores]
    for _ in range(5):
        for seen, order in zip(both, (1, -1), strict=True):
            for number in range(200)[::order]:
                seen.observe(ended(number, model=f"m{number}"))
        await asyncio.gather(*(seen.usage([]) for seen in both))
    assert [line["requests"] for line in await both[0].usage([])] == [2000] and not caplog.records
    for store in stores:
        store.close()
