"""OpenAI's own Python client, over llama.cpp, over an Ollama that is real llama.cpp too, and over recorded answers."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.support.e2e_support import PIXEL, RAIN, WEATHER, needs_llama_cpp, steered
from tests.support.harness import Proxy
from tests.support.stages import GOLDEN, RECORDED, Chain, Stage

HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
QUIET: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 8}
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
each_server = pytest.mark.parametrize("model", ["local", "distant"])


class Place(BaseModel):
    """What an answer shall say."""

    at_home: bool


@pytest.fixture
async def client(served: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(served) as client:
        yield client


@pytest.fixture
async def replay(recorded: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a proxy whose Ollama answers by transcripts."""
    async with client_of(recorded) as client:
        yield client


@pytest.fixture
async def staged(stage: Stage) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of scripted servers."""
    async with client_of(stage.proxy) as client:
        yield client


def client_of(proxy: Proxy) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(verify=False)  # certificates take longer to read than most tests
    return openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http)


async def chunks_of(client: openai.AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    """A streamed chat, with usage."""
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    return [chunk async for chunk in await client.chat.completions.create(**fields, **options)]


def texts(chunks: list[ChatCompletionChunk]) -> list[str]:
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]


async def called(client: openai.AsyncOpenAI, stream: bool, **fields: Any) -> tuple[str | None, list[tuple[str, Any]]]:
    """Finish reason, and names and arguments of the tool calls; a stream's pieces are put together."""
    if not stream:
        choice = (await client.chat.completions.create(**fields)).choices[0]
        whole = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        reason: str | None = choice.finish_reason
    else:
        chunks = await chunks_of(client, **fields)
        parts: dict[int, list[str]] = {}
        for call in [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]:
            assert call.function is not None
            part = parts.setdefault(call.index, ["", "", ""])
            for place, said in enumerate((call.id, call.function.name, call.function.arguments)):
                part[place] += said or ""
        whole = [(part[0], part[1], part[2]) for _, part in sorted(parts.items())]
        reason = next(chunk.choices[0].finish_reason for chunk in reversed(chunks) if chunk.choices)
    ids = [known for known, _, _ in whole]
    assert all(ids) and len(set(ids)) == len(ids)
    return reason, [(name, json.loads(arguments)) for _, name, arguments in whole]


# -- answers -----------------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_a_chat_streamed_says_what_the_whole_one_says(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="smollm2", messages=HELLO, **QUIET)
    chunks = await chunks_of(client, model="smollm2", messages=HELLO, **QUIET)
    message = whole.choices[0].message
    assert message.content and message.role == "assistant" and whole.object == "chat.completion"
    assert "".join(texts(chunks)) == message.content and len(texts(chunks)) > 4
    assert whole.choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].id != whole.id
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None and usage.completion_tokens == 8
        assert usage.total_tokens == usage.prompt_tokens + 8 > 8
    assert whole.model == "smollm2" and whole.to_dict()["timings"]


@needs_llama_cpp
async def test_a_text_streamed_says_what_the_whole_one_says(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="tiny", prompt="Once upon", **QUIET)
    stream = await client.completions.create(model="tiny", prompt="Once upon", stream=True, **QUIET)
    pieces = [chunk.choices[0].text async for chunk in stream if chunk.choices]
    assert whole.choices[0].text and "".join(pieces) == whole.choices[0].text
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"


@needs_llama_cpp
@both_ways
async def test_a_tool_is_called_and_its_result_is_understood(client: openai.AsyncOpenAI, stream: bool) -> None:
    """SmolLM2 calls a tool when it has seen it done twice."""
    messages: list[Any] = []
    for city in ("Rome", "Bern"):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        call = {"id": f"call_{city}", "type": "function", "function": function}
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": RAIN}]
        messages += [{"role": "assistant", "content": RAIN}]
    messages.append({"role": "user", "content": "Weather in Oslo?"})
    fields = {"model": "smollm2", "messages": messages, "tools": [WEATHER], "temperature": 0, "max_tokens": 40}
    assert await called(client, stream, **fields) == ("tool_calls", [("get_weather", {"city": "Oslo"})])


@needs_llama_cpp
@both_ways
async def test_a_schema_is_kept_to(client: openai.AsyncOpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Are you at home?"}]
    if stream:
        schema = {**Place.model_json_schema(), "additionalProperties": False}
        wanted = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": schema}}
        chunks = await chunks_of(
            client, model="smollm2", messages=messages, response_format=wanted, temperature=0, max_tokens=40
        )
        assert isinstance(Place.model_validate_json("".join(texts(chunks))).at_home, bool)
    else:
        answer = await client.chat.completions.parse(
            model="smollm2", messages=messages, response_format=Place, temperature=0, max_tokens=40
        )
        parsed = answer.choices[0].message.parsed
        assert parsed is not None and isinstance(parsed.at_home, bool)


@needs_llama_cpp
async def test_both_names_of_the_limit_are_kept_to(client: openai.AsyncOpenAI) -> None:
    newer = await client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=3, temperature=0)
    older = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
    assert newer.usage is not None and older.usage is not None
    assert (newer.usage.completion_tokens, older.usage.completion_tokens) == (3, 4)
    stopped = await client.chat.completions.create(model="smollm2", messages=HELLO, stop=["e", "o"], temperature=0)
    assert stopped.choices[0].finish_reason == "stop"
    assert not {"e", "o"} & set(stopped.choices[0].message.content or "")


@needs_llama_cpp
async def test_likelihoods_of_tokens_are_told(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="smollm2", messages=HELLO, logprobs=True, top_logprobs=2, **QUIET
    )
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 8
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in told.content)


@needs_llama_cpp
async def test_texts_are_embedded_one_or_many(client: openai.AsyncOpenAI) -> None:
    both = await client.embeddings.create(model="embed", input=["one", "two"])  # the client asks for base64
    plain = await client.embeddings.create(model="embed", input="one", encoding_format="float")
    assert [item.index for item in both.data] == [0, 1] and both.usage.prompt_tokens > 2
    first, second = (item.embedding for item in both.data)
    assert len(first) == 64 and first != second and math.hypot(*first) == pytest.approx(1, abs=1e-3)
    assert plain.data[0].embedding == pytest.approx(first, abs=1e-4)


@needs_llama_cpp
async def test_models_are_listed_and_retrieved(client: openai.AsyncOpenAI, served: Proxy, chain: Chain) -> None:
    owner = "llama.cpp" if served is chain.local else "ollama"
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["smollm2", "tiny", "embed", "spare"]
    assert {model.owned_by for model in models} == {owner}
    assert {model.object for model in models} == {"model"} and all(type(model.created) is int for model in models)
    assert all(isinstance(model.to_dict()["info"], dict) for model in models), "what it does not know is kept"
    assert (await client.models.retrieve("tiny")).owned_by == owner
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/nothing")


# -- errors ------------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@both_ways
async def test_a_refusal_is_raised_as_the_class_that_fits(client: openai.AsyncOpenAI, stream: bool) -> None:
    async def create(**fields: Any) -> None:
        await client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **fields})

    with pytest.raises(openai.NotFoundError, match="model 'nosuch' not found; known models: embed, smoll") as unknown:
        await create(model="nosuch")
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == (
        "model_not_found",
        "model",
        "not_found_error",
    )
    with pytest.raises(openai.BadRequestError, match="model is required"):
        await create(model="")
    with pytest.raises(openai.BadRequestError):
        await create(messages="no list")
    with pytest.raises(openai.BadRequestError):
        await create(temperature="hot")
    with pytest.raises(openai.NotFoundError, match="no such endpoint"):
        await client.images.generate(model="tiny", prompt="a house")


# -- what is asked of the servers --------------------------------------------------------------------------------------


@each_server
async def test_images_and_tools_reach_a_server_as_it_takes_them(
    stage: Stage, staged: openai.AsyncOpenAI, model: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    tools: Any = [WEATHER]
    answer = await staged.chat.completions.create(model=model, messages=messages, tools=tools)
    assert (answer.choices[0].message.content or "").startswith("t0 t1 t2 t3 ")
    if model == "local":
        body = stage.local.generated()[-1]
        assert body["messages"] == messages
    else:
        body = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
        assert body["messages"] == [{"role": "user", "content": "What is this?", "images": [PIXEL]}]
    assert body["tools"] == tools


async def test_what_ollamas_own_openai_api_loses_reaches_an_ollama(stage: Stage, staged: openai.AsyncOpenAI) -> None:
    await staged.chat.completions.create(
        model="distant",
        messages=HELLO,
        max_completion_tokens=7,
        extra_body={"options": {"num_ctx": 8192}, "keep_alive": "10m", "think": False},
    )
    body = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
    assert body["options"] == {"num_predict": 7, "num_ctx": 8192}, "and no sampler that nobody asked for"
    assert (body["keep_alive"], body["think"]) == ("10m", False)
    tools: Any = [WEATHER]
    await staged.chat.completions.create(model="distant", messages=HELLO, tools=tools, tool_choice="none")
    assert "tools" not in json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
    elsewhere = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/image"}}]}]
    refused: list[dict[str, Any]] = [{"n": 2}, {"messages": elsewhere}]
    for fields in refused:
        with pytest.raises(openai.BadRequestError):
            await staged.chat.completions.create(**{"model": "distant", "messages": HELLO, **fields})


@both_ways
@each_server
async def test_a_tool_call_of_a_server_reaches_the_client(
    stage: Stage, staged: openai.AsyncOpenAI, model: str, stream: bool
) -> None:
    await stage.distant.set(tool_call=["get_weather", {"city": "Zürich"}])
    messages = [{"role": "user", "content": steered(tokens=2, tool_call=["get_weather", {"city": "Zürich"}])}]
    found = await called(staged, stream, model=model, messages=messages, tools=[WEATHER])
    assert found == ("tool_calls", [("get_weather", {"city": "Zürich"})])


# -- recorded answers --------------------------------------------------------------------------------------------------


def asked(name: str) -> dict[str, Any]:
    """Model, messages and tools of a transcript's request."""
    body = json.loads((GOLDEN / f"{name}.json").read_text())["request"]["body"]
    return {key: body[key] for key in ("model", "messages", "tools") if key in body}


@both_ways
async def test_recorded_answers_reach_the_client_whole(replay: openai.AsyncOpenAI, stream: bool) -> None:
    async def said(name: str, **fields: Any) -> dict[str, Any]:
        if not stream:
            choice = (await replay.chat.completions.create(**asked(name), **fields)).choices[0]
            return {"finish": choice.finish_reason, **choice.message.to_dict()}
        found: dict[str, Any] = {}
        for choice in [chunk.choices[0] for chunk in await chunks_of(replay, **asked(name), **fields) if chunk.choices]:
            for key in ("content", "reasoning_content"):
                found[key] = found.get(key, "") + (choice.delta.to_dict().get(key) or "")
            found["finish"] = choice.finish_reason
        return found

    assert (await said("chat-stream"))["content"] == "Hello, wörld \u2028🙂!"
    thought = await said("chat-thinking", extra_body={"think": True})
    assert (thought["content"], thought["reasoning_content"]) == ("It is 4.", "Two and two make four.")
    limited = await said("chat-length", max_tokens=3)
    assert (limited["content"], limited["finish"]) == ("1, 2", "length")


@both_ways
@pytest.mark.parametrize("name", ["chat-tools", "chat-tools-native"])
async def test_recorded_tool_calls_reach_the_client(replay: openai.AsyncOpenAI, name: str, stream: bool) -> None:
    places = [{"place": "Zürich", "unit": "celsius"}, {"place": "Oslo"}]
    calls = [("get_weather", place) for place in places]
    assert await called(replay, stream, **asked(name)) == ("tool_calls", calls)


async def test_recorded_likelihoods_reach_the_client(replay: openai.AsyncOpenAI) -> None:
    answer = await replay.chat.completions.create(**asked("chat-logprobs"), logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    assert [(one.token, one.logprob, one.bytes) for one in told.content] == [
        ("Hi", -0.25, [72, 105]),
        ("!", -0.5, [33]),
    ]
    assert [top.token for top in told.content[0].top_logprobs] == ["Hi", "Hello"]


@both_ways
async def test_an_answer_that_breaks_off_is_raised(replay: openai.AsyncOpenAI, stream: bool) -> None:
    words = "an error was encountered while running the model: unexpected EOF"
    got: list[str] = []
    with pytest.raises(openai.APIError, match=words) as caught:
        if stream:
            async for chunk in await replay.chat.completions.create(**asked("chat-error-midway"), stream=True):
                got += texts([chunk])
                assert chunk.choices[0].finish_reason is None
        else:
            await replay.chat.completions.create(**asked("chat-error-midway"))
    assert got == (["I was", " about to"] if stream else [])
    assert isinstance(caught.value, openai.InternalServerError) is not stream


async def test_recorded_models_are_listed_and_one_that_cannot_be_pulled_is_not_found(
    replay: openai.AsyncOpenAI,
) -> None:
    assert [model.id async for model in replay.models.list()] == [RECORDED, "all-minilm:latest"]
    with pytest.raises(openai.NotFoundError, match="'nosuch' not found: pull model manifest: file does not exist"):
        await replay.chat.completions.create(model="nosuch", messages=HELLO)
