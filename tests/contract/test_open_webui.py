"""What Open WebUI needs, asked for as it asks: its requests, and the rules it goes by when it reads the answers.

The numbers are those of the observed rules: 1 to 7 model lists, 8 the stop button, 11 to 13 answers, 18 and 20
load; 19 is in `tests/system/test_tasks.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from llama_smart_proxy.backends.openai import Listing
from tests.conftest import Shared
from tests.fakes.ollama import MANNERS
from tests.support import raw_client, toxic
from tests.support.e2e_support import Fakes, fakes, idle, state, steered
from tests.support.harness import Proxy, free_port, running_proxy, until
from tests.support.here import served_here
from tests.support.ollamas import black_hole
from tests.support.raw_client import Answer
from tests.support.speakers import SPEAKERS
from tests.support.stages import RECORDED, Chain, Stage
from tests.support.toxic import Link, RawUpstream, Request

__all__ = ["fakes"]  # a fixture
HEADERS = [
    ("User-Agent", "Python/3.11 aiohttp/3.14.5"),
    ("Accept", "*/*"),
    ("Accept-Encoding", "gzip, deflate, br"),
    ("Authorization", "Bearer none"),
    ("X-OpenWebUI-User-Name", "Ann"),
    ("X-OpenWebUI-Chat-Id", "6f5e"),
]
SHOWN_STATES = {"loaded": True, "sleeping": True, "loading": False, "unloaded": False, "unloading": None}
"""Whether the model is listed as loaded, with a dot and an eject button; None is neither, as for any other value."""
VERSION = re.compile(r"v?\d+(\.\d+)*(-\S+)?")
OPENAI, OLLAMA = SPEAKERS["openai"], SPEAKERS["ollama"]
both_apis = pytest.mark.parametrize("path", [OPENAI.path, OLLAMA.path])
both_backends = pytest.mark.parametrize("model", ["local", "distant"], ids=["llama.cpp", "ollama"])


async def get(proxy: Proxy, path: str) -> Any:
    """A listing, which must be JSON. Its requests have a content type although they have no content."""
    headers = [*HEADERS, ("Content-Type", "application/json")]
    answer = await raw_client.ask(
        proxy.port, raw_client.request("GET", path, headers=headers, close=True), method="GET"
    )
    assert (answer.status, (answer.header("content-type") or "").partition(";")[0]) == (200, "application/json")
    return answer.json()


async def post(proxy: Proxy, path: str, body: dict[str, Any]) -> Answer:
    return await raw_client.post(proxy.port, path, body, headers=HEADERS)


def chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "stream": True, **fields}


def events(answer: Answer) -> list[Any]:
    """The objects of a stream of either kind."""
    lines = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n") if line and not line.startswith(b":")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


# -- model lists -------------------------------------------------------------------------------------------------------


async def test_row_1_every_entry_of_tags_has_both_names_and_a_size_to_show(stage: Stage) -> None:
    models = (await get(stage.proxy, "/api/tags"))["models"]
    assert [(model["name"], model["model"]) for model in models] == [
        ("local", "local"),
        ("distant:latest", "distant:latest"),
    ]
    assert all(isinstance(model["details"]["parameter_size"], str) for model in models)


async def test_row_2_the_version_is_digits_and_dots(stage: Stage, recorded: Proxy) -> None:
    for proxy in (stage.proxy, recorded):
        version = (await get(proxy, "/api/version"))["version"]
        assert VERSION.fullmatch(version), version
        assert [int(part) for part in version.split("-")[0].split(".")] >= [0, 6, 4], "or Copilot refuses it"


async def test_row_3_a_loaded_model_expires_at_a_time_that_python_can_read(stage: Stage, recorded: Proxy) -> None:
    await post(stage.proxy, OLLAMA.path, chat("local", "hi"))
    for proxy, name in ((stage.proxy, "local"), (recorded, RECORDED)):

        async def listed(proxy: Proxy = proxy, name: str = name) -> bool:
            return name in [item["model"] for item in (await get(proxy, "/api/ps"))["models"]]

        await until(listed, what="the loaded model")
        for item in (await get(proxy, "/api/ps"))["models"]:
            assert item["name"] == item["model"]
            assert datetime.fromisoformat(item["expires_at"]).tzinfo is not None


async def test_row_4_every_model_has_a_status_and_an_unloaded_one_says_so(stage: Stage) -> None:
    models = {model["id"]: model for model in (await get(stage.proxy, "/v1/models"))["data"]}
    assert set(models) == {"local", "distant:latest"}
    assert all(model["status"]["value"] in SHOWN_STATES for model in models.values())
    await post(stage.proxy, "/models/unload", {"model": "local"})
    assert await state(stage.proxy, "local") == "unloaded"
    await post(stage.proxy, OPENAI.path, chat("local", "hi"))
    assert await state(stage.proxy, "local") == "loaded"


async def test_row_5_a_model_is_ejected_and_loaded_with_the_buttons_of_the_picker(stage: Stage) -> None:
    proxy = stage.proxy
    assert (await get(proxy, "/models"))["data"] == (await get(proxy, "/v1/models"))["data"]
    for path, value in (("/models/load", "loaded"), ("/models/unload", "unloaded")):
        answer = await post(proxy, path, {"model": "local"})
        assert (answer.status, answer.json()) == (200, {"success": True})

        async def reached(value: str = value) -> bool:
            return await state(proxy, "local") == value

        await until(reached, what=f"the model to be {value}")
    unloaded = await post(proxy, "/api/generate", {"model": "local", "keep_alive": 0, "prompt": ""})
    assert (unloaded.status, unloaded.json()["done_reason"]) == (200, "unload"), "the button of the other connection"
    assert (await post(proxy, "/models/unload", {"model": "nosuch"})).status == 404


@both_backends
@both_apis
async def test_a_busy_model_that_is_ejected_is_unloading_at_once(stage: Stage, path: str, model: str) -> None:
    proxy, name = stage.proxy, {"local": "local", "distant": "distant:latest"}[model]

    async def reached(value: str) -> None:
        async def is_value() -> bool:
            return await state(proxy, name) == value

        await until(is_value, what=f"the model to be {value}")

    await stage.distant.set(tokens=2000, token_s=0.02)
    async with raw_client.connected(proxy.port) as client:
        body = chat(model, steered(tokens=2000, token_ms=20))
        await client.send(raw_client.request("POST", path, body, headers=HEADERS))
        await client.head()
        await client.chunk()
        await reached("loaded")
        if path == OPENAI.path:
            ejected = await post(proxy, "/models/unload", {"model": model})
        else:
            ejected = await post(proxy, "/api/generate", {"model": model, "keep_alive": 0, "prompt": ""})
        assert ejected.status == 200
        for listing in ("/v1/models", "/models"):
            models = {item["id"]: item for item in (await get(proxy, listing))["data"]}
            assert models[name]["status"] == {"value": "unloading"} and SHOWN_STATES["unloading"] is None
        for item in (await proxy.health())["instances"]:
            assert (item["state"] == "unloading") is (item["model"] == model)
        for item in (await get(proxy, "/api/ps"))["models"]:
            if item["model"] == model:
                assert datetime.fromisoformat(item["expires_at"]) <= datetime.now(UTC), "Ollama shows it as Stopping..."
        assert await client.chunk(), "its answer goes on"
        client.leave()
    await reached("unloaded")
    await stage.distant.set(**MANNERS)
    assert (await post(proxy, path, chat(model, "hi"))).status == 200
    await reached("loaded")


async def test_a_model_that_the_proxy_cannot_unload_has_no_eject_button(fakes: Fakes) -> None:
    config = fakes.config({}) | {"remotes": {"far": {"url": f"http://127.0.0.1:{free_port()}", "models": ["gpt"]}}}
    config["models"] = {"mine": {"model": "gpt"}}
    async with served_here(config) as (_, port):
        models = (await raw_client.get(port, "/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["gpt", "mine"]
        for model in models:
            assert not SHOWN_STATES[model["status"]["value"]]
            assert (await raw_client.post(port, "/models/unload", {"model": model["id"]})).status == 400


async def test_every_model_has_a_card(chain: Chain) -> None:
    models = {model["id"]: model for model in (await get(chain.local, "/v1/models"))["data"]}
    assert {name: model["name"] for name, model in models.items()} == {
        "smollm2": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "tiny": "tiny-a",
        "embed": "tiny-b",
        "spare": "tiny-c",
    }
    chatty, embedding = (models[name]["info"]["meta"] for name in ("smollm2", "embed"))
    assert re.fullmatch(r"\S+M · \S+ · \d+ MB · context [\d,]+ · on this machine", chatty["description"])
    assert chatty["capabilities"] == {"usage": True, "vision": False} and "hidden" not in chatty
    assert chatty["suggestion_prompts"] == [{"content": "/help", "title": ["/help", "lists the commands"]}]
    assert embedding["hidden"] is True and "suggestion_prompts" not in embedding
    for name, model in models.items():
        assert await get(chain.local, f"/v1/models/{name}") == model


async def test_cards_are_the_operators_where_they_are_configured(fakes: Fakes) -> None:
    mine = {
        "title": "My poet",
        "description": "For poems.",
        "suggestions": ["Write one, please", "Why?"],
        "hidden": False,
    }
    config = fakes.config({"base": fakes.model(), "mine": {"model": "base", "agents": ["think"], **mine}})
    config |= {"remotes": {"far": {"url": "http://127.0.0.1:9", "models": ["gpt"], "hidden": True}}}
    config["models"] |= {"quiet": {**fakes.model(), "agents": False}, "plain": {"model": "base", "agents": ["think"]}}
    async with served_here(config) as (_, port):
        found = {model["id"]: model for model in (await raw_client.get(port, "/v1/models")).json()["data"]}
    cards = {name: model["info"]["meta"] for name, model in found.items()}
    help_ = {"content": "/help", "title": ["/help", "lists the commands"]}
    names = {"base": "base", "mine": "My poet", "quiet": "quiet", "plain": "plain", "gpt": "gpt"}
    assert {name: model["name"] for name, model in found.items()} == names
    assert cards["mine"]["description"] == "For poems." and "hidden" not in cards["mine"]
    prompts = [{"content": "Write one, please"}, {"content": "Why?"}, help_]
    assert cards["mine"]["suggestion_prompts"] == prompts
    assert cards["plain"]["description"] == "on this machine · agents: think"
    assert cards["gpt"]["hidden"] is True and cards["gpt"]["description"] == "on far"
    assert cards["base"]["suggestion_prompts"] == [help_]
    assert "suggestion_prompts" not in cards["quiet"], "it has no /help"


async def test_row_6_ids_are_the_same_on_both_apis_and_either_is_good_on_both(stage: Stage, recorded: Proxy) -> None:
    for proxy in (stage.proxy, recorded):
        openai_ids = [model["id"] for model in (await get(proxy, "/v1/models"))["data"]]
        assert openai_ids == [model["model"] for model in (await get(proxy, "/api/tags"))["models"]]
        assert len(set(openai_ids)) == len(openai_ids)
    for model in ("local", "distant:latest"):
        for path in (OPENAI.path, OLLAMA.path):
            assert (await post(stage.proxy, path, chat(model, "hi"))).status == 200


async def test_row_7_lists_come_at_once_although_servers_are_silent(stage: Stage, fakes: Fakes) -> None:
    with black_hole() as first, black_hole() as second:
        config = fakes.config({"local": fakes.model()})
        config |= {"ollama": {"host": f"127.0.0.1:{first}"}, "remotes": {"far": {"url": f"http://127.0.0.1:{second}"}}}
        async with running_proxy(config) as proxy:
            for _ in range(2):  # just started, and later
                models, tags, running = await asyncio.gather(
                    get(proxy, "/v1/models"), get(proxy, "/api/tags"), get(proxy, "/api/ps")
                )
                assert [model["id"] for model in models["data"]] == ["local"]
                assert [model["name"] for model in tags["models"]] == ["local"] and running == {"models": []}


async def test_row_7_a_list_does_not_wait_until_silent_servers_are_given_up(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(listing: Listing) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Listing, "_fetch", silent)
    remote = {"url": f"http://127.0.0.1:{free_port()}"}
    config = fakes.config({"local": fakes.model()}) | {"ollama": {"host": remote["url"]}, "remotes": {"far": remote}}
    async with served_here(config) as (_, port):
        for path in ("/v1/models", "/api/tags", "/api/ps"):
            answer = await raw_client.get(port, path)
            assert answer.status == 200 and (path == "/api/ps" or b'"local"' in answer.body), path


# -- the stop button ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [True, False], ids=["before-a-byte", "in-mid-stream"])
@both_backends
@both_apis
async def test_row_8_stop_reaches_the_server(stage: Stage, path: str, model: str, silent: bool) -> None:
    source = stage.local if model == "local" else stage.distant
    await stage.distant.set(**({"delay_s": 60} if silent else {"token_s": 0.05, "tokens": 1000}))
    text = steered(mute=1) if silent else steered(tokens=1000, token_ms=50)

    def count(kind: str) -> int:
        return sum(event["path"] in (OPENAI.path, OLLAMA.path) for event in source.events(kind))

    asked, closed = count("request"), count("closed")
    async with raw_client.connected(stage.proxy.port) as client:
        await client.send(raw_client.request("POST", path, chat(model, text), headers=HEADERS))
        if silent:
            await until(lambda: count("request") > asked, what="the request at the server")
        else:
            await client.head()
            await client.chunk()
        client.leave()
        await until(lambda: count("closed") > closed, what="the end of the connection to the server")
    await until(lambda: idle(stage.proxy), what="the model to be free")


# -- answers -----------------------------------------------------------------------------------------------------------


@both_backends
async def test_row_11_a_stream_has_the_content_type_that_its_api_promises(stage: Stage, model: str) -> None:
    streamed = await post(stage.proxy, OPENAI.path, chat(model, "hi"))
    assert streamed.header("content-type") == "text/event-stream"
    streamed = await post(stage.proxy, OLLAMA.path, chat(model, "hi"))
    assert streamed.header("content-type") == "application/x-ndjson"
    assert streamed.header("content-encoding") is None, "each token has to leave at once"


@both_backends
async def test_row_12_the_last_frame_tells_how_long_it_took(stage: Stage, model: str) -> None:
    answer = await post(stage.proxy, OPENAI.path, chat(model, "hi"))
    assert any(event.get("timings", {}).get("predicted_n") for event in events(answer)), "though nobody asked for usage"
    answer = await post(stage.proxy, OPENAI.path, chat(model, "hi", stream_options={"include_usage": True}))
    assert events(answer)[-1]["usage"]["completion_tokens"] in (4, 8)
    last = events(await post(stage.proxy, OLLAMA.path, chat(model, "hi")))[-1]
    names = ("eval_count", "eval_duration", "prompt_eval_count", "prompt_eval_duration", "total_duration")
    assert all(isinstance(last[name], int) and last[name] > 0 for name in names)


@both_apis
@both_backends
async def test_row_13_reasoning_is_played_back_to_the_model_as_it_takes_it(stage: Stage, model: str, path: str) -> None:
    ours = "reasoning_content" if path == OPENAI.path else "thinking"
    thought = {"role": "assistant", "content": "4", ours: "two and two"}
    question = {"role": "user", "content": "hi"}
    assert (await post(stage.proxy, path, {"model": model, "messages": [question, thought, question]})).status == 200
    if model == "local":
        assert stage.local.generated()[-1]["messages"][1]["reasoning_content"] == "two and two"
    else:
        body = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
        assert body["messages"][1]["thinking"] == "two and two"


@both_apis
async def test_row_13_a_load_is_not_told_as_reasoning(stage: Stage, path: str) -> None:
    await post(stage.proxy, "/models/unload", {"model": "local"})
    answer = await post(stage.proxy, path, chat("local", steered(tokens=2)))
    assert answer.status == 200 and b"reasoning" not in answer.body and b"thinking" not in answer.body


async def test_blank_lines_which_kill_the_answer_are_never_among_json_lines(stage: Stage) -> None:
    """llama-server sends comments while it works on a long prompt."""
    text = steered(tokens=3, pings=1)
    relayed = await post(stage.proxy, OPENAI.path, chat("local", text))
    assert relayed.body.count(b":\n\n") == 3, "harmless in server-sent events, and they keep the connection alive"
    translated = await post(stage.proxy, OLLAMA.path, chat("local", text))
    *lines, rest = translated.body.split(b"\n")
    assert rest == b"" and len(lines) == 4 and all(line.startswith(b"{") for line in lines)


@pytest.mark.parametrize("fault", ["unknown", "refused"])
@both_backends
@both_apis
async def test_an_error_in_front_of_a_stream_is_json_with_words_to_show(
    stage: Stage, path: str, model: str, fault: str
) -> None:
    await stage.distant.set(error=[503, "the model is unwell"])
    body = chat("nosuch" if fault == "unknown" else model, steered(refuse=[503, "the model is unwell"]))
    answer = await post(stage.proxy, path, body)
    assert answer.status == (404 if fault == "unknown" else 503)
    assert (answer.header("content-type") or "").partition(";")[0] == "application/json"
    shown = answer.json()["error"] if path == OLLAMA.path else answer.json()["error"]["message"]
    assert shown.startswith("model 'nosuch' not found") if fault == "unknown" else shown == "the model is unwell"


# -- load --------------------------------------------------------------------------------------------------------------


async def test_row_18_a_connection_that_the_server_closed_meanwhile_does_no_harm(
    shared: Shared, upstream: RawUpstream
) -> None:
    """It closes idle ones after 5 s; here at the very moment at which the next request comes."""

    async def script(link: Link, request: Request) -> None:
        if len(link.requests) > 1:
            link.close()
        else:
            await link.send(toxic.plain(b"{}", headers=[("Keep-Alive", "timeout=5, max=100")]))

    upstream.script = script
    for _ in range(4):
        assert (await post(shared.proxy, OPENAI.path, {"model": "m", "messages": []})).status == 200


async def test_row_20_a_flood_of_embeddings_waits_its_turn_beside_the_chat(fakes: Fakes) -> None:
    models = {"chat": fakes.model(), "embed": fakes.model(TOKEN_MS=1, fields={"parallel": 2})}
    async with running_proxy(fakes.config(models, size=2)) as proxy:
        await post(proxy, OPENAI.path, chat("chat", "which queries?"))
        openai = [post(proxy, "/v1/embeddings", {"model": "embed", "input": ["chunk"]}) for _ in range(60)]
        body = {"model": "embed", "input": ["chunk"], "truncate": True}
        answers = await asyncio.gather(*openai, *(post(proxy, "/api/embed", body) for _ in range(60)))
        assert {answer.status for answer in answers} == {200}, "429 and 503 end as 'list index out of range'"
        assert answers[-1].json()["embeddings"] == [[0.6, 0.8]]
        await post(proxy, OPENAI.path, chat("chat", "the question"))
        assert len(fakes.events("start")) == 2, "neither had to make room for the other"
