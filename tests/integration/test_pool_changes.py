"""The pool when its configuration changes: which processes go on, which are replaced, and who is served by which."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from llama_smart_proxy.backends.commands.launcher import CommandLauncher
from llama_smart_proxy.backends.feed import Kind
from llama_smart_proxy.backends.pool.launcher import PoolModel, Source
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Progress
from llama_smart_proxy.proxy.config import Config, ModelConfig
from tests.support.harness import ports, until
from tests.support.pools import FakeModel, Fakes, ask, children, leased, open_pool


def apply(pool: Pool, config: Config, **models: FakeModel) -> list[str]:
    """As a reload does, with these models and no others."""
    return pool.configure(config.server_pool, [model.at(name) for name, model in models.items()])


async def pid(pool: Pool, name: str, model: FakeModel) -> int:
    async with leased(pool, name, model) as instance:
        return instance.pid


def spawned(fakes: Fakes, word: str) -> int:
    return sum(word in event["argv"] for event in fakes.events("start"))


async def test_a_process_goes_on_if_only_what_it_does_not_depend_on_has_changed(fakes: Fakes) -> None:
    config, model = fakes.config(), fakes.model()
    async with open_pool(config) as pool:
        before = await pid(pool, "a", model)
        shown = fakes.model(title="A", aliases=["b"], description="d", keep_alive=500, pinned=True, preload=True)
        assert apply(pool, config, a=shown) == []
        assert await pid(pool, "a", shown) == before
        assert pool.expires_at("a") == float("inf"), "it is pinned now"
        assert apply(pool, config, a=fakes.model(keep_alive=0)) == []
        await until(lambda: pool.state("a") == "unloaded" and not children())


async def test_a_changed_model_completes_its_answers_and_who_waits_gets_the_next_process(fakes: Fakes) -> None:
    config, old, new = fakes.config(), fakes.model(parallel=1), fakes.model(parallel=1, args=["--new"])
    async with open_pool(config) as pool:
        async with leased(pool, "a", old) as instance:
            waiting = [asyncio.ensure_future(pid(pool, "a", old)) for _ in range(3)]
            await until(lambda: pool.status()[0]["queue"] == 3)
            assert apply(pool, config, a=new) == ["a"]
            late = asyncio.ensure_future(pid(pool, "a", old)), asyncio.ensure_future(pid(pool, "a", new))
            assert pool.state("a") == "unloading"
        found = set(await asyncio.gather(*waiting, *late))
        assert len(found) == 1 and instance.pid not in found
        assert fakes.spawns == 2 and spawned(fakes, "--new") == 1


async def test_a_request_that_began_before_a_change_does_not_undo_it(fakes: Fakes) -> None:
    """It has found its model, and opens it only now."""
    config, old, new = fakes.config(), fakes.model().at("a"), fakes.model(args=["--new"]).at("a")
    async with open_pool(config) as pool:
        pool.configure(config.server_pool, [new])
        for model in (old, new, old):
            await pool.load(model)
        assert fakes.spawns == spawned(fakes, "--new") == 1


async def test_a_load_under_way_begins_anew_for_those_who_wait(fakes: Fakes) -> None:
    config = fakes.config()
    async with open_pool(config) as pool:
        waiting = asyncio.ensure_future(ask(pool, "a", fakes.model(fake={"LOAD_S": 600})))
        await until(lambda: fakes.spawns == 1)
        assert apply(pool, config, a=fakes.model()) == ["a"]
        await waiting
        assert fakes.spawns == 2


async def test_a_model_that_could_not_start_is_tried_again_at_once_after_a_change(fakes: Fakes) -> None:
    config, broken = fakes.config(), fakes.model(fake={"EXIT": 3})
    async with open_pool(config) as pool:
        for _ in range(3):
            await asyncio.gather(ask(pool, "a", broken), return_exceptions=True)
        assert pool.failed("a")
        apply(pool, config, a=fakes.model())
        assert pool.failed("a") is None
        await ask(pool, "a", fakes.model())


async def test_a_removed_model_serves_those_who_have_come_and_is_not_kept(fakes: Fakes) -> None:
    config, model = fakes.config(), fakes.model(parallel=1, pinned=True, keep_alive=-1)
    before = model.at("a")
    async with open_pool(config) as pool:
        async with leased(pool, "a", model) as instance:
            waiting = asyncio.ensure_future(pid(pool, "a", model))
            await until(lambda: pool.status()[0]["queue"] == 1)
            apply(pool, config)
            assert pool.state("a") == "loaded"
        assert await waiting == instance.pid
        await until(lambda: pool.status() == [] and not children())
        assert not [event for event in pool.downloads.feed.latest if event.kind is Kind.MODEL]
        await pool.load(before)  # for a request that found the model when it was there
        await until(lambda: pool.state("a") == "unloaded" and not children())
        apply(pool, config, a=model)
        await ask(pool, "a", model)
        assert pool.state("a") == "loaded"


async def test_a_smaller_size_stops_the_least_recently_used_ones_after_their_answers(fakes: Fakes) -> None:
    big, model = fakes.config(size=4), fakes.model()
    models = dict.fromkeys("abcd", model)
    async with open_pool(big) as pool, AsyncExitStack() as held:
        for name in "abcd":
            await ask(pool, name, model)
        busy = await held.enter_async_context(leased(pool, "b", model))
        await ask(pool, "a", model)
        small = big.model_copy(update={"server_pool": big.server_pool.model_copy(update={"size": 1})})
        apply(pool, small, **models)
        await until(lambda: [pool.state(name) for name in "acd"] == ["unloaded"] * 3)
        assert pool.state("b") == "loaded", "the one in use is the most recently used one"
        waiting = asyncio.ensure_future(pid(pool, "a", model))
        await until(lambda: pool.state("b") == "unloading", what="the drain for the one that waits")
        assert len(children()) == 1
        await held.aclose()
        assert await waiting != busy.pid
        assert len(children()) == 1


async def test_ports_move_for_the_next_process_and_never_clash(fakes: Fakes) -> None:
    """A range that overlaps the one before, with a port in it that is taken but not listened on yet."""
    config, slow = fakes.config(size=3), fakes.model(fake={"NEVER": "nobind"})
    start = config.server_pool.port_start
    async with open_pool(config) as pool:
        async with leased(pool, "a", fakes.model()) as kept:
            assert kept.port == start
            starting = asyncio.ensure_future(ask(pool, "b", slow))
            await until(lambda: fakes.spawns == 2)
            moved = {"port_start": start, "port_end": start + 2}
            other = config.model_copy(update={"server_pool": config.server_pool.model_copy(update=moved)})
            apply(pool, other, a=fakes.model(), b=slow, c=fakes.model())
            async with leased(pool, "c", fakes.model()) as third:
                assert third.port == start + 2
            far = config.model_copy(update={"server_pool": config.server_pool.model_copy(update=ports())})
            apply(pool, far, a=fakes.model(), c=fakes.model(args=["--new"]))
            async with leased(pool, "c", fakes.model(args=["--new"])) as fourth:
                assert fourth.port == far.server_pool.port_start
            assert kept.port == start and pool.state("a") == "loaded"
        starting.cancel()


def test_models_are_the_same_if_their_process_is(fakes: Fakes) -> None:
    def at(**fields: Any) -> PoolModel:
        return fakes.model(**fields).at("m")

    base = at()
    assert all(at(**kept).same(base) for kept in ({}, {"title": "x"}, {"keep_alive": 1}, {"agents": ["help"]}))
    changed = ({"args": ["-t", "1"]}, {"ctx": 1}, {"parallel": 1}, {"fake": {"LOAD_S": 1}}, {"concurrent": 1})
    assert not any(at(**fields).same(base) for fields in changed)


async def test_who_waits_for_a_download_gets_the_model_of_the_new_source(fakes: Fakes) -> None:
    config, begun = fakes.config(), asyncio.Event()

    async def for_ever(report: Callable[[Progress], None]) -> None:
        begun.set()
        await asyncio.Event().wait()

    absent = replace(fakes.model().at("a"), source=Source("absent", lambda: None, for_ever))
    present = replace(fakes.model(args=["--new"]).at("a"), source=Source("present", lambda: fakes.gguf, for_ever))
    async with open_pool(config) as pool:
        waiting = [asyncio.ensure_future(pool.load(absent)) for _ in range(3)]
        await begun.wait()
        pool.configure(config.server_pool, [present])
        await asyncio.gather(*waiting)
        assert fakes.spawns == spawned(fakes, "--new") == 1
        assert pool.failed("a") is None and pool.downloads.get("absent") is None


def test_a_command_is_the_same_if_all_of_it_is(fakes: Fakes) -> None:
    def of(**fields: Any) -> CommandLauncher:
        return CommandLauncher.of("m", ModelConfig.model_validate({"cmd": "server --port ${PORT}", **fields}))

    assert of().same(of()) and of(title="x").same(of(keep_alive=5))
    changed = (
        {"cmd": "other --port ${PORT}"},
        {"env": {"A": "1"}},
        {"check_endpoint": "/v1/models"},
        {"concurrent": 2},
    )
    assert not any(of(**fields).same(of()) for fields in changed)
    assert not of().same(fakes.model().at("m").launcher) and not fakes.model().at("m").launcher.same(of())
