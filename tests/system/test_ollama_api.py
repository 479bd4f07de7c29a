"""The Ollama API as HTTP: what its clients rely on beyond a chat, over llama.cpp and over an Ollama."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES, Fakes, Gate, fakes, gate, needs_llama_cpp, state, steered
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import Answer
from tests.support.stages import Chain, Stage

__all__ = ["fakes", "gate"]  # a fixture
ASKING = ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings"]
ABOUT = ["/api/show", "/api/pull", "/api/copy", "/api/create", "/api/push"]
CONTINUE_LINE = re.compile(r'^(\S+)\s+((?:".*")|\S+)$')
both_backends = pytest.mark.parametrize("model", ["local", "distant"], ids=["llama.cpp", "ollama"])


async def ask(proxy: Proxy, path: str, body: dict[str, Any] | bytes, method: str = "POST") -> Answer:
    return await raw_client.ask(proxy.port, raw_client.request(method, path, body, close=True), method=method)


async def loaded(proxy: Proxy) -> dict[str, Any]:
    """The items of /api/ps by name."""
    return {item["name"]: item for item in (await raw_client.get(proxy.port, "/api/ps")).json()["models"]}


# -- being found -------------------------------------------------------------------------------------------------------


async def test_the_root_says_what_it_is_also_to_head(stage: Stage) -> None:
    answer = await raw_client.get(stage.proxy.port, "/")
    assert (answer.status, answer.body) == (200, b"Ollama is running")
    for path in ("/", "/api/version", "/api/tags"):
        head = await raw_client.ask(stage.proxy.port, raw_client.request("HEAD", path, close=True), method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert int(head.header("content-length") or 0) > 0


async def test_tags_of_both_backends_have_every_field_that_clients_read(chain: Chain, stage: Stage) -> None:
    for proxy in (chain.local, chain.distant, stage.proxy):
        for item in (await raw_client.get(proxy.port, "/api/tags")).json()["models"]:
            assert item["name"] == item["model"] and isinstance(item["size"], int)
            assert re.fullmatch("[0-9a-f]{64}", item["digest"])
            assert datetime.fromisoformat(item["modified_at"]).tzinfo is not None
            details = {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
            assert details <= item["details"].keys() and None not in item["details"].values()


@pytest.mark.parametrize("path", [*ASKING, "/api/show", "/api/tags", "/api/ps", "/api/version"])
async def test_a_trailing_slash_is_forgiven(stage: Stage, path: str) -> None:
    """Chat and generate were documented that way."""
    if path in ("/api/tags", "/api/ps", "/api/version"):
        assert (await raw_client.get(stage.proxy.port, f"{path}/")).status == 200
    else:
        body = {"model": "local", "messages": MESSAGES, "prompt": "hi", "input": "hi", "stream": False}
        assert (await ask(stage.proxy, f"{path}/", body)).status == 200


@both_backends
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
async def test_a_name_is_good_in_any_case_and_with_or_without_latest(stage: Stage, model: str, path: str) -> None:
    for name in (model, model.upper(), f"{model}:latest", f"{model.title()}:Latest"):
        body = {"model": name, "messages": MESSAGES, "prompt": "hi", "stream": False}
        assert (await ask(stage.proxy, path, body)).status == 200, name


async def test_bodies_are_json_whatever_their_type_is_said_to_be(stage: Stage) -> None:
    """`curl -d` says that they are a form."""
    data = json.dumps({"model": "local", "prompt": "hi", "stream": False}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "nonsense"):
        head = f"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        answer = await raw_client.ask(stage.proxy.port, head.encode() + data)
        assert (answer.status, answer.json()["done"]) == (200, True)


# -- answers -----------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_answers_stream_by_default_token_by_token(stage: Stage, model: str, path: str) -> None:
    await stage.distant.set(tokens=1000, token_s=0.05)
    text = steered(stall_after=1)
    body = {"model": model, "messages": [{"role": "user", "content": text}], "prompt": text}
    async with raw_client.connected(stage.proxy.port) as client:
        await client.send(raw_client.request("POST", path, body))
        _, status, headers = await client.head()
        assert (status, dict(headers)["content-type"]) == (200, "application/x-ndjson")
        line = json.loads(await client.chunk())
        assert line["done"] is False and "t0" in (line.get("response") or line["message"]["content"])


@needs_llama_cpp
async def test_generate_goes_on_from_the_context_that_it_gave(served: Proxy) -> None:
    options = {"temperature": 0, "num_predict": 6}
    first = (
        await ask(served, "/api/generate", {"model": "tiny", "prompt": "One", "options": options, "stream": False})
    ).json()
    context = first["context"]
    assert context and all(isinstance(token, int) for token in context)
    assert len(context) >= first["prompt_eval_count"]
    body = {"model": "tiny", "prompt": "Two", "context": context, "options": options}
    lines = (await ask(served, "/api/generate", body)).body.splitlines()
    last = json.loads(lines[-1])
    assert last["context"][: len(context)] == context and len(last["context"]) > len(context) + 6
    assert last["prompt_eval_count"] > len(context)
    assert not any("context" in json.loads(line) for line in lines[:-1])


@needs_llama_cpp
async def test_generate_fills_in_continues_and_obeys_a_system_prompt(served: Proxy) -> None:
    async def generate(**fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "options": {"temperature": 0, "num_predict": 4}, "stream": False, **fields}
        answer = await ask(served, "/api/generate", body)
        assert answer.status == 200, answer.body
        return dict(answer.json())

    plain = await generate(prompt="def f(x):")
    assert (await generate(prompt="def f(x):", system="Be brief."))["prompt_eval_count"] > plain["prompt_eval_count"]
    raw = await generate(prompt="def f(x):", raw=True)
    assert raw["prompt_eval_count"] < plain["prompt_eval_count"] and "context" not in raw and raw["response"]
    between = await generate(prompt="def f(x):", suffix="return y")
    assert between["prompt_eval_count"] > raw["prompt_eval_count"] and between["eval_count"] == 4
    refused = await ask(served, "/api/generate", {"model": "tiny", "prompt": "x", "raw": True, "system": "y"})
    assert (refused.status, refused.json()) == (
        400,
        {"error": "raw mode does not support template, system, or context"},
    )


@needs_llama_cpp
async def test_options_that_llama_server_would_refuse_mean_what_they_mean_to_ollama(served: Proxy) -> None:
    options = {"repeat_last_n": -1, "num_predict": -2, "stop": ["e", "a", "t"], "mirostat": 2, "num_ctx": 1024}
    answer = await ask(
        served, "/api/chat", {"model": "tiny", "messages": MESSAGES, "options": options, "stream": False}
    )
    assert (answer.status, answer.json()["done_reason"]) == (200, "stop")


# -- loading and unloading ---------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_an_empty_request_loads_and_unloads_with_one_plain_object(stage: Stage, model: str, path: str) -> None:
    empty: dict[str, Any] = {"messages": []} if path == "/api/chat" else {"prompt": ""}
    for fields in (empty, {}):
        for keep_alive, reason in ((0, "unload"), (0, "unload"), (None, "load")):
            answer = await ask(stage.proxy, path, {"model": model, "keep_alive": keep_alive, **fields})
            assert answer.status == 200 and (answer.header("content-type") or "").startswith("application/json")
            told = answer.json()
            assert (told["done"], told["done_reason"]) == (True, reason)
            assert (told["message"]["content"] if path == "/api/chat" else told["response"]) == ""
            assert datetime.fromisoformat(told["created_at"]).tzinfo is not None
            if model == "local":
                assert await state(stage.proxy, "local") == f"{reason}ed"


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(30, 30), (2.5, 2.5), ("45s", 45), ("1h30m", 5400), ("500ms", 0.5), (-1, None), ("-1m", None), ("1.5h", 5400)],
)
async def test_keep_alive_is_a_number_or_a_duration_and_the_last_one_counts(
    stage: Stage, keep_alive: object, seconds: float | None
) -> None:
    for value in ("10m", keep_alive):
        body = {"model": "local", "messages": MESSAGES, "stream": False, "keep_alive": value}
        assert (await ask(stage.proxy, "/api/chat", body)).status == 200
    if (item := (await loaded(stage.proxy)).get("local")) is None:
        assert seconds in (0.5, 2.5)
        return
    expires = datetime.fromisoformat(item["expires_at"])
    if seconds is None:
        assert expires.year > 2300
    else:
        assert seconds - 120 < expires.timestamp() - time.time() <= seconds + 1


async def test_a_model_that_is_loading_is_not_running_yet_but_visible(fakes: Fakes, gate: Gate) -> None:
    async with (
        running_proxy(fakes.config({"slow": fakes.model(LOAD_UNTIL=gate)})) as proxy,
        raw_client.connected(proxy.port) as client,
    ):
        await client.send(raw_client.request("POST", "/api/generate", {"model": "slow", "prompt": ""}))

        async def loading() -> bool:
            return await state(proxy, "slow") == "loading"

        await until(loading, what="the load")
        assert await loaded(proxy) == {}
        gate.open()
        assert (await client.answer()).json()["done_reason"] == "load"
        [item] = (await loaded(proxy)).values()
        assert all(isinstance(item[key], int) for key in ("size", "size_vram", "context_length"))


# -- load --------------------------------------------------------------------------------------------------------------


async def test_clients_that_differ_in_num_ctx_do_not_have_a_model_loaded_in_turns(stage: Stage) -> None:
    await ask(stage.proxy, "/api/generate", {"model": "distant", "keep_alive": 0})
    reloads, starts = len(stage.distant.events("reload")), len(stage.local.events("start"))
    for number in range(20):
        path, size = (("/api/chat", 2048), ("/v1/chat/completions", 8192))[number % 2]
        for model in ("distant", "local"):
            body = {"model": model, "messages": MESSAGES, "stream": False, "options": {"num_ctx": size}}
            assert (await ask(stage.proxy, path, body)).status == 200
    assert len(stage.distant.events("reload")) - reloads <= 1
    assert len(stage.local.events("start")) - starts <= 1, "of ours the configuration decides"


async def test_a_full_queue_says_so_and_when_to_come_again(fakes: Fakes) -> None:
    config = fakes.config({"slow": fakes.model(LOAD_S=600)}, queue_limit=1)
    body = {"model": "slow", "messages": MESSAGES}
    async with running_proxy(config) as proxy, raw_client.connected(proxy.port) as first:
        await first.send(raw_client.request("POST", "/api/chat", body))
        await until(lambda: fakes.events("start"), what="the load")
        answer = await ask(proxy, "/api/chat", body)
        assert (answer.status, int(answer.header("retry-after") or 0) > 0) == (503, True)
        assert isinstance(answer.json()["error"], str)


async def test_a_crash_is_told_once_and_mended_with_the_next_request(stage: Stage) -> None:
    starts = len(stage.local.events("start"))
    body = {"model": "local", "messages": [{"role": "user", "content": steered(die_after=2)}]}
    async with raw_client.connected(stage.proxy.port) as client:
        await client.send(raw_client.request("POST", "/api/chat", body))
        assert (await client.head())[1] == 200
        *lines, end = (await client.closed_by_peer()).split(b"\r\n")
        assert end == b"" and "error" in json.loads(lines[-1]) and lines[-1] != b"0"

    async def gone() -> bool:  # a broken connection is often noticed before the end of the process
        return "local" not in await loaded(stage.proxy)

    await until(gone)
    assert (await ask(stage.proxy, "/api/chat", body | {"messages": MESSAGES})).status == 200
    assert len(stage.local.events("start")) <= starts + 2 and "local" in await loaded(stage.proxy)


# -- what a model is ---------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_show_has_what_copilot_and_continue_need(served: Proxy) -> None:
    shown = (await ask(served, "/api/show", {"model": "smollm2"})).json()
    assert shown == (await ask(served, "/api/show", {"name": "smollm2"})).json(), "Continue says name"
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == 8192
    assert info["general.basename"] and isinstance(shown["capabilities"], list)
    assert all(CONTINUE_LINE.match(line) for line in shown["parameters"].splitlines())
    assert info["tokenizer.ggml.tokens"] == []
    assert ".Suffix" not in shown["template"], "or Continue would have it complete code, which it cannot"


@needs_llama_cpp
async def test_copilot_sees_the_name_that_it_asked_for(chain: Chain) -> None:
    request = raw_client.request(
        "POST", "/api/show", {"model": "SmolLM2:latest"}, headers=[("User-Agent", "GitHubCopilotChat/0.30")], close=True
    )
    answer = await raw_client.ask(chain.local.port, request)
    assert answer.json()["model_info"]["general.basename"] == "SmolLM2:latest"


# -- changing models ---------------------------------------------------------------------------------------------------


async def test_models_of_an_ollama_are_copied_made_pushed_and_deleted_there(stage: Stage) -> None:
    proxy, fake = stage.proxy, stage.distant

    async def names() -> list[str]:
        return [item["name"] for item in (await raw_client.get(proxy.port, "/api/tags")).json()["models"]]

    assert (await ask(proxy, "/api/copy", {"source": "distant", "destination": "copy"})).status == 200
    made = await ask(proxy, "/api/create", {"model": "made", "from": "distant", "system": "Be brief."})
    assert [json.loads(line)["status"] for line in made.body.splitlines()] == ["writing manifest", "success"]
    assert json.loads(fake.events("request", "/api/create")[-1]["body"])["system"] == "Be brief."

    async def listed() -> bool:
        return {"copy:latest", "made:latest"} <= set(await names())

    await until(listed, what="the new models")
    assert (await ask(proxy, "/api/push", {"model": "made", "stream": False})).json() == {"status": "success"}
    for name in ("copy", "made"):
        answer = await ask(proxy, "/api/delete", {"model": name}, "DELETE")
        assert (answer.status, answer.body) == (200, b"")
        again = await ask(proxy, "/api/delete", {"model": name}, "DELETE")
        assert again.status == 404 and again.json()["error"].endswith("not found")

    async def as_before() -> bool:
        return await names() == ["local", "distant:latest"]

    await until(as_before, what="the models as they were")


async def test_whether_an_ollama_has_a_file_is_asked_there(stage: Stage) -> None:
    path = f"/api/blobs/sha256:{'0123456789abcdef' * 4}"
    request = raw_client.request("HEAD", path, close=True)
    assert (await raw_client.ask(stage.proxy.port, request, method="HEAD")).status == 404
    assert len(stage.distant.events("request", path)) == 1
    assert (await ask(stage.proxy, "/api/blobs/sha256:0123", b"x")).status == 404, "that is no digest"


@pytest.mark.parametrize("path", ["/api/copy", "/api/create", "/api/push"])
async def test_models_of_the_configuration_are_not_changed(stage: Stage, path: str) -> None:
    asked = len(stage.distant.events("request", path))
    answer = await ask(stage.proxy, path, {"model": "local", "source": "local", "destination": "x", "from": "local"})
    assert answer.status == 400 and "llama.cpp" in answer.json()["error"]
    deleted = await ask(stage.proxy, "/api/delete", {"model": "local"}, "DELETE")
    assert deleted.status == 400 and "configuration" in deleted.json()["error"]
    assert len(stage.distant.events("request", path)) == asked


# -- errors, word for word ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ASKING, *ABOUT])
async def test_bodies_that_say_nothing_are_refused(stage: Stage, path: str) -> None:
    for body in (b"", b" \n"):
        answer = await ask(stage.proxy, path, body)
        assert (answer.status, answer.json()) == (400, {"error": "missing request body"})
    for body in (b"{", b'{"model"', b"[]", b'"x"', b"\xff"):
        answer = await ask(stage.proxy, path, body)
        assert answer.status == 400 and set(answer.json()) == {"error"}
    for body in (b"{}", b'{"model":""}', b'{"model":null}'):
        answer = await ask(stage.proxy, path, body)
        assert (answer.status, answer.json()) == (400, {"error": "model is required"})
    assert (await ask(stage.proxy, path, b'{"model":7}')).status == 400


@pytest.mark.parametrize("path", [*ASKING, "/api/show"])
async def test_an_unknown_model_is_named(stage: Stage, path: str) -> None:
    body = {"model": "nosuch", "messages": MESSAGES, "prompt": "hi", "input": "hi"}
    answer = await ask(stage.proxy, path, body)
    assert (answer.status, answer.json()) == (404, {"error": "model 'nosuch' not found"})
    loading = {"model": "nosuch", "keep_alive": 0, "prompt": ""}
    assert (await ask(stage.proxy, path, loading)).status == 404


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/api/chat", {"keep_alive": "60"}, 'time: missing unit in duration "60"'),
        ("/api/chat", {"keep_alive": True}, "Unsupported type: 'bool'"),
        ("/api/chat", {"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ("/api/chat", {"think": "very"}, 'invalid think value: "very" (must be "high", "medium", "low", "max", true'),
        ("/api/chat", {"options": {"temperature": "hot"}}, 'option "temperature" must be of type float32'),
        ("/api/chat", {"format": "xml"}, 'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object'),
        ("/api/chat", {"messages": [{"role": "user", "content": []}]}, "json: cannot unmarshal array into Go struct"),
        ("/api/generate", {"raw": True, "template": "x"}, "raw mode does not support template, system, or context"),
        ("/api/generate", {"images": ["data:image/png;base64,xx"]}, "illegal base64 data at input byte 4"),
        ("/api/embed", {"input": {"no": "text"}}, "invalid input type"),
    ],
)
async def test_a_value_that_cannot_be_is_refused_in_ollamas_words(
    stage: Stage, path: str, fields: dict[str, Any], words: str
) -> None:
    body = {"model": "local", "messages": MESSAGES, "prompt": "hi", **fields}
    answer = await ask(stage.proxy, path, body)
    assert answer.status == 400 and answer.json()["error"].startswith(words), answer.body


async def test_endpoints_and_methods_that_are_not_there_say_so(stage: Stage) -> None:
    for method, path, status in (("POST", "/api/nosuch", 404), ("GET", "/api/chat", 405), ("PUT", "/api/tags", 405)):
        answer = await raw_client.ask(stage.proxy.port, raw_client.request(method, path, close=True), method=method)
        assert answer.status == status and isinstance(answer.json()["error"], str)
