"""Defects of the Ollama API, and of the other ones over an Ollama, that were found once and must not come back. Each
test says what holds instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES, Fakes, fakes, state
from tests.support.harness import Proxy, free_port, running_proxy, session_proxy, until
from tests.support.ollamas import FakeOllama, running_ollama
from tests.support.raw_client import Answer
from tests.support.stages import Stage, running
from tests.support.toxic import RawUpstream, plain, raw_upstream

__all__ = ["fakes"]  # a fixture
ASKING = ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"]
ABOUT = ["/api/show", "/api/pull", "/api/create", "/api/copy", "/api/push", "/api/delete"]
V1 = ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings"]
BLOB = f"/api/blobs/sha256:{'a' * 64}"
HOUR_S = 3600
both_backends = pytest.mark.parametrize("model", ["local", "distant"], ids=["llama.cpp", "ollama"])


def body_of(model: object, **fields: Any) -> dict[str, Any]:
    """A body that is good for every endpoint."""
    own = {"model": model, "messages": MESSAGES, "prompt": "hi", "input": "hi", "stream": False, "max_tokens": 4}
    return own | {"source": model, "destination": "x", **fields}


async def ask(proxy: Proxy, path: str, body: dict[str, Any] | None, method: str = "") -> Answer:
    method = method or ("DELETE" if path == "/api/delete" else "POST")
    return await raw_client.ask(proxy.port, raw_client.request(method, path, body, close=True), method=method)


def refused(answer: Answer, path: str, status: int = 400) -> str:
    """The words of an error, which must be of this status, in the form that the API at `path` has."""
    assert answer.status == status, answer.body[:300]
    said = answer.json()
    if path.startswith("/api/"):
        assert list(said) == ["error"]
        words = said["error"]
    elif path.startswith("/v1/messages"):
        assert said["type"] == "error"
        words = said["error"]["message"]
    else:
        assert {"message", "type", "param", "code"} == said["error"].keys()
        words = said["error"]["message"]
    assert isinstance(words, str)
    return words


async def left_s(proxy: Proxy, model: str) -> float:
    """Seconds that a loaded model still has."""
    items = (await raw_client.get(proxy.port, "/api/ps")).json()["models"]
    (ends,) = (datetime.fromisoformat(item["expires_at"]) for item in items if item["name"] == model)
    return (ends - datetime.now(ends.tzinfo)).total_seconds()


@dataclass(frozen=True)
class Eager:
    """`proxy` pulls what it has not; it has `pinned`, of 2048 tokens of context, and `free` of whatever is asked."""

    proxy: Proxy
    fake: FakeOllama

    def sent(self, path: str) -> dict[str, Any]:
        """The body of the last request for `path`."""
        body = json.loads(self.fake.events("request", path)[-1]["body"])
        assert isinstance(body, dict)
        return body


@pytest.fixture(scope="module")
def eager() -> Iterator[Eager]:
    pinned = {"backend": "ollama", "ctx": 2048}
    with (
        running(running_ollama("pinned", "free")) as fake,
        session_proxy({"ollama": {"host": fake.url, "pull": "auto"}, "models": {"pinned": pinned}}) as proxy,
    ):
        yield Eager(proxy, fake)


@dataclass(frozen=True)
class Warm:
    """`proxy` has the models `a` to `d` on the fake llama-server; an idle one stays for 5 minutes."""

    proxy: Proxy
    fakes: Fakes


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    fakes = Fakes(tmp_path_factory.mktemp("warm"))
    with session_proxy(fakes.config({name: fakes.model() for name in "abcd"}, keep_alive=300, size=4)) as proxy:
        yield Warm(proxy, fakes)


@pytest.fixture(scope="module")
def lonely() -> Iterator[Proxy]:
    """Its Ollama is down, and it pulls nothing."""
    with session_proxy({"ollama": {"host": f"127.0.0.1:{free_port()}", "pull": "never"}}) as proxy:
        yield proxy


# -- context sizes and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/embeddings", *ASKING])
async def test_a_pinned_context_size_is_what_is_asked_for(eager: Eager, path: str) -> None:
    for options in ({}, {"options": {"num_ctx": 512, "seed": 1}}):
        assert (await ask(eager.proxy, path, body_of("pinned", **options))).status == 200
        sent = eager.sent("/api/embed" if path == "/v1/embeddings" else path)["options"]
        assert sent == {**options.get("options", {}), "num_ctx": 2048}


async def test_embeddings_of_different_sizes_load_a_model_anew_only_once(eager: Eager) -> None:
    for size in (2048, 4096) * 5:
        assert (await ask(eager.proxy, "/v1/embeddings", body_of("free", options={"num_ctx": size}))).status == 200
    assert len([event for event in eager.fake.events("reload") if event["model"] == "free:latest"]) <= 1


@pytest.mark.parametrize("path", ASKING)
async def test_options_are_options_in_any_case(eager: Eager, path: str) -> None:
    assert (await ask(eager.proxy, path, body_of("pinned", Options={"num_ctx": 7, "seed": 1}))).status == 200
    sent = {name: value for name, value in eager.sent(path).items() if name.lower() == "options"}
    assert sent == {"options": {"num_ctx": 2048, "seed": 1}}
    refused(await ask(eager.proxy, path, body_of("pinned", Options={"seed": 1}, options={"seed": 2})), path)


@both_backends
@pytest.mark.parametrize("path", ASKING)
async def test_options_that_are_no_object_are_refused(stage: Stage, path: str, model: str) -> None:
    for options in ("x", 5, True, [{"num_ctx": 7}]):
        refused(await ask(stage.proxy, path, body_of(model, options=options)), path)


# -- how long models stay ----------------------------------------------------------------------------------------------


async def test_a_load_request_says_how_long_the_model_stays(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"a": fakes.model()}, keep_alive=0)) as proxy:
        for _ in range(2):
            answer = await ask(proxy, "/api/generate", {"model": "a", "keep_alive": "10m"})
            assert (answer.status, answer.json()["done_reason"]) == (200, "load")
            assert 500 < await left_s(proxy, "a") <= 600
        assert len(fakes.events("start")) == 1


async def test_generating_from_a_context_with_keep_alive_0_loads_once_and_unloads_then(warm: Warm) -> None:
    body = {"model": "a", "prompt": "hi", "context": [1, 2], "keep_alive": 0, "stream": False}
    before = len(warm.fakes.events("start"))
    answer = await ask(warm.proxy, "/api/generate", body)
    assert (answer.status, answer.json()["done"]) == (200, True)

    async def unloaded() -> bool:
        return await state(warm.proxy, "a") == "unloaded"

    await until(unloaded, what="the end of the model")
    assert len(warm.fakes.events("start")) == before + 1


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": [{"role": "user", "content": 5}]}),
    ("/api/chat", {"messages": MESSAGES, "format": "xml"}),
    ("/api/chat", {"messages": MESSAGES, "options": {"top_k": "many"}}),
    ("/api/chat", {"messages": MESSAGES, "think": 5}),
    ("/api/generate", {"prompt": 5}),
    ("/api/generate", {"prompt": "hi", "options": "x"}),
    ("/api/embed", {"input": 5}),
    ("/api/embed", {"input": [5]}),
    ("/api/embeddings", {"prompt": 5}),
]


@pytest.mark.parametrize(("path", "fields"), REFUSED)
async def test_a_refused_request_does_not_change_how_long_the_model_stays(
    warm: Warm, path: str, fields: dict[str, Any]
) -> None:
    assert (await ask(warm.proxy, "/api/generate", {"model": "b", "keep_alive": "5m"})).status == 200
    refused(await ask(warm.proxy, path, {"model": "b", "keep_alive": "2h", "stream": False, **fields}), path)
    assert await left_s(warm.proxy, "b") < HOUR_S


@pytest.mark.parametrize(("path", "field"), [("/api/embed", "input"), ("/api/embeddings", "prompt")])
async def test_embeddings_obey_keep_alive(warm: Warm, path: str, field: str) -> None:
    assert (await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "5m"})).status == 200
    assert await left_s(warm.proxy, "c") < HOUR_S
    assert (await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "5h"})).status == 200
    assert await left_s(warm.proxy, "c") > 4 * HOUR_S
    assert "missing unit" in refused(await ask(warm.proxy, path, {"model": "c", field: "x", "keep_alive": "60"}), path)


@pytest.mark.parametrize("body", [{"input": ""}, {"input": []}, {}])
async def test_embeddings_of_nothing_load_the_model(warm: Warm, body: dict[str, Any]) -> None:
    assert (await ask(warm.proxy, "/api/generate", {"model": "d", "keep_alive": 0})).status == 200
    assert await state(warm.proxy, "d") == "unloaded"
    answer = await ask(warm.proxy, "/api/embed", {"model": "d", **body})
    assert (answer.status, answer.json()["embeddings"]) == (200, [])
    assert await state(warm.proxy, "d") == "loaded"


# -- what pulls a model ------------------------------------------------------------------------------------------------

NO_PULL: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", {"prompt": "", "keep_alive": 0}),
    "generate, 0s": ("/api/generate", {"keep_alive": "0s"}),
    "chat": ("/api/chat", {"messages": [], "keep_alive": 0}),
    "count": ("/v1/messages/count_tokens", {"messages": MESSAGES}),
}


@pytest.mark.parametrize("name", NO_PULL)
async def test_a_model_is_not_pulled_to_be_unloaded_or_to_have_tokens_counted(eager: Eager, name: str) -> None:
    path, fields = NO_PULL[name]
    pulls = len(eager.fake.events("pull"))
    answer = await ask(eager.proxy, path, {"model": "unknown", **fields})
    assert "'unknown' not found" in refused(answer, path, 404)
    assert len(eager.fake.events("pull")) == pulls


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/api/show"])
async def test_a_model_that_might_be_on_a_dead_ollama_is_not_called_unknown(lonely: Proxy, path: str) -> None:
    assert "no Ollama host answers" in refused(await ask(lonely, path, body_of("m")), path, 502)


# -- what cannot be said -----------------------------------------------------------------------------------------------

LONE = "\ud800"
LONE_MESSAGES = [{"role": "user", "content": LONE}]
USED_BY: dict[str, dict[str, Any]] = {
    "/api/chat": {"keep_alive": LONE, "think": LONE, "format": LONE, "messages": LONE_MESSAGES},
    "/api/generate": {"keep_alive": LONE, "think": LONE, "format": LONE, "prompt": LONE},
    "/api/embed": {"keep_alive": LONE, "input": LONE},
    "/api/embeddings": {"keep_alive": LONE, "prompt": LONE},
    "/api/create": {"system": LONE},
    "/v1/chat/completions": {"messages": LONE_MESSAGES},
    "/v1/completions": {"prompt": LONE},
    "/v1/messages": {"messages": LONE_MESSAGES},
    "/v1/embeddings": {"input": LONE},
}


@both_backends
@pytest.mark.parametrize("path", USED_BY)
async def test_half_a_character_is_refused(stage: Stage, path: str, model: str) -> None:
    for field, value in USED_BY[path].items():
        body = body_of(model, **{field: value})
        if field == "prompt":
            del body["messages"]  # it would be a chat
        refused(await ask(stage.proxy, path, body), path)


@pytest.mark.parametrize("path", [*ASKING, *ABOUT, *V1])
async def test_half_a_character_names_no_model(eager: Eager, path: str) -> None:
    pulls = len(eager.fake.events("pull"))
    answer = await ask(eager.proxy, path, body_of(LONE))
    refused(answer, path, status=404 if answer.status == 404 else 400)
    assert len(eager.fake.events("pull")) == pulls


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("tools", [5, "x", {"function": {"name": "f"}}, ["x"], [TOOL, None]])
async def test_tools_of_another_shape_are_refused_over_an_ollama(stage: Stage, tools: object) -> None:
    for choice in ("auto", {"type": "function", "function": {"name": "f"}}):
        body = body_of("distant", tools=tools, tool_choice=choice)
        assert "tools" in refused(await ask(stage.proxy, V1[0], body), V1[0])


@pytest.mark.parametrize("choice", [5, ["f"], {"function": "f"}, {"function": {"name": 5}}, {"function": ["f"]}])
async def test_a_tool_choice_of_another_shape_is_refused_over_an_ollama(stage: Stage, choice: object) -> None:
    refused(await ask(stage.proxy, V1[0], body_of("distant", tools=[TOOL], tool_choice=choice)), V1[0])


@both_backends
async def test_a_chat_in_another_case_is_a_chat(stage: Stage, model: str) -> None:
    chat = await ask(stage.proxy, "/api/chat", {"model": model, "Messages": MESSAGES, "stream": False})
    assert (chat.status, chat.json()["done_reason"]) == (200, "stop")
    assert chat.json()["message"]["content"].startswith("t0 ")
    text = await ask(stage.proxy, "/api/generate", {"model": model, "Prompt": "hi", "stream": False})
    assert (text.status, text.json()["done_reason"]) == (200, "stop")


# -- the log -----------------------------------------------------------------------------------------------------------

FORGED = "2026-01-01 00:00:00,000 INFO    proxy.access: forged"


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\x85", "\x1b[2K\r"], ids=ascii)
async def test_a_name_forges_no_line_of_the_log(eager: Eager, end: str) -> None:
    before = len(eager.proxy.log)
    for path in [*ASKING, *ABOUT, *V1, "/models/unload", "/models/load"]:
        await ask(eager.proxy, path, body_of(f"a{end}{FORGED}"))
    await until(lambda: "POST /models/load" in eager.proxy.log[before:], what="the last line")
    log = eager.proxy.log[before:]
    assert FORGED in log, "it is shown, but within a line"
    assert not [line for line in log.splitlines() if line.startswith(FORGED)]
    assert "\x1b" not in log


# -- blobs -------------------------------------------------------------------------------------------------------------


async def test_a_blob_goes_to_the_ollama_that_is_configured_with_its_key_and_nowhere_else() -> None:
    async with raw_upstream(plain(b'{"models":[]}')) as other, raw_upstream() as upstream:
        there = [("Location", f"http://127.0.0.1:{other.port}/x")]
        upstream.script = plain(b"", 307, there)
        host = f"http://127.0.0.1:{upstream.port}"
        async with running_proxy({"ollama": {"host": host, "api_key": "topsecret"}}) as proxy:
            for method in ("HEAD", "POST"):
                assert (await ask(proxy, BLOB, None if method == "HEAD" else {}, method)).status == 307
                assert blob_requests(upstream)[-1].header("authorization") == "Bearer topsecret"
        assert not other.requests


def blob_requests(upstream: RawUpstream) -> list[Any]:
    return [request for request in upstream.requests if BLOB in request.line]


async def test_a_blob_for_a_dead_ollama_is_refused_in_its_form(lonely: Proxy) -> None:
    assert (await ask(lonely, BLOB, None, "HEAD")).status == 502
    assert "blob" in refused(await ask(lonely, BLOB, {}), BLOB, 502)
    lonely.check_log()


# -- what is asked of an Ollama ----------------------------------------------------------------------------------------


async def test_showing_models_does_not_have_them_listed_anew(eager: Eager) -> None:
    refused(await ask(eager.proxy, "/api/show", {"model": "absent"}), "/api/show", 404)  # any listing is over then
    before = len(eager.fake.events("request", "/api/tags"))
    for _ in range(20):
        assert (await ask(eager.proxy, "/api/show", {"model": "free"})).status == 200
        assert (await raw_client.get(eager.proxy.port, "/v1/models")).status == 200
    assert len(eager.fake.events("request", "/api/tags")) == before
