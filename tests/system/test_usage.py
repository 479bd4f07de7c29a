"""Usage and recent requests of a running proxy: over HTTP, on the command line, after a restart, and after kill -9."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.cli.main import main
from llama_smart_proxy.proxy.store import FILE
from tests.support import raw_client
from tests.support.e2e_support import CHAT, Fakes, body_of, fakes
from tests.support.harness import Proxy, running_proxy, until
from tests.support.postgres import Server, postgres

__all__ = ["fakes", "postgres"]
SCOPES = {"root": ["admin"], "ann": ["inference"], "bob": ["inference"]}


async def usage(proxy: Proxy, query: str = "by=model") -> list[dict[str, Any]]:
    return list((await raw_client.get(proxy.port, f"/admin/usage?{query}")).json()["usage"])


async def recent(proxy: Proxy, query: str = "") -> list[dict[str, Any]]:
    return list((await raw_client.get(proxy.port, f"/admin/requests?{query}")).json()["requests"])


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.full)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of a store."""
    if request.param == "sqlite":
        return {"state_dir": str(tmp_path / "state")}
    server: Server = request.getfixturevalue("postgres")
    return {"store": server.database()}


async def test_what_requests_used_is_printed_also_after_a_restart(
    fakes: Fakes, where: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fakes.config({"m": fakes.model(), "n": fakes.model()}) | where
    async with running_proxy(config) as proxy:
        headers = [("X-Request-Id", "first")]
        await raw_client.post(proxy.port, CHAT, body_of("m"), headers=headers)
        stream = body_of("m", stream=True, stream_options={"include_usage": True})
        await raw_client.post(proxy.port, CHAT, stream, headers=[("X-Request-Id", "second")])
        (line,) = await usage(proxy)
        assert line["model"] == "m" and line["prompt_tokens"] > 0 and line["completion_tokens"] == 16
        assert [entry["id"] for entry in await recent(proxy)] == ["second", "first"]
    async with running_proxy(config) as proxy:
        await raw_client.post(proxy.port, CHAT, body_of("n"))
        assert [(line["model"], line["requests"]) for line in await usage(proxy)] == [("m", 2), ("n", 1)]
        (first,) = await recent(proxy, "id=first")
        assert (first["outcome"], first["path"]) == ("ok", CHAT)
        assert "load" in [step["kind"] for step in first["steps"]]
        assert "until m was loaded" in (await raw_client.get(proxy.port, "/admin/why/first")).json()["sentence"]
        monkeypatch.setenv("LSP_URL", proxy.url)
        assert main(["usage", "--by", "model"]) == 0
        heads, m, n, total = capsys.readouterr().out.splitlines()
        assert heads.split() == ["MODEL", "REQUESTS", "ERRORS", "PROMPT", "CACHED", "COMPLETION", "TIME"]
        assert (m.split()[:3], n.split()[:3]) == (["m", "2", "0"], ["n", "1", "0"])
        assert total.split()[:3] == ["total", "3", "0"]
        assert main(["usage", "--json", "--since", "2001-01-01"]) == 0
        assert len(json.loads(capsys.readouterr().out)["usage"]) == 2
        for words in (["--by", "colour"], ["--since", "yesterday"]):
            assert main(["usage", *words]) == 1 and words[1] in capsys.readouterr().err
        assert (await proxy.health())["history"]["dropped"] == 0


async def test_a_cancelled_request_is_recorded_as_such(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model()}) | {"state_dir": str(fakes.folder / "state")}
    async with running_proxy(config) as proxy, raw_client.connected(proxy.port) as client:
        body = body_of("m", stream=True, fake={"stall_after": 2})
        await client.send(raw_client.request("POST", CHAT, body, headers=[("X-Request-Id", "r")]))
        await client.head()
        await raw_client.ask(proxy.port, raw_client.request("DELETE", "/running/r"))
        assert [(entry["outcome"], entry["status"]) for entry in await recent(proxy)] == [("cancelled", 200)]


@pytest.mark.parametrize("rounds", [2, pytest.param(15, marks=pytest.mark.full)])
async def test_a_kill_at_any_moment_loses_only_what_was_not_written_and_counts_nothing_twice(
    fakes: Fakes, rounds: int
) -> None:
    folder = fakes.folder / "state"
    config = fakes.config({"m": fakes.model(fields={"parallel": 8})}) | {"state_dir": str(folder)}
    sent, written = 0, 0

    def reached(count: int) -> bool:
        return sent >= count

    for seed in range(rounds):
        async with running_proxy(config, clean_log=False) as proxy:

            async def ask(proxy: Proxy = proxy) -> None:
                nonlocal sent
                with suppress(OSError, raw_client.BrokenAnswer):
                    while proxy.alive:
                        sent += 1
                        await raw_client.post(proxy.port, CHAT, body_of("m"), headers=[("X-Request-Id", f"r{sent}")])

            asking = [asyncio.ensure_future(ask()) for _ in range(4)]
            await until(partial(reached, sent + 50))
            (line,) = await usage(proxy)
            assert line["requests"] > written
            written = line["requests"]
            await asyncio.sleep(random.Random(seed).random() / 5)  # anywhere within a write
            proxy.send(signal.SIGKILL)
            await proxy.ended()
            await asyncio.gather(*asking)
        with sqlite3.connect(folder / FILE) as sql:
            assert sql.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            counted = sql.execute("SELECT sum(requests) FROM usage").fetchone()[0]
            listed, distinct = sql.execute("SELECT count(*), count(DISTINCT id) FROM requests").fetchone()
        sql.close()
        assert written <= counted == listed == distinct <= sent
        written = counted


async def test_a_postgres_that_is_not_there_does_not_keep_the_proxy_from_serving(fakes: Fakes) -> None:
    url = "postgresql://user:secret-of-tests@127.0.0.1:1/none"
    async with running_proxy(fakes.config({"m": fakes.model()}) | {"store": url}) as proxy:
        assert (await raw_client.post(proxy.port, CHAT, body_of("m"))).status == 200
        answer = await raw_client.get(proxy.port, "/admin/usage")
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        history = (await proxy.health())["history"]
        assert "127.0.0.1/none cannot be used now" in history["problem"] and history["waiting"] >= 1
        assert "secret-of-tests" not in proxy.log + answer.body.decode() + str(history)
        assert proxy.log.count("the Postgres at 127.0.0.1/none cannot be used now (setting store)") == 1


async def test_usage_is_counted_by_key_and_a_key_sees_its_own_requests_alone(fakes: Fakes) -> None:
    keys = [{"name": name, "key": f"key-of-{name}-1234567890123", "scopes": scopes} for name, scopes in SCOPES.items()]
    config = fakes.config({"m": fakes.model()}) | {"server": {"api_keys": keys}, "state_dir": str(fakes.folder / "s")}

    def by(name: str, request_id: str = "") -> list[tuple[str, str]]:
        ids = [("X-Request-Id", request_id)] if request_id else []
        return [("Authorization", f"Bearer key-of-{name}-1234567890123"), *ids]

    async def get(proxy: Proxy, path: str, name: str) -> raw_client.Answer:
        return await raw_client.ask(proxy.port, raw_client.request("GET", path, headers=by(name)), method="GET")

    async with running_proxy(config) as proxy, raw_client.connected(proxy.port) as client:
        await raw_client.post(proxy.port, CHAT, body_of("m"), headers=by("ann"))
        stalled = body_of("m", stream=True, fake={"stall_after": 2})
        await client.send(raw_client.request("POST", CHAT, stalled, headers=by("ann", "hers")))
        await client.head()
        seen = {name: (await get(proxy, "/running", name)).json()["requests"] for name in SCOPES}
        assert [(entry["id"], entry["key"]) for entry in seen["root"]] == [("hers", "ann")]
        assert [entry["id"] for entry in seen["ann"]] == ["hers"] and seen["bob"] == []
        lines = (await get(proxy, "/admin/usage?by=key", "root")).json()["usage"]
        assert [(line["key"], line["requests"]) for line in lines] == [("ann", 1)]
        for path in ("/admin/usage", "/admin/requests"):
            assert (await get(proxy, path, "ann")).status == 403
        cancelling = raw_client.request("DELETE", "/running/hers", headers=by("ann"))
        assert (await raw_client.ask(proxy.port, cancelling)).status == 403
