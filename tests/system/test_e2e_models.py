"""The lists of models, and what llama-server's router API does to them."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai

from tests.support import raw_client
from tests.support.e2e_support import (
    CHAT,
    Fakes,
    Gate,
    body_of,
    chat,
    embedded,
    fakes,
    gate,
    idle,
    instance,
    needs_llama_cpp,
    state,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, free_port, running_proxy, until
from tests.support.toxic import EVENT_HEAD, Link, RawUpstream, Request, raw_upstream

__all__ = ["fakes", "gate", "tiny_models"]  # fixtures


async def ids(proxy: Proxy, path: str = "/v1/models") -> list[str]:
    answer = await raw_client.get(proxy.port, path)
    assert answer.status == 200, answer.body
    return [item["id"] for item in answer.json()["data"]]


async def post(proxy: Proxy, path: str, model: object) -> Any:
    return (await raw_client.post(proxy.port, path, {"model": model})).json()


# -- lists and states --------------------------------------------------------------------------------------------------


async def test_both_lists_tell_what_is_unloaded_loading_and_loaded(fakes: Fakes, gate: Gate) -> None:
    models = {"slow": fakes.model(LOAD_UNTIL=gate), "quick": fakes.model(), "cold": fakes.model()}
    async with running_proxy(fakes.config(models)) as proxy:
        for path in ("/v1/models", "/models", "/v1/models/"):
            answer = (await raw_client.get(proxy.port, path)).json()
            assert answer["object"] == "list"
            assert {item["id"]: item["status"] for item in answer["data"]} == {
                name: {"value": "unloaded"} for name in models
            }
        assert await post(proxy, "/models/load", "slow") == {"success": True}
        assert await state(proxy, "slow") == "loading"
        await chat(proxy, "quick")
        assert [await state(proxy, name) for name in ("quick", "cold")] == ["loaded", "unloaded"]
        gate.open()

        async def loaded() -> bool:
            return await state(proxy, "slow") == "loaded"

        await until(loaded)


async def test_an_entry_has_what_clients_look_for(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"org/m:7b": fakes.model(fields={"aliases": ["m"]})})) as proxy:
        (entry,) = (await raw_client.get(proxy.port, "/v1/models")).json()["data"]
        assert entry["id"] == "org/m:7b" and entry["object"] == "model" and entry["aliases"] == ["org/m:7b", "m"]
        assert isinstance(entry["created"], int) and isinstance(entry["owned_by"], str)
        for name in ("org/m:7b", "org/m:7b/", "m", "org%2Fm:7b", "ORG/M:7B"):
            answer = await raw_client.get(proxy.port, f"/v1/models/{name}")
            assert answer.status == 200 and answer.json() == entry, name
        assert (await chat(proxy, "org/m:7b")).json()["model"] == "org/m:7b"
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="-", max_retries=0) as client:
            assert (await client.models.retrieve("org/m:7b")).id == "org/m:7b"


async def test_an_unknown_model_is_a_404_that_names_the_known_ones(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"one": fakes.model(), "two": fakes.model()})) as proxy:
        answer = await chat(proxy, "three")
        assert answer.status == 404
        assert answer.error == {
            "message": "model 'three' not found; known models: one, two",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
        for path, body in (("/models/load", {"model": "three"}), ("/models/unload", {"model": "three"})):
            answer = await raw_client.post(proxy.port, path, body)
            assert answer.status == 404 and answer.error["code"] == "model_not_found"
        assert (await raw_client.get(proxy.port, "/v1/models/three")).status == 404
        assert (await raw_client.get(proxy.port, "/props?model=three")).status == 404
        for model in (None, "", 7, ["one"]):
            answer = await raw_client.post(proxy.port, CHAT, body_of("") | {"model": model})
            assert answer.status == 400 and answer.error["param"] == "model"
        assert fakes.events("start") == []


async def test_with_one_model_in_all_none_need_be_named(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"only": fakes.model()})) as proxy:
        answer = await raw_client.post(proxy.port, CHAT, {"messages": []})
        assert answer.status == 200 and answer.json()["model"] == "only"
        assert (await raw_client.get(proxy.port, "/props")).json()["model_alias"] == "only"


# -- llama-server's router API -----------------------------------------------------------------------------------------


async def test_load_and_unload_do_so_and_may_be_repeated(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(fields={"aliases": ["also-m"]})})) as proxy:

        async def loaded() -> bool:
            return await state(proxy, "m") == "loaded"

        for _ in range(2):
            assert await post(proxy, "/models/load", "also-m") == {"success": True}
        await until(loaded)
        assert len(fakes.events("start")) == 1
        for _ in range(2):
            assert await post(proxy, "/models/unload", "m") == {"success": True}
            assert await state(proxy, "m") == "unloaded" and proxy.children() == []
        assert (await chat(proxy, "m")).status == 200


async def test_a_load_that_fails_is_told_by_the_list(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(EXIT=3)})) as proxy:
        assert await post(proxy, "/models/load", "m") == {"success": True}

        async def failed() -> dict[str, Any] | None:
            status = (await raw_client.get(proxy.port, "/v1/models/m")).json()["status"]
            return dict(status) if status.get("failed") else None

        await until(failed)
        status = await failed()
        assert status is not None and status["value"] == "unloaded" and "exited with code 3" in status["error"]


async def test_unloading_a_model_that_answers_lets_it_finish(fakes: Fakes, gate: Gate) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()})) as proxy:
        async with raw_client.connected(proxy.port) as client:
            wish = body_of("m", stream=True, fake={"tokens": 15, "last_at": str(gate)})
            await client.send(raw_client.request("POST", CHAT, wish))
            await client.head()
            assert await post(proxy, "/models/unload", "m") == {"success": True}
            gate.open()
            body = b""
            while piece := await client.chunk():
                body += piece
        assert b'"t14 "' in body and body.endswith(b"data: [DONE]\n\n")
        await until(lambda: proxy.children() == [], what="the end of the unloaded server")


# -- a folder of models ------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_files_that_appear_in_models_dir_are_offered_without_a_restart(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    config = embedded({"fixed": tiny(tiny_models["tiny-a"])})
    config["llama_cpp"] |= {"models_dir": str(tmp_path), "args": ["-t", "1", "-c", "2048"]}
    async with running_proxy(config) as proxy:
        assert await ids(proxy) == ["fixed"]
        assert (await chat(proxy, "new.model")).status == 404
        shutil.copy(tiny_models["tiny-b"], tmp_path / "new.model.gguf")
        assert await ids(proxy) == ["fixed", "new.model"]
        answer = await chat(proxy, "new.model", max_tokens=3)
        assert answer.status == 200 and answer.json()["model"] == "new.model"
        (tmp_path / "new.model.gguf").unlink()
        assert await ids(proxy) == ["fixed"]


@needs_llama_cpp
async def test_a_reload_of_the_list_unloads_what_is_gone(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    config = embedded({"fixed": tiny(tiny_models["tiny-a"])})
    config["llama_cpp"] |= {"models_dir": str(tmp_path), "args": ["-t", "1", "-c", "2048"]}
    file = tmp_path / "other.gguf"
    shutil.copy(tiny_models["tiny-b"], file)
    async with running_proxy(config) as proxy:
        for name in ("fixed", "other"):
            assert (await chat(proxy, name, max_tokens=3)).status == 200
        file.unlink()
        listed = (await raw_client.get(proxy.port, "/models?reload=1")).json()["data"]
        assert [item["id"] for item in listed] == ["fixed"]
        assert [item["model"] for item in (await proxy.health())["instances"]] == ["fixed"]


# -- remotes -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def chained(fakes: Fakes, remotes: dict[str, Any]) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """A proxy in front of another one, which is its remote `inner`, after further `remotes`."""
    async with running_proxy(fakes.config({"a": fakes.model(), "org/b": fakes.model()})) as inner:
        config = fakes.config({"own": fakes.model()})
        config["remotes"] = {**remotes, "inner": {"url": f"{inner.url}/v1"}}
        async with running_proxy(config) as outer:

            async def listed() -> bool:
                return len(await ids(outer)) >= 3

            await until(listed, what="the models of the remote")
            yield outer, inner


async def test_another_copy_of_the_proxy_serves_as_a_remote(fakes: Fakes) -> None:
    async with chained(fakes, {}) as (outer, inner):
        assert await ids(outer) == ["own", "a", "org/b"]
        for name in ("a", "org/b", "inner/a", "inner/org/b"):
            answer = await chat(outer, name)
            assert answer.status == 200 and answer.json()["model"] == name.removeprefix("inner/")
            streamed = await chat(outer, name, stream=True)
            assert streamed.body.endswith(b"data: [DONE]\n\n") and b'"t7 "' in streamed.body
        unknown = await chat(outer, "inner/nothing")
        assert unknown.status == 404 and "known models: a, org/b, own" in unknown.error["message"]
        assert [item["model"] for item in (await inner.health())["instances"]] == ["a", "org/b"]
        assert (await raw_client.post(outer.port, "/models/unload", {"model": "a"})).status == 400


async def test_a_model_that_a_remote_gains_is_found_at_the_first_request_for_it(fakes: Fakes, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    config = fakes.config({"a": fakes.model()})
    config["llama_cpp"]["models_dir"] = str(folder)
    async with running_proxy(config) as inner, running_proxy({"remotes": {"inner": {"url": inner.url}}}) as outer:
        (folder / "late.gguf").write_bytes(b"GGUF")

        async def answered() -> bool:
            return (await chat(outer, "late")).status == 200

        await until(answered)
        assert await ids(outer) == ["a", "late"]


async def silent(link: Link, request: Request) -> None:
    await link.gone()


def beside(mute: RawUpstream, work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[bool]]:
    """To wait for: that `work` was begun and done within one listing of a server that says nothing, of 5 s each. What
    waits for such a listing never is."""

    async def check() -> bool:
        asked = [link for link in mute.links if link.closed is None]
        await work()
        return bool(asked) and all(link.closed is None for link in asked)

    return check


async def test_a_dead_remote_neither_delays_a_list_nor_hides_others(fakes: Fakes) -> None:
    async with raw_upstream(silent) as mute, raw_upstream(b"nonsense") as mad:
        dead = {
            "refused": {"url": f"http://127.0.0.1:{free_port()}"},
            "mute": {"url": f"http://127.0.0.1:{mute.port}"},
            "mad": {"url": f"http://127.0.0.1:{mad.port}"},
        }
        async with chained(fakes, dead) as (outer, _):

            async def work() -> None:
                for path in ("/v1/models", "/models"):
                    assert await ids(outer, path) == ["own", "a", "org/b"]
                for name in ("a", "own"):
                    assert (await chat(outer, name)).status == 200

            async def told() -> bool:
                health = await outer.health()
                assert health["status"] == "healthy"
                wrong = {remote["name"] for remote in health["remotes"] if "error" in remote}
                return {"refused", "mad"} <= wrong <= {"refused", "mad", "mute"}

            await until(beside(mute, work), 60, what="an answer while a remote is silent")
            await until(told, what="the errors of the dead remotes")


async def test_a_silent_remote_does_not_delay_what_is_addressed_to_another_one(fakes: Fakes) -> None:
    async with (
        raw_upstream(silent) as mute,
        chained(fakes, {"mute": {"url": f"http://127.0.0.1:{mute.port}"}}) as (outer, _),
    ):

        async def work() -> None:
            await ids(outer)  # asks a remote that did not answer once more
            assert (await chat(outer, "inner/a")).status == 200

        await until(beside(mute, work), 60, what="an answer while another remote is silent")


async def test_a_remote_that_goes_away_keeps_its_place_and_fails_as_502(fakes: Fakes) -> None:
    async with raw_upstream() as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["far"]}
        async with running_proxy({"remotes": {"there": remote}}) as outer:

            async def reset(link: Link, request: Request) -> None:
                link.reset()

            upstream.script = reset
            answer = await chat(outer, "far")
            assert answer.status == 502 and answer.error["code"] == "upstream_disconnected"
            upstream.script = EVENT_HEAD
            assert await ids(outer) == ["far"]


async def test_loads_are_visible_in_health(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()})) as proxy:
        before = time.time()
        await chat(proxy, "m")
        await until(lambda: idle(proxy))
        item = await instance(proxy, "m")
        assert item["state"] == "ready" and item["leases"] == 0 and item["queue"] == 0 and item["restarts"] == 0
        assert item["pid"] in [child.pid for child in proxy.children()]
        assert item["rss_bytes"] > 2**20 and before - 1 <= item["last_used"] <= time.time() + 1  # it is rounded
        whole = await proxy.health()
        assert whole["status"] == "healthy" and whole["uptime_s"] >= 0 and whole["version"]


async def test_models_dir_that_cannot_be_read_hides_its_models_and_nothing_else(fakes: Fakes) -> None:
    folder = fakes.folder / "models"
    folder.mkdir()
    (folder / "found.gguf").write_bytes(b"GGUF")
    config = fakes.config({"m": fakes.model()})
    config["llama_cpp"] |= {"models_dir": str(folder)}

    async def offered() -> set[str]:
        answer = await raw_client.get(proxy.port, "/v1/models")
        assert answer.status == 200
        return {item["id"] for item in answer.json()["data"]}

    async with running_proxy(config) as proxy:
        assert await offered() == {"m", "found"}
        folder.rename(fakes.folder / "away")
        for _ in range(3):
            assert await offered() == {"m"}
        assert (await chat(proxy, "m")).status == 200
        assert (await chat(proxy, "found")).status == 404
        await until(lambda: "models_dir cannot be read" in proxy.log, what="the warning")
        assert proxy.log.count("models_dir cannot be read") == 1
        (fakes.folder / "away").rename(folder)
        assert await offered() == {"m", "found"}
