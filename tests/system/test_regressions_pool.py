"""Defects found once, of what a model's name means and of the processes behind it, that must not come back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import BUFFER_LIMIT
from llama_smart_proxy.proxy.errors import UpstreamFailed
from tests.support import e2e_support, pools
from tests.support.e2e_support import CHAT, DONE, Stream, chat, events_of, fakes, instance, streaming
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import get, post
from tests.support.toxic import EVENT_HEAD, Link, RawUpstream, Request, chunk, plain, raw_upstream, token
from tests.system.test_cli import run

__all__ = ["fakes"]

LONG_S = 30.0
"""Nothing here takes so long on any machine; a defect takes for ever."""


# -- models that die, and models that wait -----------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_model_that_dies_in_every_answer_gets_a_back_off(fakes: e2e_support.Fakes, streamed: bool) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(DIE_AFTER=3)})) as proxy:
        answers = [await chat(proxy, "m", stream=streamed) for _ in range(8)]
    starts = len(fakes.events("start"))
    assert 1 <= starts <= 3
    refused = [answer for answer in answers if answer.status == 503]
    assert len(refused) >= 8 - starts
    for answer in refused:
        assert answer.error["code"] == "model_crashed"
        assert int(answer.header("retry-after") or 0) >= 1
    if streamed:
        *tokens, error, end = events_of(answers[0].body)
        assert b"t2 " in tokens[-1] and b"upstream_disconnected" in error and end == DONE


async def test_a_long_answer_does_not_keep_a_cold_model_out_when_another_place_becomes_free(tmp_path: Path) -> None:
    """Two places: `a` answers one request all the time, `b` many short ones that overlap; `c` has to come in."""
    fakes = pools.Fakes(tmp_path)
    async with pools.open_pool(fakes.config(size=2, swap_after_s=0.2)) as pool:
        models = {name: fakes.model() for name in "abc"}
        stop = asyncio.Event()

        async def crowd() -> None:
            while not stop.is_set():
                await pools.ask(pool, "b", models["b"], tokens=1, token_ms=20)

        async with pool.lease("a", models["a"]):
            crowds = [asyncio.ensure_future(crowd()) for _ in range(4)]
            try:
                await until(lambda: pool.state("b") == "loaded")
                async with asyncio.timeout(LONG_S):
                    await pools.ask(pool, "c", models["c"])
                assert pool.state("a") == "loaded"
            finally:
                stop.set()
                await asyncio.gather(*crowds)


def error_of(events: list[bytes]) -> dict[str, object]:
    """The error that a broken-off stream ends with."""
    assert events[-1] == DONE
    error = json.loads(events[-2])["error"]
    assert isinstance(error, dict)
    return error


@asynccontextmanager
async def stalled_streams(proxy: Proxy, models: list[str], each: int) -> AsyncIterator[list[Stream]]:
    """So many streams of each model, all of which have had their first token and get no third one."""
    async with AsyncExitStack() as stack:
        opening = [streaming(proxy, model, fake={"stall_after": 2}) for model in models for _ in range(each)]
        streams = [await stack.enter_async_context(stream) for stream in opening]
        for stream in streams:
            await stream.until_text()
        yield streams


async def test_a_crash_in_mid_stream_is_told_as_a_disconnection(fakes: e2e_support.Fakes) -> None:
    names = [f"m{number}" for number in range(4)]
    models = {name: fakes.model(fields={"parallel": 4}) for name in names}
    async with running_proxy(fakes.config(models, size=4)) as proxy, stalled_streams(proxy, names, 4) as streams:
        for name in names:
            os.kill((await instance(proxy, name))["pid"], signal.SIGKILL)
        errors = [error_of(await stream.rest()) for stream in streams]
    assert {error["code"] for error in errors} == {"upstream_disconnected"}
    assert not any("shutting down" in str(error["message"]) for error in errors)


async def test_so_is_a_crash_that_is_noticed_by_the_end_of_the_process(tmp_path: Path) -> None:
    """Its connection is not read any more, as its reader is slow: the end of that is not seen."""
    fakes = pools.Fakes(tmp_path)
    model = fakes.model()
    call = UpstreamRequest("POST", CHAT, json.dumps({"stream": True, "fake": {"tokens": 1_000_000}}).encode())
    async with (
        pools.open_pool(fakes.config()) as pool,
        pool.lease("m", model) as instance,
        instance.connections.request(call) as response,
    ):
        await until(lambda: response._held > BUFFER_LIMIT)
        os.kill(instance.pid, signal.SIGKILL)
        await until(lambda: pool.state("m") == "unloaded")
        with pytest.raises(UpstreamFailed) as failure:
            await response.read(1)
        assert failure.value.code == "upstream_disconnected"


async def test_a_stream_cut_off_at_the_end_of_the_drain_is_told_the_proxy_shuts_down(fakes: e2e_support.Fakes) -> None:
    config = fakes.config({"m": fakes.model()}) | {"server": {"drain_s": 0.3}}
    async with running_proxy(config) as proxy, stalled_streams(proxy, ["m"], 2) as streams:
        proxy.send(signal.SIGTERM)
        assert [error_of(await stream.rest())["code"] for stream in streams] == ["shutting_down"] * 2
        assert await proxy.ended(LONG_S) == 0


async def test_so_is_a_stream_of_a_remote() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.gone()

    async with raw_upstream(script) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with running_proxy({"server": {"drain_s": 0.3}, "remotes": {"up": remote}}) as proxy:
            async with streaming(proxy, "m") as stream:
                await stream.until_text()
                proxy.send(signal.SIGTERM)
                assert error_of(await stream.rest())["code"] == "shutting_down"
            assert await proxy.ended(LONG_S) == 0


# -- whose model it is -------------------------------------------------------------------------------------------------

OFFERED = ["unsloth/Qwen3", "plain", "a+b&c=d"]
MEANT = {
    "unsloth/Qwen3": "unsloth/Qwen3",
    "unsloth/unsloth/Qwen3": "unsloth/Qwen3",
    "plain": "plain",
    "unsloth/plain": "plain",
    "unsloth/a+b&c=d": "a+b&c=d",
}
"""What a client may ask of the remote `unsloth`, and the remote's own id for it."""


@pytest.fixture(params=["as configured", "as listed"])
async def unsloth(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    """A proxy with a remote whose name its ids begin with."""
    listing = plain(json.dumps({"data": [{"id": name} for name in OFFERED]}).encode())

    async def script(link: Link, asked: Request) -> None:
        await link.send(listing if asked.line.startswith("GET /v1/models ") else plain(b"{}"))

    async with raw_upstream(script) as upstream:
        models = OFFERED if request.param == "as configured" else None
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": models}
        async with running_proxy({"remotes": {"unsloth": remote}}) as proxy:
            yield proxy, upstream


def queried(asked: Request) -> list[str]:
    """The models that the query of a request names."""
    return parse_qs(urlsplit(asked.line.split()[1]).query).get("model", [])


async def test_a_remote_is_asked_by_its_own_id(unsloth: tuple[Proxy, RawUpstream]) -> None:
    proxy, upstream = unsloth
    for name, meant in MEANT.items():
        assert (await post(proxy.port, CHAT, {"model": name})).status == 200
        assert upstream.requests[-1].json()["model"] == meant


@pytest.mark.parametrize("safe", ["/", ""])
async def test_a_remote_is_asked_by_its_own_id_when_the_model_is_in_the_url(
    unsloth: tuple[Proxy, RawUpstream], safe: str
) -> None:
    proxy, upstream = unsloth
    for name, meant in MEANT.items():
        quoted = quote(name, safe=safe)
        assert (await get(proxy.port, f"/props?model={quoted}")).status == 200
        assert upstream.requests[-1].line.startswith("GET /props?")
        assert queried(upstream.requests[-1]) == [meant]

        assert (await post(proxy.port, f"{CHAT}?model={quoted}", {})).status == 200
        assert upstream.requests[-1].json()["model"] == meant
        assert queried(upstream.requests[-1]) in ([], [meant])

        shown = await get(proxy.port, f"/v1/models/{quoted}")
        assert (shown.status, shown.json()["id"], shown.json()["owned_by"]) == (200, meant, "unsloth")


async def test_a_name_that_is_only_nearly_right_is_nobodys(unsloth: tuple[Proxy, RawUpstream]) -> None:
    proxy, _ = unsloth
    for name in ("Qwen3", "unsloth/", "unsloth", "other/plain", "unsloth/unsloth/plain"):
        answer = await post(proxy.port, CHAT, {"model": name})
        assert (answer.status, answer.error["code"]) == (404, "model_not_found"), name


# -- folders, and what `check` says ------------------------------------------------------------------------------------


async def test_models_dir_that_cannot_be_read_hides_its_models_and_nothing_else(fakes: e2e_support.Fakes) -> None:
    folder = fakes.folder / "models"
    folder.mkdir()
    (folder / "found.gguf").write_bytes(b"GGUF")
    config = fakes.config({"m": fakes.model()})
    config["llama_cpp"] |= {"models_dir": str(folder)}

    async def offered() -> set[str]:
        answer = await get(proxy.port, "/v1/models")
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


@pytest.mark.parametrize("command", ["check", "serve"])
def test_what_the_machine_does_not_have_is_reported(tmp_path: Path, command: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("llama_cpp: {server: ./bin/llama-server, models_dir: ./models}\n")
    done = run(command, "--config", str(file))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(": ")[:2] for line in lines] == [
        [str(file), "llama_cpp.server"],
        [str(file), "llama_cpp.models_dir"],
    ]
    assert str(tmp_path / "bin/llama-server") in lines[0] and str(tmp_path / "models") in lines[1]


@pytest.mark.parametrize("flag", ["--api_key", "--api-key", "--api_key=secret", "--api_key_file"])
@pytest.mark.parametrize("where", ["llama_cpp.args", "models.m.args"])
def test_check_refuses_a_flag_of_ours_in_either_spelling(tmp_path: Path, flag: str, where: str) -> None:
    args = f"args: ['{flag}', x]"
    file = tmp_path / "config.yaml"
    file.write_text(f"llama_cpp: {{{args}}}" if where == "llama_cpp.args" else f"models: {{m: {{path: x, {args}}}}}")
    done = run("check", "--config", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{file}: {where}: must not hold {flag.partition('=')[0]}: ")
    assert "secret" not in done.stderr
