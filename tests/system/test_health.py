"""What `/health` says of what is missing, and the log at start; it is found again at each question."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.disks import stopping_disk
from tests.support.e2e_support import Fakes, chat, fakes
from tests.support.harness import Proxy, environment, free_port, running_proxy, until
from tests.support.ollamas import black_hole, running_ollama
from tests.support.raw_client import get

__all__ = ["fakes"]


async def wrong(proxy: Proxy) -> dict[str, str]:
    """The problems in `/health`, which is degraded exactly if there are any."""
    answer = await get(proxy.port, "/health")
    body: dict[str, Any] = answer.json()
    assert answer.status == 200 and body["status"] == ("degraded" if body["problems"] else "healthy")
    return {problem["where"]: problem["message"] for problem in body["problems"]}


async def only_wrong(proxy: Proxy, *places: str) -> dict[str, str]:
    """The problems, once they are at these places, and all that is to be checked could be checked in time."""
    found: dict[str, str] = {}

    async def checked() -> bool:
        found.clear()
        found.update(await wrong(proxy))
        return set(found) == set(places) and not any("cannot be checked" in message for message in found.values())

    await until(checked, what=f"no problems but {places}")
    return found


async def test_a_missing_model_degrades_until_its_file_is_there_and_again_when_it_has_gone(fakes: Fakes) -> None:
    late, package = fakes.folder / "late.gguf", {"package": "no_such_package", "file": "m.gguf"}
    config = fakes.config({"there": fakes.model(), "late": {"path": str(late)}, "none": package, "bad": {"repo": "x"}})
    async with running_proxy(config) as proxy:
        found = await only_wrong(proxy, "models.late.path", "models.none.package", "models.bad.repo")
        assert found["models.late.path"] == f"no such file: {late}"
        await until(
            lambda: all(f"WARNING proxy.serve: {where}: {message}" in proxy.log for where, message in found.items())
        )
        assert (await chat(proxy, "there")).status == 200
        late.write_bytes(b"GGUF")
        await only_wrong(proxy, "models.none.package", "models.bad.repo")
        assert (await chat(proxy, "late")).status == 200
        late.unlink()
        late_again = await only_wrong(proxy, "models.late.path", "models.none.package", "models.bad.repo")
        fakes.server.unlink()
        found = await only_wrong(proxy, "llama_cpp.server", *late_again)
        assert "no such program" in found["llama_cpp.server"]


async def test_a_model_on_a_disk_that_stops_answering_degrades_until_it_answers_again(fakes: Fakes) -> None:
    with stopping_disk(fakes.folder / "disk") as disk:
        (disk.folder / "m.gguf").write_bytes(b"GGUF")
        config = fakes.config({"there": fakes.model(), "far": {"path": str(disk.folder / "m.gguf")}})
        async with running_proxy(config) as proxy:
            await only_wrong(proxy)
            disk.stop()
            for _ in range(3):
                assert await wrong(proxy) == {"llama_cpp": "cannot be checked: no answer within 0.7 s"}
                assert (await chat(proxy, "there")).status == 200
            disk.resume()
            await only_wrong(proxy)


async def test_the_only_ollama_being_down_degrades_until_it_is_back_and_check_warns_of_it(tmp_path: Path) -> None:
    port = free_port()
    async with running_proxy({"ollama": {"host": f"127.0.0.1:{port}"}}) as proxy:
        found = await only_wrong(proxy, "ollama.host")
        assert found["ollama.host"].startswith(f"no Ollama host answers: cannot connect to http://127.0.0.1:{port}: ")
        (tmp_path / "c.json").write_text(json.dumps({"ollama": {"host": f"127.0.0.1:{port}"}}))
        argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(tmp_path / "c.json")]
        checked = await asyncio.to_thread(subprocess.run, argv, env=environment(), capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, f"warning: ollama.host: {found['ollama.host']}\n")
        await until(lambda: f"WARNING proxy.serve: ollama.host: {found['ollama.host']}" in proxy.log)
        async with running_ollama("a", port=port):
            await only_wrong(proxy)
        await until(lambda: wrong(proxy), what="the problem again")


async def test_one_of_several_ollamas_being_down_is_reported_but_does_not_degrade() -> None:
    async with running_ollama("a") as fake:
        down = f"http://127.0.0.1:{free_port()}"
        async with running_proxy({"ollama": {"host": [fake.url, down]}}) as proxy:

            async def told() -> bool:
                return [server["url"] for server in (await proxy.health())["remotes"] if "error" in server] == [down]

            await until(told)
            await only_wrong(proxy)


async def test_a_model_that_no_ollama_has_is_a_problem_unless_it_would_be_pulled() -> None:
    async with running_ollama("a") as fake:
        ollama = {"host": fake.url, "pull": "never"}
        models = {"a": {"backend": "ollama"}, "b": {"backend": "ollama"}}
        async with running_proxy({"ollama": ollama, "models": models}) as proxy:
            found = await only_wrong(proxy, "models.b")
            assert found == {"models.b": "no Ollama host has it, and ollama.pull is never"}
        async with running_proxy({"ollama": {"host": fake.url}, "models": models}) as proxy:
            await only_wrong(proxy)


async def test_an_ollama_that_neither_answers_nor_refuses_is_a_problem() -> None:
    with black_hole() as port:
        async with running_proxy({"ollama": {"host": f"127.0.0.1:{port}"}}) as proxy:
            await until(lambda: wrong(proxy), what="a problem")


async def test_the_only_remote_being_down_degrades() -> None:
    async with running_proxy({"remotes": {"far": {"url": f"http://127.0.0.1:{free_port()}"}}}) as proxy:

        async def told() -> bool:
            return "cannot connect" in (await wrong(proxy)).get("remotes", "")

        await until(told)
