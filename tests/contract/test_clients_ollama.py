"""Ollama's own Python client, over llama.cpp, over an Ollama that is real llama.cpp too, and over recorded answers."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import ollama
import pytest
from ollama import AsyncClient, ResponseError

from tests.support.e2e_support import PIXEL, RAIN, WEATHER, needs_llama_cpp, steered
from tests.support.harness import Proxy, until
from tests.support.stages import RECORDED, Chain, Stage

HELLO = [{"role": "user", "content": "Say hello."}]
QUIET: dict[str, Any] = {"temperature": 0, "seed": 1, "num_predict": 8}
CITY = {"enum": ["Oslo", "Rome"]}
SCHEMA = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}


@pytest.fixture
async def client(served: Proxy) -> AsyncIterator[AsyncClient]:
    async with client_of(served) as client:
        yield client


@pytest.fixture
async def replay(recorded: Proxy) -> AsyncIterator[AsyncClient]:
    """A client of a proxy whose Ollama answers by transcripts."""
    async with client_of(recorded) as client:
        yield client


def client_of(proxy: Proxy) -> AsyncClient:
    return AsyncClient(host=proxy.url, verify=False)  # certificates take longer to read than most tests


def metrics(response: ollama.ChatResponse | ollama.GenerateResponse) -> list[int | None]:
    """All but `load_duration`: a model that is loaded needs less for it than is counted."""
    timed = [response.total_duration, response.prompt_eval_duration, response.eval_duration]
    return [*timed, response.prompt_eval_count, response.eval_count]


# -- answers -----------------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_a_chat_streamed_says_what_the_whole_one_says(client: AsyncClient) -> None:
    whole = await client.chat("smollm2", HELLO, options=QUIET)
    parts = [part async for part in await client.chat("smollm2", HELLO, options=QUIET, stream=True)]
    assert whole.message.content and whole.message.role == "assistant"
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert len(parts) > 4 and [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert (last.model, last.done_reason) == ("smollm2", "length")
        assert all(isinstance(metric, int) and metric > 0 for metric in metrics(last)), last
        assert last.created_at is not None and datetime.fromisoformat(last.created_at).tzinfo is not None
        assert last.eval_count == 8


@needs_llama_cpp
async def test_a_text_streamed_says_what_the_whole_one_says(client: AsyncClient) -> None:
    whole = await client.generate("tiny", "Once upon", options=QUIET)
    parts = [part async for part in await client.generate("tiny", "Once upon", options=QUIET, stream=True)]
    assert whole.response and "".join(part.response or "" for part in parts) == whole.response
    assert parts[-1].done and parts[-1].context == whole.context and whole.context
    assert all(isinstance(metric, int) and metric > 0 for metric in metrics(parts[-1]))


@needs_llama_cpp
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_tool_is_called_with_an_object_and_its_result_is_understood(client: AsyncClient, stream: bool) -> None:
    """SmolLM2 calls a tool when it has seen it done twice."""
    messages: list[dict[str, Any]] = []
    for city in ("Rome", "Bern"):
        call = {"function": {"name": "get_weather", "arguments": {"city": city}}}
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_name": "get_weather", "content": RAIN}]
        messages += [{"role": "assistant", "content": RAIN}]
    messages.append({"role": "user", "content": "Weather in Oslo?"})
    fields: dict[str, Any] = {"tools": [WEATHER], "options": {"temperature": 0, "num_predict": 40}}
    if stream:
        parts = [part async for part in await client.chat("smollm2", messages, stream=True, **fields)]
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        assert parts[-1].done_reason == "stop"
    else:
        calls = list((await client.chat("smollm2", messages, **fields)).message.tool_calls or ())
    assert [(call.function.name, call.function.arguments) for call in calls] == [("get_weather", {"city": "Oslo"})]


@needs_llama_cpp
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_schema_is_kept_to(client: AsyncClient, stream: bool) -> None:
    messages = [{"role": "user", "content": "Name a city."}]
    fields: dict[str, Any] = {"format": SCHEMA, "options": {"temperature": 0, "num_predict": 40}}
    if stream:
        parts = [part async for part in await client.chat("smollm2", messages, stream=True, **fields)]
        text = "".join(part.message.content or "" for part in parts)
    else:
        text = (await client.chat("smollm2", messages, **fields)).message.content or ""
    assert json.loads(text)["city"] in ("Oslo", "Rome")
    text = (await client.generate("smollm2", "Name a city.", **fields)).response
    assert json.loads(text)["city"] in ("Oslo", "Rome")


@needs_llama_cpp
async def test_json_of_any_shape_may_be_asked_for(client: AsyncClient) -> None:
    messages = [{"role": "user", "content": "Name a city."}]
    answer = await client.chat("smollm2", messages, format="json", options={"temperature": 0, "num_predict": 8})
    assert (answer.message.content or "").lstrip().startswith("{")


@needs_llama_cpp
async def test_likelihoods_of_tokens_are_told(client: AsyncClient) -> None:
    answer = await client.chat("smollm2", HELLO, logprobs=True, top_logprobs=2, options=QUIET)
    assert answer.logprobs is not None and len(answer.logprobs) == 8
    first = answer.logprobs[0]
    assert first.logprob <= 0 and first.top_logprobs is not None and len(first.top_logprobs) == 2
    assert "".join(one.token for one in answer.logprobs) == answer.message.content


@needs_llama_cpp
async def test_texts_are_embedded_one_or_many(client: AsyncClient) -> None:
    both = await client.embed("embed", ["one", "two"])
    first, second = both.embeddings
    single = (await client.embed("embed", "one")).embeddings
    assert len(single) == 1 and len(first) == 64 and first != second
    assert first == pytest.approx(single[0], abs=1e-4)
    assert math.hypot(*first) == pytest.approx(1, abs=1e-3)
    assert both.prompt_eval_count and both.prompt_eval_count > 2
    assert len((await client.embed("embed", "one", dimensions=8)).embeddings[0]) == 8
    assert (await client.embed("embed", [])).embeddings == []
    assert len((await client.embeddings("embed", "one")).embedding) == 64


# -- models ------------------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_models_are_listed_and_shown(client: AsyncClient) -> None:
    models = {model.model: model for model in (await client.list()).models}
    assert set(models) == {"smollm2", "tiny", "embed", "spare"}
    smollm2 = models["smollm2"]
    assert smollm2.digest is not None and len(smollm2.digest) == 64
    assert smollm2.details is not None and smollm2.details.parameter_size == "134.52M"
    assert smollm2.modified_at is not None and smollm2.size is not None and smollm2.size > 90_000_000
    shown = await client.show("smollm2")
    assert shown.modelinfo is not None and shown.modelinfo["llama.context_length"] == 8192
    assert shown.capabilities and "completion" in shown.capabilities
    assert shown.template and shown.details is not None and shown.details.family == "llama"


@needs_llama_cpp
async def test_a_model_is_loaded_and_unloaded_on_demand(client: AsyncClient, chain: Chain) -> None:
    async def loaded() -> dict[str | None, Any]:
        async with client_of(chain.local) as local:
            return {model.model: model for model in (await local.ps()).models}

    answer = await client.generate("spare", "", keep_alive="10m")
    assert (answer.done, answer.done_reason, answer.response) == (True, "load", "")
    expires_in_s = ((await loaded())["spare"].expires_at - datetime.now(UTC)).total_seconds()
    assert 500 < expires_in_s <= 600
    answer = await client.generate("spare", "", keep_alive=0)
    assert answer.done_reason == "unload"
    assert "spare" not in await loaded()
    chat = await client.chat("spare", [], keep_alive=-1)
    assert (chat.done_reason, chat.message.content) == ("load", "")
    assert (await loaded())["spare"].expires_at.year > 2300
    assert (await client.chat("spare", [], keep_alive="0")).done_reason == "unload"
    assert "spare" not in await loaded()
    assert (await client.chat("spare", [], keep_alive=0)).done_reason == "unload", "it was not loaded"


@needs_llama_cpp
async def test_a_loaded_model_is_among_the_running_ones(client: AsyncClient) -> None:
    await client.chat("tiny", HELLO, options=QUIET)

    async def seen() -> bool:  # an Ollama is asked every 3 s
        return "tiny" in [model.model for model in (await client.ps()).models]

    await until(seen, what="the model in /api/ps")
    tiny = next(model for model in (await client.ps()).models if model.model == "tiny")
    assert tiny.context_length == 2048 and tiny.size and tiny.expires_at is not None and tiny.digest


# -- errors ------------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_refusal_is_raised_with_its_words_and_status(client: AsyncClient, stream: bool) -> None:
    async def asked(**fields: Any) -> tuple[int, str]:
        with pytest.raises(ResponseError) as caught:
            answer = await client.chat(**{"model": "tiny", "messages": HELLO, "stream": stream, **fields})
            async for _ in answer:
                pass
        return caught.value.status_code, caught.value.error

    assert await asked(model="nosuch") == (404, "model 'nosuch' not found")
    assert await asked(options={"temperature": "hot"}) == (400, 'option "temperature" must be of type float32')
    assert await asked(keep_alive="60") == (400, 'time: missing unit in duration "60"')
    assert await asked(think=True) == (400, '"tiny" does not support thinking')
    assert await asked(logprobs=True, top_logprobs=21) == (400, "top_logprobs must be between 0 and 20")


@needs_llama_cpp
async def test_what_only_an_ollama_can_change_is_refused_for_other_models(chain: Chain) -> None:
    async with client_of(chain.local) as client:
        for refused in (client.copy("tiny", "other"), client.delete("tiny"), client.create("other", from_="tiny")):
            with pytest.raises(ResponseError) as caught:
                await refused
            assert caught.value.status_code == 400 and "tiny" in caught.value.error
        assert (await client.pull("tiny")).status == "success"
        assert [part.status async for part in await client.pull("tiny", stream=True)] == ["success"]
        with pytest.raises(ResponseError, match="neither configured nor") as caught:
            await client.pull("nosuch")
        assert caught.value.status_code == 404


# -- what is asked of the servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["local", "distant"])
async def test_images_and_tools_reach_a_server_as_it_takes_them(stage: Stage, model: str) -> None:
    message: dict[str, Any] = {"role": "user", "content": "What is this?", "images": [PIXEL]}
    async with client_of(stage.proxy) as client:
        answer = await client.chat(model, [message], tools=[WEATHER])
    assert (answer.message.content or "").startswith("t0 t1 t2 t3 ")
    if model == "local":
        body = stage.local.generated()[-1]
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
        message = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}
    else:
        body = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
    assert body["messages"] == [message]
    function = body["tools"][0]["function"]
    assert function["name"] == "get_weather" and function["parameters"]["properties"]["city"]["enum"][1] == "Oslo"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("model", ["local", "distant"])
async def test_a_tool_call_of_a_server_reaches_the_client(stage: Stage, model: str, stream: bool) -> None:
    await stage.distant.set(tool_call=["get_weather", {"city": "Zürich"}])
    messages = [{"role": "user", "content": steered(tokens=2, tool_call=["get_weather", {"city": "Zürich"}])}]
    async with client_of(stage.proxy) as client:
        if stream:
            parts = [part async for part in await client.chat(model, messages, tools=[WEATHER], stream=True)]
        else:
            parts = [await client.chat(model, messages, tools=[WEATHER])]
    calls = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", {"city": "Zürich"})]
    assert "".join(part.message.content or "" for part in parts).startswith("t0 t1 ")
    assert parts[-1].done_reason == "stop"


async def test_text_with_every_kind_of_line_end_reaches_the_client(stage: Stage) -> None:
    """The client splits a stream at all that Python takes for the end of a line, also within a text."""
    text = "a\nb\r\nc\x0bd\x0ce\x1cf\x85g\u2028h\u2029i"
    async with client_of(stage.proxy) as client:
        messages = [{"role": "user", "content": steered(answer=text)}]
        parts = [part.message.content or "" async for part in await client.chat("local", messages, stream=True)]
        whole = await client.chat("local", messages)
    assert "".join(parts) == whole.message.content == text


# -- recorded answers --------------------------------------------------------------------------------------------------


async def test_recorded_answers_reach_the_client_whole(replay: AsyncClient) -> None:
    assert (await replay.chat(RECORDED, HELLO)).message.content == "Hello, wörld \u2028🙂!"
    generated = await replay.generate(RECORDED, "Say hello.")
    assert (generated.response, generated.context) == ("Hello there.", [1, 4093, 198, 19556, 28, 665, 17])
    sums = [{"role": "user", "content": "What is 2 + 2?"}]
    parts = [part.message async for part in await replay.chat(RECORDED, sums, think=True, stream=True)]
    assert "".join(part.thinking or "" for part in parts) == "Two and two make four."
    assert "".join(part.content or "" for part in parts) == "It is 4."


async def test_recorded_listings_reach_the_client(replay: AsyncClient) -> None:
    assert [model.model for model in (await replay.list()).models] == [RECORDED, "all-minilm:latest"]

    async def running() -> bool:
        return [model.model for model in (await replay.ps()).models] == [RECORDED]

    await until(running, what="the recorded model in /api/ps")
    shown = await replay.show(RECORDED)
    assert shown.license == "Apache License 2.0" and shown.parameters and "<|im_end|>" in shown.parameters
    statuses = [part.status async for part in await replay.pull(RECORDED, stream=True)]
    assert statuses[0] == "pulling manifest" and statuses[-1] == "success"
    with pytest.raises(ResponseError, match="file does not exist"):
        await replay.pull("nosuch")


async def test_an_answer_that_breaks_off_is_raised(replay: AsyncClient) -> None:
    words = "an error was encountered while running the model: unexpected EOF"
    got = []
    with pytest.raises(ResponseError, match=words):
        async for part in await replay.chat(RECORDED, [{"role": "user", "content": "Break off."}], stream=True):
            got.append(part.message.content)
    assert got == ["I was", " about to"]
