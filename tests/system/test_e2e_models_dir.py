"""`models_dir` over HTTP: what is in it by every API, what comes later, and a disk that stops answering."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support import raw_client
from tests.support.disks import stopping_disk
from tests.support.e2e_support import Fakes, body_of, chat, fakes
from tests.support.gguf_fixture import write_small_gguf as write
from tests.support.harness import ROOT, Proxy, environment, running_proxy, until

__all__ = ["fakes"]  # fixture


def fill(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write(folder / file)


def config(fakes: Fakes, folder: Path, **pool: object) -> dict[str, Any]:
    found = fakes.config({"own": fakes.model()}, **pool)
    found["llama_cpp"] |= {"models_dir": str(folder), "hf_cache": False}
    return found


async def ids(proxy: Proxy) -> set[str]:
    answer = await raw_client.get(proxy.port, "/v1/models")
    assert answer.status == 200
    return {item["id"] for item in answer.json()["data"]}


@pytest.fixture
async def served(fakes: Fakes) -> AsyncIterator[tuple[Proxy, Path]]:
    folder = fakes.folder / "models"
    folder.mkdir()
    async with running_proxy(config(fakes, folder, size=4)) as proxy:
        yield proxy, folder


async def test_models_of_nested_folders_answer_by_names_in_any_script(served: tuple[Proxy, Path]) -> None:
    proxy, folder = served
    names = {"flat", "Tiny-Q8_0", "模型-7B", "müller", "🦙 my model (1)", "a/x", "x", "-50%?#", "bytes-", "two-lines"}
    fill(folder, "flat.gguf", "acme/Tiny-GGUF/Tiny-Q8_0.gguf", "模型-7B.gguf", "mu\u0308ller.gguf")
    fill(folder, "🦙 my model (1).gguf", "a/x.gguf", "x.gguf", "-50%?#.gguf", "two\nlines.gguf")
    shutil.copy(folder / "flat.gguf", folder / os.fsdecode(b"bytes\xe9.gguf"))
    assert await ids(proxy) == names | {"own"}
    for name in (*names, "acme/Tiny-GGUF/Tiny-Q8_0"):
        answer = await chat(proxy, name)
        assert (answer.status, answer.json().get("model")) == (200, name.removeprefix("acme/Tiny-GGUF/"))
        assert (await raw_client.get(proxy.port, f"/v1/models/{quote(name)}")).status == 200
        assert (await raw_client.post(proxy.port, "/api/show", {"model": name})).status == 200
        assert (await raw_client.post(proxy.port, "/api/chat", body_of(name))).status == 200
    tags = (await raw_client.get(proxy.port, "/api/tags")).json()["models"]
    assert {item["name"] for item in tags} == names | {"own"}
    await until(lambda: "a/x.gguf is offered as 'a/x'" in proxy.log, what="the line of the log")
    assert proxy.log.count("a/x.gguf is offered as 'a/x'") == 1
    health = await proxy.health()
    assert (health["status"], health["problems"]) == ("healthy", [])


async def test_a_projector_that_comes_beside_a_model_is_shown_and_is_no_model(served: tuple[Proxy, Path]) -> None:
    proxy, folder = served
    fill(folder, "org/vl/vl-4b-Q4_K_M.gguf")

    async def shown() -> Any:
        return (await raw_client.post(proxy.port, "/api/show", {"model": "vl-4b-Q4_K_M"})).json()["capabilities"]

    async def listed() -> Any:
        tags = (await raw_client.get(proxy.port, "/api/tags")).json()["models"]
        return next(item["capabilities"] for item in tags if item["name"] == "vl-4b-Q4_K_M")

    assert await shown() == await listed() == ["completion"]
    fill(folder, "org/vl/mmproj-F16.gguf")

    async def has_vision() -> bool:
        return "vision" in await shown()

    await until(has_vision, what="vision")
    assert await shown() == await listed() == ["completion", "vision"]
    assert "mmproj-F16" not in await ids(proxy)


async def test_a_link_whose_target_comes_after_the_start_is_found_by_the_first_request_for_it(
    served: tuple[Proxy, Path],
) -> None:
    proxy, folder = served
    (folder / "big.gguf").symlink_to(folder.parent / "nas" / "big.gguf")
    assert await ids(proxy) == {"own"}
    fill(folder.parent, "nas/big.gguf")
    assert (await chat(proxy, "big")).status == 200


async def test_a_disk_that_stops_answering_delays_no_other_model_and_neither_start_nor_end(fakes: Fakes) -> None:
    settings, offered = config(fakes, fakes.folder / "models"), {"own", "known", "hf.co/org/repo:Q4_0"}
    settings["llama_cpp"]["hf_cache"] = True
    with stopping_disk(fakes.folder / "models") as disk:
        fill(disk.folder, "known.gguf", ".hub/models--org--repo/snapshots/1/m-Q4_0.gguf")
        disk.stop()
        async with running_proxy(settings, env={"HF_HUB_CACHE": str(disk.folder / ".hub")}) as proxy:
            assert (await chat(proxy, "own")).status == 200
            assert await ids(proxy) == {"own"}
            disk.resume()

            async def known() -> bool:
                return await ids(proxy) == offered

            await until(known, what="the models, once the disk answers")
            await until(lambda: "answers again" in proxy.log, what="that in the log")
            warnings = proxy.log.count("of it last is served")
            disk.stop()
            for _ in range(3):
                assert await ids(proxy) == offered
                assert (await chat(proxy, "own")).status == 200
                assert (await chat(proxy, "unknown")).status == 404
                assert (await chat(proxy, "hf.co/org/repo:Q8_0")).status == 404
            health = await proxy.health()
            assert health["status"] == "degraded"
            assert any("llama_cpp" in problem["where"] for problem in health["problems"])
            wanted = warnings + 2  # once for the folder and for the cache
            await until(lambda: proxy.log.count("of it last is served") >= wanted, what="the warnings")
            assert proxy.log.count("of it last is served") == wanted
        assert not proxy.alive


@pytest.mark.full
@pytest.mark.parametrize("path", ["/v1/models", "/api/tags"])
async def test_ten_times_as_many_files_are_listed_in_time_proportional_to_them(fakes: Fakes, path: str) -> None:
    source = write(fakes.folder / "source")

    async def spent_s(count: int) -> float:
        folder = fakes.folder / str(count)
        for number in range(count):
            file = folder / f"pub{number % 50}" / f"repo{number % 500}" / f"m{number}-Q4_K_M.gguf"
            file.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, file)
        async with running_proxy(config(fakes, folder)) as proxy:
            before_s = proxy.cpu_s()
            for _ in range(5):
                answer = await raw_client.get(proxy.port, path)
                assert len(next(value for value in answer.json().values() if isinstance(value, list))) == count + 1
            return proxy.cpu_s() - before_s

    assert await spent_s(5000) < 50 * await spent_s(500)


def test_check_reports_every_file_that_has_another_name_than_its_own(tmp_path: Path) -> None:
    fill(tmp_path, "models/a/x.gguf", "models/b/x.gguf", "models/own.gguf", "models/c/own.gguf", "elsewhere.gguf")
    file = tmp_path / "config.yaml"
    file.write_text("llama_cpp: {models_dir: models}\nmodels: {own: {path: elsewhere.gguf}}\n")
    argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(file)]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stderr.splitlines() == [
        "warning: llama_cpp.models_dir: own.gguf is offered as 'own.gguf': the name 'own' means a configured model",
        "warning: llama_cpp.models_dir: b/x.gguf is offered as 'b/x': the name 'x' means a/x.gguf",
        "warning: llama_cpp.models_dir: c/own.gguf is offered as 'c/own': the name 'own' means a configured model",
    ]
