"""Helpers (models for embeddings and the like) have places of their own, beside those of other models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import until
from tests.support.pools import Census, Fakes, open_pool

CHATS, HELPERS = "abc", "xyz"


class Models:
    """Models by name: those of `HELPERS` are helpers."""

    def __init__(self, folder: Path) -> None:
        self.fakes = Fakes(folder)

    def __getitem__(self, name: str) -> PoolModel:
        return self.fakes.model(helper=name in HELPERS).at(name)


def loaded(pool: Pool) -> set[str]:
    return {name for name in CHATS + HELPERS if pool.state(name) == "loaded"}


async def test_a_helper_and_other_models_make_no_room_for_each_other(tmp_path: Path) -> None:
    models = Models(tmp_path)
    async with open_pool(models.fakes.config(size=1, helpers=1)) as pool, Census() as census:
        for name, then in {"a": "a", "x": "ax", "b": "bx", "y": "by", "c": "cy", "x ": "cx"}.items():
            await pool.load(models[name.strip()])
            assert loaded(pool) == set(then)
    assert census.most <= 3  # with the one that is stopping


async def test_without_places_of_their_own_helpers_are_like_other_models(tmp_path: Path) -> None:
    models = Models(tmp_path)
    async with open_pool(models.fakes.config(size=1, helpers=0)) as pool:
        for name in "axb":
            await pool.load(models[name])
            assert loaded(pool) == {name}


async def test_among_helpers_the_least_recently_used_one_makes_room(tmp_path: Path) -> None:
    models = Models(tmp_path)
    async with open_pool(models.fakes.config(size=1, helpers=2)) as pool:
        for name in "axyxz":
            await pool.load(models[name])
        assert loaded(pool) == set("axz")


async def test_a_pool_with_fewer_places_for_helpers_stops_helpers_alone(tmp_path: Path) -> None:
    models = Models(tmp_path)
    config = models.fakes.config(size=2, helpers=2).server_pool
    async with open_pool(models.fakes.config(size=2, helpers=2)) as pool:
        for name in "abxy":
            await pool.load(models[name])
        pool.configure(config.model_copy(update={"helpers": 1}))
        await until(lambda: loaded(pool) == set("aby"))


async def test_pinned_helpers_take_no_place_of_other_models(tmp_path: Path) -> None:
    models = Models(tmp_path)
    async with open_pool(models.fakes.config(size=1, helpers=1)) as pool:
        await pool.load(replace(models["x"], pinned=True))
        await pool.load(models["a"])
        with pytest.raises(Overloaded, match=r"all 1 places \(server_pool.helpers\) are held by pinned models"):
            await pool.load(models["y"])
        assert loaded(pool) == set("ax")


async def test_helpers_are_loaded_together_with_a_group_of_other_models(tmp_path: Path) -> None:
    models = Models(tmp_path)
    async with open_pool(models.fakes.config(size=2, helpers=1)) as pool:
        every = [models[name] for name in "abcxy"]
        pool.configure(models.fakes.config(size=2, helpers=1).server_pool, every)
        assert pool.fitting("abcxy") == [["a", "b", "x"], ["c", "y"]]
        assert [model.name for model in pool.first(every)] == ["a", "b", "x"]
