"""Providers as the router asks them: which of several a name means, whose business a download is, what each reports."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.base import Provider, Services
from llama_smart_proxy.backends.llamacpp.provider import LlamaCpp
from llama_smart_proxy.backends.ollama.provider import Ollama
from llama_smart_proxy.backends.openai import Remotes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, UpstreamRefused
from llama_smart_proxy.proxy.models.router import Router
from tests.support.ollamas import ask, chat, opened, running_ollama, sized

KINDS: tuple[type[Provider], ...] = (LlamaCpp, Remotes, Ollama)
HUB = "hf.co/org/repo:Q4_K_M"
NOWHERE = "http://127.0.0.1:9"


def made(**fields: Any) -> tuple[Config, list[Provider]]:
    """A configuration, and the providers that it uses; none of them is started."""
    config = Config.model_validate({"llama_cpp": {"hf_cache": False}} | fields)
    services = Services(Downloads(), Pool(config.server_pool))
    return config, [provider for kind in KINDS if (provider := kind.create(config, services)) is not None]


def router(**fields: Any) -> Router:
    config, providers = made(**fields)
    return Router(providers, config, Downloads())


def test_only_what_the_configuration_uses_is_there() -> None:
    assert [provider.section for provider in made()[1]] == ["llama_cpp"]
    used = {"remotes": {"r": {"url": NOWHERE}}, "ollama": {"host": NOWHERE}}
    assert [provider.section for provider in made(**used)[1]] == ["llama_cpp", "remotes", "ollama"]


async def test_the_own_name_of_a_remotes_model_counts_before_a_remote_and_its_model() -> None:
    remotes = {"r": {"url": NOWHERE, "models": ["m", "x"]}, "s": {"url": NOWHERE, "models": ["r/m", "x"]}}
    found = [(await router(remotes=remotes).resolve(name)).model for name in ("m", "r/m", "x", "s/x", "s/r/m")]
    assert [(model.owner, model.name) for model in found] == [
        ("r", "m"),
        ("s", "r/m"),
        ("r", "x"),
        ("s", "x"),
        ("s", "r/m"),
    ]


@pytest.mark.parametrize(("backend", "section"), [("llama.cpp", "llama_cpp"), ("ollama", "ollama")])
def test_a_model_of_the_hub_is_downloaded_by_whoever_runs_models_that_do_not_say(backend: str, section: str) -> None:
    _, providers = made(backend=backend, ollama={"host": NOWHERE}, models={"own": {"path": "m.gguf"}})

    def whose(name: str) -> str:
        return next(provider.section for provider in providers if provider.can_download(name))

    assert whose(HUB) == section
    assert (whose("own"), whose("OWN:latest"), whose("llama3")) == ("llama_cpp", "llama_cpp", "ollama")


async def test_a_download_that_is_no_ones_business_is_refused() -> None:
    with pytest.raises(ModelNotFound, match="cannot be pulled"):
        await router().download("llama3", ())


async def test_the_lists_and_the_groups_of_all_providers_are_joined() -> None:
    models = {name: {"path": "m.gguf"} for name in "cab"} | {"virtual": {"model": "r/far", "aliases": ["v"]}}
    remotes = {"r": {"url": NOWHERE, "models": ["far", "a"]}}
    all_of_them = router(models=models, remotes=remotes, server_pool={"size": 2})
    assert [(entry.id, entry.owner) for entry in all_of_them.catalogue()] == [
        ("c", "llama.cpp"),
        ("a", "llama.cpp"),
        ("b", "llama.cpp"),
        ("far", "r"),
        ("virtual", "llama-smart-proxy"),
    ]
    assert await all_of_them.fitting(["c", "r/a", "b", "far", "a"]) == [["r/a", "b", "far", "a"], ["c"]]
    route = await all_of_them.resolve("V:latest")
    assert (route.name, route.model.name, route.model.kind) == ("virtual", "far", "remote")


async def test_what_is_configured_is_not_deleted(tmp_path: Path) -> None:
    remotes = {"r": {"url": NOWHERE, "models": ["far"]}}
    both = router(models={"near": {"path": str(tmp_path / "m.gguf")}}, remotes=remotes)
    for name in ("near", "far"):
        with pytest.raises(BadRequest, match="configuration"):
            await (await both.resolve(name)).model.delete(())


# -- models of an Ollama -----------------------------------------------------------------------------------------------


async def test_a_model_is_deleted_on_every_host_that_has_it() -> None:
    async with (
        running_ollama("m", "n") as first,
        running_ollama("m") as second,
        opened(first.port, second.port) as upstream,
    ):
        await upstream.find("m")
        await upstream.model("m").delete(())
        assert [len(fake.events("request", "/api/delete")) for fake in (first, second)] == [1, 1]
        await upstream.listed()
        assert await upstream.find("m") is None
        with pytest.raises(ModelNotFound):
            await upstream.model("m").delete(())


async def test_a_load_asks_for_the_context_size_that_requests_get_and_a_refusal_is_an_error() -> None:
    async with running_ollama("m") as fake, opened(fake.port, configured={"m": {"ctx": 1024}}) as upstream:
        model = upstream.model("m")
        await model.load()
        assert (await ask(model, chat("m", num_ctx=sized(model, 512))))[0] == 200
        assert [event["ctx"] for event in fake.events("load")] == [1024] and fake.events("reload") == []
        await fake.set(error=[500, "no memory"])
        with pytest.raises(UpstreamRefused, match="no memory") as refused:
            await model.load()
        assert refused.value.status == 500


async def test_what_is_loaded_is_looked_up_once_for_all_who_ask() -> None:
    names = [f"m{number}" for number in range(20)]
    async with running_ollama(*names) as fake, opened(fake.port) as upstream:
        await upstream.listed()
        assert (await ask(upstream.model("m3"), chat("m3")))[0] == 200
        before = len(fake.events("request", "/api/ps"))
        found = await asyncio.gather(*(upstream.model(name).residence() for name in names))
        [residence] = [residence for residence in found if residence is not None]
        assert residence.native["ollama"]["name"] == "m3:latest" and residence.context_length == 4096
        assert len(fake.events("request", "/api/ps")) - before <= 3
