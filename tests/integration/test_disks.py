"""Disks that do not answer: what was known of their models is served, nothing else waits, and the log says it once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_smart_proxy.backends.base import ModelInfo, Services
from llama_smart_proxy.backends.llamacpp import headers as headers_module
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.llamacpp.provider import LlamaCpp
from llama_smart_proxy.backends.pool.launcher import Source
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.threads import Looks
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.backends.weights.models_dir import ModelsDir
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.errors import StartFailed
from tests.support.disks import Disk, stopping_disk
from tests.support.gguf_fixture import write_small_gguf as write
from tests.support.harness import PATIENCE_S, until
from tests.support.pools import Fakes, ask, open_pool

LIMIT_S = 0.5


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with stopping_disk(tmp_path / "disk") as disk:
        yield disk


def provider(folder: Path, **models: object) -> LlamaCpp:
    config = Config.model_validate({"llama_cpp": {"hf_cache": False, "models_dir": str(folder)}, "models": models})
    return LlamaCpp(config, Services(Downloads(), Pool(config.server_pool)))


def names(of: LlamaCpp) -> set[str]:
    return {model.name for model in of.models()}


# -- looks -------------------------------------------------------------------------------------------------------------


async def test_a_look_that_takes_too_long_is_neither_waited_for_nor_repeated_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate, begun, found = threading.Event(), [0], list[int]()

    def look() -> int:
        begun[0] += 1
        gate.wait()
        return begun[0]

    with caplog.at_level(logging.INFO):
        looks = Looks("the disk", look, found.append, LIMIT_S)
        await asyncio.gather(*(looks.look() for _ in range(20)))
        await until(lambda: looks.stalled, what="that it is noticed")
        await asyncio.gather(*(looks.look() for _ in range(20)))
        assert begun == [1] and found == []
        gate.set()
        await until(lambda: found == [1] and not looks.stalled, what="the late result")
        await looks.look()
        assert begun == [2] and found == [1, 2]
        await looks.look(fresh_s=60)
        assert begun == [2]
    assert [record.levelname for record in caplog.records if "the disk" in record.getMessage()] == ["WARNING", "INFO"]


async def test_a_look_shows_what_was_there_when_it_was_asked_for_and_is_shared() -> None:
    gate, begun, found = threading.Semaphore(0), [0], list[int]()

    def look() -> int:
        begun[0] += 1
        gate.acquire()
        return begun[0]

    looks = Looks("the disk", look, found.append, 60)
    first = asyncio.ensure_future(looks.look())
    await until(lambda: begun == [1], what="the first look")
    later = [asyncio.ensure_future(looks.look()) for _ in range(5)]  # what the first one has read may be older
    await asyncio.sleep(0)
    gate.release()
    await first
    assert not any(waiting.done() for waiting in later)
    gate.release()
    await asyncio.gather(*later)
    assert begun == [2]


async def test_a_look_that_fails_is_logged_and_the_next_one_is_made(caplog: pytest.LogCaptureFixture) -> None:
    results, found = [1, 0, 2], list[float]()
    looks = Looks("the disk", lambda: 1 / results.pop(), found.append, 60)
    for _ in range(3):
        await looks.look()
    assert found == [0.5, 1.0]
    assert [record.getMessage() for record in caplog.records] == ["the disk: unforeseen failure"]


# -- a real disk -------------------------------------------------------------------------------------------------------


async def test_the_last_known_list_of_a_folder_is_served_while_its_disk_does_not_answer(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    write(disk.folder / "known.gguf")
    models = provider(disk.folder)
    await models.listed()
    assert names(models) == {"known"}
    disk.stop()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            await models.listed()
            assert names(models) == {"known"} and models.known("known") is not None
            assert await models.find("unknown", pull=False) is None
        disk.resume()
        write(disk.folder / "new.gguf")
        await until(lambda: "answers again" in caplog.text, what="the end of the look")
        while names(models) != {"known", "new"}:
            await models.listed()
    assert caplog.text.count("does not answer") == 1


@pytest.mark.parametrize("is_below", [False, True], ids=["the folder", "a folder in it"])
async def test_models_on_a_disk_that_fails_are_known_until_it_is_said_that_they_are_gone(
    disk: Disk, is_below: bool
) -> None:
    write(disk.folder / "known.gguf")
    models = provider(disk.folder.parent if is_below else disk.folder)
    await models.listed()
    disk.fail()
    await models.reread()
    assert names(models) == {"known"}
    told = [problem for problem in await models.problems() if "not connected" in problem.message]
    assert len(told) == 1 and not told[0].fatal and told[0].harmless is is_below
    disk.resume()
    await models.reread()
    assert names(models) == {"known"} and not await models.problems()
    (disk.folder / "known.gguf").unlink()
    await models.reread()
    assert names(models) == set()


async def test_headers_on_a_disk_that_does_not_answer_delay_no_others_and_take_few_threads(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers_module, "READ_S", LIMIT_S)
    dead = {f"dead{n}": ModelConfig(path=write(disk.folder / f"{n}.gguf")) for n in range(8)}
    near = ModelConfig(path=write(tmp_path / "near.gguf"))
    headers, before = Headers(), threading.active_count()
    known = await headers.info("dead0", dead["dead0"])
    assert known.parameters == 512
    disk.stop()
    stuck = asyncio.ensure_future(asyncio.gather(*(headers.info(name, dead[name]) for name in ("dead0", "dead1"))))
    assert await stuck == [known, ModelInfo("dead1")]

    async def read_near() -> bool:
        return (await headers.info("near", near)).parameters == 512

    await until(read_near, what="the header of the disk that answers")
    for _ in range(5):
        await asyncio.gather(*(headers.info(name, dead[name]) for name in dead))
    assert threading.active_count() - before <= headers_module.MAX_READERS
    disk.resume()

    async def read_dead() -> bool:
        found = await asyncio.gather(*(headers.info(name, dead[name]) for name in dead))
        return all(info.parameters == 512 for info in found)

    await until(read_dead, what="the headers, once the disk answers")


# -- many files --------------------------------------------------------------------------------------------------------


async def test_headers_of_more_files_than_can_be_waited_for_are_read_meanwhile(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers_module, "MANY", 3)
    monkeypatch.setattr(headers_module, "READ_S", 3600)
    for number in range(12):
        write(disk.folder / f"m{number}.gguf")
    found = ModelsDir(disk.folder, {}).look().models.values()
    configs = {file.name: ModelConfig(path=file.path) for file in found}
    headers = Headers()

    async def infos() -> list[ModelInfo]:
        return await asyncio.gather(*(headers.info(file.name, configs[file.name], file) for file in found))

    disk.stop()
    assert {(info.parameters, info.size_bytes > 512) for info in await infos()} == {(0, True)}
    disk.resume()
    one = list(found)[-1]  # alone, it is waited for
    assert (await headers.info(one.name, configs[one.name], one)).parameters == 512

    async def all_read() -> bool:
        return all(info.parameters == 512 for info in await infos())

    await until(all_read, what="all headers")
    for file in found:
        file.path.unlink()
    assert {info.parameters for info in await infos()} == {512}, "a file that is known was looked at again"


async def test_a_model_whose_file_has_become_another_one_is_unloaded(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    write(tmp_path / "b" / "m.gguf")
    models = provider(tmp_path)
    await models.listed()
    (before,) = models.models()
    write(tmp_path / "a" / "m.gguf")
    await models.listed()
    now = models.known("m")
    assert now is not None and now is not before and now.config.path == tmp_path / "a" / "m.gguf"
    assert names(models) == {"m", "b/m"}


async def test_a_start_whose_files_cannot_be_read_ends_and_others_start_meanwhile(disk: Disk, tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    far = fakes.model().model_copy(update={"path": write(disk.folder / "far.gguf")})
    far.run_by(fakes.program)
    async with open_pool(fakes.config(size=2, load_timeout_s=4.0)) as pool:
        disk.stop()
        loading = asyncio.ensure_future(ask(pool, "far", far))
        await until(lambda: pool.state("far") == "loading", what="the start")
        assert b"chat.completion" in await ask(pool, "near", fakes.model())
        with pytest.raises(StartFailed, match="files could not be read within 4 s") as failed:
            await loading
        assert (failed.value.status, failed.value.code) == (504, "model_load_timeout")
        disk.resume()


@pytest.mark.parametrize("known", [True, False])
async def test_requests_whose_downloaded_files_cannot_be_found_fail_in_time_and_share_one_thread(
    disk: Disk, tmp_path: Path, known: bool
) -> None:
    fakes = Fakes(tmp_path)
    path = write(disk.folder / "far.gguf")

    def find() -> Path | None:
        return path if path.exists() else None

    async def never(_: object) -> None:
        raise AssertionError("it is on this disk")

    model = replace(fakes.model().at("far"), source=Source("far", find, never))
    async with open_pool(fakes.config(size=2, load_timeout_s=4.0)) as pool:
        if known:
            await pool.load(model)
            await pool.unload("far")
        disk.stop()
        before = set(threading.enumerate())
        loading = [asyncio.ensure_future(pool.load(model)) for _ in range(20)]
        done, waiting = await asyncio.wait(loading, timeout=PATIENCE_S)
        assert len(set(threading.enumerate()) - before) == 1 and not waiting
        assert all(isinstance(one.exception(), StartFailed) for one in done)
        disk.resume()
        await until(lambda: set(threading.enumerate()) <= before, what="the end of the thread")
