"""The configuration changes while the proxy runs: what goes on, what follows, and what a bad one does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.support import raw_client
from tests.support.agent_clients import write_agent
from tests.support.e2e_support import DONE, Fakes, Gate, chat, fakes, gate, instance, streaming, text_of
from tests.support.harness import Proxy, free_port, until
from tests.support.reloads import reloadable

__all__ = ["fakes", "gate"]  # fixtures
STATELESS = {"llama_cpp": {"hf_cache": False}}


async def ids(proxy: Proxy) -> list[str]:
    return [item["id"] for item in (await raw_client.get(proxy.port, "/v1/models")).json()["data"]]


async def text(proxy: Proxy, model: str = "m", said: str = "x") -> str:
    answer = await chat(proxy, model, messages=[{"role": "user", "content": said}])
    assert answer.status == 200, answer.body
    return str(answer.json()["choices"][0]["message"]["content"])


# -- bad configurations ------------------------------------------------------------------------------------------------


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return write


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "syntax": (lambda file: file.write_text("models: {m: {path: x"), "config.yaml: line 1"),
    "unknown key": (_edited(lambda c: c.update(modles={})), "config.yaml: modles: unknown field"),
    "wrong type": (_edited(lambda c: c.update(server={"port": "many"})), "config.yaml: server.port: "),
    "missing agent": (_edited(lambda c: c.update(agents=["absent"])), "config.yaml: agents.0: unknown agent absent"),
    "agent option": (_edited(lambda c: c.update(agents=[{"think": {"no": 1}}])), "config.yaml: agents.0.think.no: "),
    "duplicate alias": (
        _edited(lambda c: c["models"].update({n: {"path": "/x.gguf", "aliases": ["same"]} for n in "ab"})),
        "config.yaml: models.b.aliases: ",
    ),
    "ports": (_edited(lambda c: c["server_pool"].update(port_end=1)), "config.yaml: server_pool"),
    "missing module": (_edited(lambda c: c.update(modules=["/no/such.py"])), "config.yaml: modules.0: /no/such.py: "),
    "not UTF-8": (lambda file: file.write_bytes(b"models: {\xff}"), "config.yaml: is not UTF-8 text"),
    "empty": (lambda file: file.write_text("\n"), "config.yaml: is empty"),
    "missing folder": (_edited(lambda c: c["llama_cpp"].update(models_dir="/no")), "config.yaml: llama_cpp.models_dir"),
    "folder": (_folder, "config.yaml: cannot be read: Is a directory"),
    "deleted": (Path.unlink, "config.yaml: does not exist"),
}  # fmt: skip
"""How the file is spoiled, and how the problem begins."""


def errors(proxy: Proxy) -> list[str]:
    return [line for line in proxy.log.splitlines() if "ERROR" in line]


async def test_a_bad_configuration_changes_nothing_and_is_reported_everywhere(fakes: Fakes, tmp_path: Path) -> None:
    """In the log, in `/health`, and in the answer; until a good one comes."""
    async with reloadable(fakes.config({"m": fakes.model()}), tmp_path / "own") as running:
        proxy, file = running.proxy, running.file
        before = (await instance(proxy, "m"))["pid"] if await text(proxy) else 0
        for number, (kind, (spoil, problem)) in enumerate(BAD.items(), 1):
            spoil(file)
            found = await running.refused()
            assert found[0].startswith(problem), kind
            await until(lambda: len(errors(proxy)) >= number, what="the line in the log")  # noqa: B023
            assert problem in errors(proxy)[-1].replace(f"{file.parent}/", "") and len(errors(proxy)) == number
            health = await proxy.health()
            assert health["config_stale"] and health["status"] == "degraded", kind
            assert {"where": "configuration", "message": f"not reloaded: {found[0]}"} in [
                {**entry, "message": entry["message"].replace(f"{file.parent}/", "")} for entry in health["problems"]
            ]
            assert await text(proxy) and (await instance(proxy, "m"))["pid"] == before, kind
            if file.is_dir():
                file.rmdir()
            running.write()
        assert not (await running.reload())["models_changed"]
        assert not (await proxy.health())["config_stale"]


# -- good ones ---------------------------------------------------------------------------------------------------------


async def test_streams_go_on_while_models_stay_change_go_and_come(fakes: Fakes, gate: Gate, tmp_path: Path) -> None:
    held = {"last_at": str(gate)}
    models = {name: fakes.model(TOKENS=5) for name in ("stays", "changes", "goes")}
    async with reloadable(fakes.config(models, size=4), tmp_path / "own") as running, AsyncExitStack() as stack:
        proxy, pids = running.proxy, {}
        streams = [await stack.enter_async_context(streaming(proxy, name, fake=held)) for name in models]
        for name, stream in zip(models, streams, strict=True):
            await stream.until_text()
            pids[name] = (await instance(proxy, name))["pid"]
        after = {**models, "comes": fakes.model(), "changes": fakes.model(fields={"args": ["--new"]}, TOKENS=5)}
        del after["goes"]
        found = await running.apply(models=after)
        assert (found["models_added"], found["models_removed"]) == (["comes"], ["goes"])
        assert found["models_restarted"] == ["changes"]
        assert (await chat(proxy, "goes")).status == 404 and await text(proxy, "comes")
        assert await ids(proxy) == ["stays", "changes", "comes"]
        waiting = asyncio.ensure_future(chat(proxy, "changes"))
        gate.open()
        for stream in streams:
            events = await stream.rest()
            assert events[-1] == DONE and len(text_of(events).split()) == 5
        assert (await waiting).status == 200
        assert (await instance(proxy, "stays"))["pid"] == pids["stays"]
        changed = [event for event in fakes.events("start") if "--new" in event["argv"]]
        assert [event["pid"] for event in changed] == [(await instance(proxy, "changes"))["pid"]] != [pids["changes"]]
        await until(lambda: len(proxy.children()) == 3, what="the end of the removed one")


async def test_a_file_of_a_folder_follows_the_flags_of_all_models(fakes: Fakes, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("a", "b"):
        (tmp_path / "models" / f"{name}.gguf").symlink_to(fakes.gguf)
    own = {**fakes.config({})["llama_cpp"], "models_dir": str(tmp_path / "models"), "hf_cache": False}
    config = {**fakes.config({}), "llama_cpp": own}
    async with reloadable(config, tmp_path / "own", env={"LSP_LLAMA_CPP__ENV_PASSTHROUGH": "FAKE_*"}) as running:
        proxy = running.proxy
        assert await text(proxy, "a") and await ids(proxy) == ["a", "b"]
        before = (await instance(proxy, "a"))["pid"]
        assert (await running.apply(slash_commands=False))["models_restarted"] == []
        assert await text(proxy, "a") and (await instance(proxy, "a"))["pid"] == before
        assert (await running.apply(llama_cpp={**own, "args": ["--new"]}))["models_restarted"] == ["a"]
        assert await ids(proxy) == ["a", "b"] and await text(proxy, "a")
        assert (await instance(proxy, "a"))["pid"] != before


async def test_virtual_models_and_aliases_follow(fakes: Fakes, tmp_path: Path) -> None:
    models = {"m": fakes.model(fields={"aliases": ["old"]}), "v": {"model": "m"}}
    async with reloadable(fakes.config(models), tmp_path / "own") as running:
        assert await text(running.proxy, "v") == await text(running.proxy, "old")
        pid = (await instance(running.proxy, "m"))["pid"]
        await running.apply(models={"m": fakes.model(fields={"aliases": ["new"]}), "w": {"model": "new"}})
        statuses = [(await chat(running.proxy, name)).status for name in ("v", "old", "new", "w")]
        assert statuses == [404, 404, 200, 200]
        assert (await instance(running.proxy, "m"))["pid"] == pid


async def test_remotes_follow_and_an_unchanged_one_is_not_asked_again(tmp_path: Path, fakes: Fakes) -> None:
    async with reloadable(fakes.config({"m": fakes.model()}), tmp_path / "upstream") as upstream:
        url = upstream.proxy.url
        config = {**STATELESS, "remotes": {"r": {"url": url}}}
        async with reloadable(config, tmp_path / "own") as running:
            assert await ids(running.proxy) == ["m"]
            await running.apply(agents=["help"])
            assert await ids(running.proxy) == ["m"]
            found = await running.apply(remotes={"r": {"url": url}, "s": {"url": url, "models": ["m", "x"]}})
            assert found["remotes_added"] == ["s"] and await ids(running.proxy) == ["m", "x"]
            found = await running.apply(remotes={"s": {"url": f"http://127.0.0.1:{free_port()}", "models": ["x"]}})
            assert (found["remotes_removed"], found["remotes_changed"]) == (["r"], ["s"])
            assert await ids(running.proxy) == ["x"]
            await until(lambda: "GET /v1/models" in upstream.proxy.log)
            assert upstream.proxy.log.count("GET /v1/models") == 1
            assert (await chat(running.proxy, "m")).status == 404


COUNTS = '''
import pydantic

class Counts(Agent):
    """Counts its chats."""
    class Config(pydantic.BaseModel):
        word: str = "chats"
    async def start(self) -> None:
        self.chats = 0
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        self.chats += 1
        return say(f"{self.chats} {self.config.word}")
    async def close(self) -> None:
        from pathlib import Path
        with Path(FOLDER, "closed").open("a") as file:
            file.write(self.config.word + " ")
'''


async def test_an_unchanged_agent_keeps_what_it_remembers_and_a_changed_one_begins_anew(
    fakes: Fakes, tmp_path: Path
) -> None:
    write_agent(tmp_path / "agents", "counts", COUNTS.replace("FOLDER", repr(str(tmp_path))))
    config = fakes.config({"m": fakes.model()}) | {"agents_dirs": [str(tmp_path / "agents")], "agents": ["counts"]}
    async with reloadable(config, tmp_path / "own") as running:
        proxy = running.proxy
        assert [await text(proxy), await text(proxy)] == ["1 chats", "2 chats"]
        await running.apply(slash_commands=False, agents=["counts", "think"])
        assert await text(proxy) == "3 chats"
        await running.apply(agents=[{"counts": {"on_error": "skip"}}])
        assert await text(proxy) == "4 chats"
        assert not (tmp_path / "closed").exists()
        await running.apply(agents=[{"counts": {"word": "talks"}}])
        assert await text(proxy) == "1 talks"
        await until(lambda: (tmp_path / "closed").exists() and (tmp_path / "closed").read_text() == "chats ")
        counted = (await raw_client.get(proxy.port, "/plugins")).json()
        assert [item["calls"] for item in counted if item["name"] == "counts"] == [5], "counters go on"
        await running.apply(agents=[])
        assert (await text(proxy)).startswith("t0 t1")
        await until(lambda: (tmp_path / "closed").read_text() == "chats talks ")
