"""The state that outlives a restart: where it is, who may read it, and what becomes of a file that cannot be used."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.store import FILE, MIGRATIONS, KeyValues, ProxyMemory, Store, state_dir
from llama_smart_proxy.proxy.store import values as module
from llama_smart_proxy.proxy.store.schema import Sql
from llama_smart_proxy.proxy.store.values import MAX_KEY, MAX_VALUE
from tests.support.harness import PATIENCE_S


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def test_what_was_set_is_there_after_a_restart_for_that_agent_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    store = Store(folder)
    mine = KeyValues(store, "mine")
    await mine.set("k", {"n": [1, None, "é"]})
    await mine.set("k2", 2)
    await KeyValues(store, "other").set("k", "theirs")
    await mine.delete("k2")
    store.close()
    again = Store(folder)
    mine, other = KeyValues(again, "mine"), KeyValues(again, "other")
    assert (await mine.get("k"), await mine.get("k2", 0), await mine.keys()) == ({"n": [1, None, "é"]}, 0, ["k"])
    assert (await other.get("k"), await KeyValues(again, "third").get("k")) == ("theirs", None)
    again.close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files(folder)} == {0o600}


async def test_nothing_is_created_before_something_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.close()
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_damaged_file_is_set_aside_with_one_line_in_the_log(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    store = Store(tmp_path)
    values = KeyValues(store, "a")
    await values.set("k", 1)
    store.close()
    assert await KeyValues(Store(tmp_path), "a").get("k") == 1, "the new file is used"
    (aside,) = [file for file in files(tmp_path) if "damaged" in file.name]
    assert aside.read_bytes() == content
    assert [record.message.split(" is damaged")[0] for record in caplog.records] == [str(tmp_path / FILE)]


async def test_a_file_that_is_damaged_while_it_is_open_is_set_aside_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    values = KeyValues(store, "a")
    for number in range(300):
        await values.set(f"k{number}", "x" * 500)
    await store.run(lambda sql: None)
    store.close()
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:8192] + b"\xa5" * (len(whole) - 8192))
    values = KeyValues(again := Store(tmp_path), "a")
    for number in range(300):  # wherever the damage is met first
        await values.get(f"k{number}")
    await values.set("k", 1)
    assert await values.get("k") == 1
    assert any("damaged" in file.name for file in files(tmp_path))
    again.close()


@pytest.mark.parametrize("kind", ["a file in its place", "a folder in the place of the file", "a newer version"])
async def test_without_a_usable_folder_all_is_kept_in_memory_and_the_log_says_so_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    if kind == "a file in its place":
        folder.write_text("")
    elif kind == "a folder in the place of the file":
        (folder / FILE).mkdir(parents=True)
    else:
        await KeyValues(first := Store(folder), "a").set("k", 1)
        first.close()
        with sqlite3.connect(folder / FILE) as connection:
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    store = Store(folder)
    values = KeyValues(store, "a")
    await asyncio.gather(*(values.set(f"k{number}", number) for number in range(5)))
    assert await values.get("k3") == 3
    store.close()
    (record,) = caplog.records
    assert "only in memory (setting state_dir)" in record.message


async def test_a_folder_that_cannot_be_looked_at_is_reported_and_all_is_kept_in_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store(Path("/", 300 * "x"))
    ProxyMemory(store).recall("k", lambda value: None)
    async with asyncio.timeout(PATIENCE_S):
        await KeyValues(store, "mine").set("k", 1)
    assert await KeyValues(store, "mine").get("k") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    store.close()


async def test_work_that_fails_does_not_end_the_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.submit(lambda: [][0])
    async with asyncio.timeout(PATIENCE_S):
        await KeyValues(store, "mine").set("k", 1)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    store.close()


def test_the_first_uses_may_come_from_several_threads_at_one_time(tmp_path: Path) -> None:
    stores, before = [Store(tmp_path / str(number)) for number in range(20)], threading.active_count()
    together = threading.Barrier(4)

    def use(number: int) -> None:
        for store in stores:
            together.wait(PATIENCE_S)
            asyncio.run(KeyValues(store, "mine").set(f"k{number}", number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    assert threading.active_count() == before + len(stores)
    for store in stores:
        store.close()


async def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 3)
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    values, other = KeyValues(store := Store(tmp_path), "a"), KeyValues(store, "b")
    await other.set("k", 1)
    for key in "abcd":
        await values.set(key, key)
    assert await values.keys() == ["b", "c", "d"]
    await values.set("b", "x" * 900)
    await values.set("e", "x" * 100)
    assert await values.keys() == ["e"], "what was written longest ago goes first, until there is room"
    assert await other.get("k") == 1
    for key, value in (("x" * (MAX_KEY + 1), 1), ("x", "y" * MAX_VALUE)):
        with pytest.raises(ValueError, match="at most"):
            await values.set(key, value)
    with pytest.raises(TypeError):
        await values.set("x", object())
    store.close()


async def test_a_failure_of_the_work_is_raised_and_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def work(sql: Sql) -> None:
        sql.execute("INSERT INTO kept VALUES ('a', 'k', '1', 0)")
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await store.run(work)
    with pytest.raises(sqlite3.OperationalError, match="syntax"):
        await store.run(lambda sql: sql.execute("nonsense"))
    assert await KeyValues(store, "a").keys() == []
    await KeyValues(store, "a").set("x%", 1)
    assert await KeyValues(store, "a").keys("x%") == ["x%"] and await KeyValues(store, "a").keys("%") == []
    store.close()


@pytest.mark.parametrize(
    ("configured", "environ", "folder"),
    [
        ("/c", {"STATE_DIRECTORY": "/s", "XDG_STATE_HOME": "/x"}, "/c"),
        (None, {"STATE_DIRECTORY": "/s:/t", "XDG_STATE_HOME": "/x"}, "/s"),
        (None, {"XDG_STATE_HOME": "/x"}, "/x/llama-smart-proxy"),
        (None, {"XDG_STATE_HOME": "relative"}, "~/.local/state/llama-smart-proxy"),
        (None, {}, "~/.local/state/llama-smart-proxy"),
    ],
)
def test_the_folder_is_the_one_configured_or_systemds_or_the_users(
    configured: str | None, environ: dict[str, str], folder: str
) -> None:
    assert state_dir(Path(configured) if configured else None, environ) == Path(folder).expanduser()
