"""Names of models: their spellings, aliases, the lists that they are in, and the names in answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES, Fakes
from tests.support.harness import Proxy, session_proxy, until
from tests.support.ollama_calls import ask, refused
from tests.support.ollamas import FakeOllama, running_ollama
from tests.support.stages import Stage, running

Named = tuple[Proxy, FakeOllama]


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    """Models of every kind, some with the tag `latest` in their name."""
    fakes = Fakes(tmp_path_factory.mktemp("named"))
    models: dict[str, Any] = {
        "qwen:latest": fakes.model(fields={"aliases": ["q:latest"]}),
        "plain": fakes.model(),
        "held": {"backend": "ollama", "aliases": ["fast", "Quick:1b"]},
        "team:latest": {"model": "held", "agents": ["think"]},
        "alone": {"model": "held"},
    }
    folder = fakes.folder / "models"
    folder.mkdir()
    (folder / "file:latest.gguf").write_bytes(b"GGUF")
    with running(running_ollama("held", "other:1b")) as fake:
        config = fakes.config(models) | {
            "ollama": {"host": fake.url, "pull": "never"},
            "remotes": {"r": {"url": "http://127.0.0.1:9", "models": ["far:latest", "near", "plain:latest"]}},
        }
        config["llama_cpp"]["models_dir"] = str(folder)
        with session_proxy(config) as proxy:
            yield proxy, fake


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("qwen", "qwen:latest"),
        ("QWEN:latest", "qwen:latest"),
        ("q", "qwen:latest"),
        ("plain", "plain"),
        ("plain:latest", "plain:latest"),
        ("library/plain", "plain"),
        ("registry.ollama.ai/library/qwen:latest", "qwen:latest"),
        ("Registry.Ollama.ai/library/QWEN", "qwen:latest"),
        ("file", "file:latest"),
        ("far", "far:latest"),
        ("r/far", "far:latest"),
        ("near:latest", "near"),
        ("held", "held:latest"),
        ("library/held", "held:latest"),
        ("fast:latest", "held:latest"),
        ("quick:1b", "held:latest"),
        ("team", "team:latest"),
        ("alone:latest", "alone"),
    ],
)
async def test_a_name_without_a_tag_is_the_one_with_latest_for_every_kind_of_model(
    named: Named, asked: str, found: str
) -> None:
    answer = await raw_client.get(named[0].port, f"/v1/models/{asked}")
    assert (answer.status, answer.json().get("id")) == (200, found)


@pytest.mark.parametrize("asked", ["qwen:1b", "library/none", "other", "held:1b", "quick"])
async def test_other_tags_are_other_models(named: Named, asked: str) -> None:
    assert (await raw_client.get(named[0].port, f"/v1/models/{asked}")).status == 404


def model_names(body: bytes) -> set[str]:
    """All names of models in an answer, whole or streamed."""
    lines = [line.removeprefix(b"data: ") for line in body.splitlines()]
    frames = [json.loads(line) for line in lines if line.startswith(b"{")]
    return {found for frame in frames if (found := frame.get("message", frame).get("model") or frame.get("model"))}


@pytest.mark.parametrize("asked", ["held", "HELD:latest", "library/held", "fast", "quick:1b", "team", "alone"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages"]
)
async def test_an_answer_of_an_ollama_has_the_name_that_was_asked_for(
    named: Named, path: str, stream: bool, asked: str
) -> None:
    proxy, fake = named
    body = {"model": asked, "messages": MESSAGES, "prompt": "hi", "stream": stream, "max_tokens": 9}
    answer = await ask(proxy, path, body)
    assert (answer.status, model_names(answer.body)) == (200, {asked})
    sent = [json.loads(event["body"])["model"] for event in fake.events("request") if event["body"]]
    assert sent[-1].lower() in ("held", "held:latest", "library/held"), "an Ollama knows no aliases"


@pytest.mark.parametrize("asked", ["held", "HELD:latest", "fast", "alone"])
async def test_embeddings_and_loads_have_the_name_that_was_asked_for(named: Named, asked: str) -> None:
    proxy, fake = named
    assert (await ask(proxy, "/api/embed", {"model": asked, "input": "a"})).json()["model"] == asked
    assert (await ask(proxy, "/v1/embeddings", {"model": asked, "input": "a"})).json()["model"] == asked
    assert (await ask(proxy, "/api/show", {"model": asked})).status == 200
    loaded = await ask(proxy, "/api/chat", {"model": asked, "keep_alive": "7m"})
    assert (loaded.json()["model"], loaded.json()["done_reason"]) == (asked, "load")
    sent = json.loads([event for event in fake.events("request") if event["body"]][-1]["body"])
    assert sent["keep_alive"] in ("7m", 420)


async def test_an_alias_is_copied_pushed_and_built_upon_by_its_real_name(named: Named) -> None:
    proxy, fake = named
    for path, body in (
        ("/api/copy", {"source": "fast", "destination": "copied"}),
        ("/api/create", {"model": "made", "from": "fast"}),
        ("/api/push", {"model": "fast"}),
    ):
        assert (await ask(proxy, path, body)).status == 200
        sent = json.loads(fake.events("request", path)[-1]["body"])
        assert sent == body | {key: "held:latest" for key, value in body.items() if value == "fast"}
    for name in ("copied", "made"):
        assert (await ask(proxy, "/api/delete", {"model": name})).status == 200


async def test_aliases_are_in_the_lists_of_ollama(named: Named) -> None:
    proxy, _ = named
    await ask(proxy, "/api/chat", {"model": "fast", "messages": MESSAGES, "stream": False})
    tags = {item["name"]: item for item in (await raw_client.get(proxy.port, "/api/tags")).json()["models"]}
    assert {"held:latest", "fast", "Quick:1b", "q:latest", "qwen:latest", "alone"} <= tags.keys()
    assert tags["fast"] == tags["held:latest"] | {"name": "fast", "model": "fast"}
    running_now = [item["name"] for item in (await raw_client.get(proxy.port, "/api/ps")).json()["models"]]
    assert {"held:latest", "fast", "Quick:1b"} <= set(running_now)
    assert len(running_now) == len(set(running_now))


async def test_the_list_follows_what_happens_in_the_ollama_itself(stage: Stage) -> None:
    async def names(path: str = "/api/tags", key: str = "models") -> set[str]:
        items = (await raw_client.get(stage.proxy.port, path)).json()[key]
        return {item.get("name") or item["id"] for item in items}

    assert "distant:latest" in await names()
    await stage.distant.set(models=["distant", "new"])

    async def listed() -> bool:
        return "new:latest" in await names() and "new:latest" in await names("/v1/models", "data")

    await until(listed, what="the new model")
    await stage.distant.set(models=["distant"])
    gone = await ask(stage.proxy, "/api/chat", {"model": "new", "messages": MESSAGES})
    assert (gone.status, gone.json()) == (404, {"error": "model 'new' not found"})
    assert "new:latest" not in await names(), "at once, as a request has shown that it is gone"


INVALID = ["a b", "../x", "x:", ":x", "-x", "a//b", "a/b/c/d", "x:a:b", "x" * 81, "ä"]


@pytest.mark.parametrize("name", INVALID)
async def test_an_invalid_name_is_refused_in_ollamas_words(stage: Stage, name: str) -> None:
    for path in ("/api/chat", "/api/generate", "/api/embed", "/api/show", "/api/delete", "/api/pull"):
        body = {"model": name, "messages": MESSAGES, "prompt": "hi", "input": "hi"}
        assert refused(await ask(stage.proxy, path, body), path) == "invalid model name"
    answer = await ask(stage.proxy, "/v1/chat/completions", {"model": name, "messages": MESSAGES})
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_model_list_has_anthropics_shape_for_its_clients(named: Named) -> None:
    proxy, _ = named
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="-", max_retries=0) as client:
        page = await client.models.list()
        assert not page.has_more and {"qwen:latest", "held:latest", "alone"} <= {model.id for model in page.data}
        assert {(model.type, model.display_name == model.id) for model in page.data} == {("model", True)}
        assert page.data[0].created_at.year >= 2024
        assert [model.id async for model in await client.models.list(limit=1)] == [model.id for model in page.data]
        assert (await client.models.retrieve("qwen")).id == "qwen:latest"
        with pytest.raises(anthropic.NotFoundError) as failed:
            await client.models.retrieve("none")
        assert failed.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        with pytest.raises(anthropic.BadRequestError):
            await client.models.list(limit=0)
    assert (await raw_client.get(proxy.port, "/v1/models")).json()["object"] == "list"


async def test_an_ollama_without_an_account_says_so_before_a_push(named: Named) -> None:
    proxy, fake = named
    assert (await raw_client.get(proxy.port, "/api/status")).json() == {"cloud": {"disabled": True, "source": "config"}}
    for path in ("/api/me", "/api/me/"):
        answer = await raw_client.ask(proxy.port, raw_client.request("POST", path, close=True))
        assert answer.status == 401
        assert answer.json()["error"] == "unauthorized" and answer.json()["signin_url"].startswith("https://")
    await fake.set(account={"name": "someone"})
    answer = await raw_client.ask(proxy.port, raw_client.request("POST", "/api/me", close=True))
    assert (answer.status, answer.json()) == (200, {"name": "someone"})
    await fake.set(account=None)
