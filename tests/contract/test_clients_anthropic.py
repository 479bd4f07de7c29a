"""Anthropic's own Python client, over llama.cpp, an Ollama that is real llama.cpp too, and recorded answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message

from tests.support.e2e_support import PIXEL, RAIN, WEATHER, needs_llama_cpp, steered
from tests.support.harness import Proxy
from tests.support.stages import GOLDEN, Chain, Stage

GREEDY = {"temperature": 0}
"""As `extra_body`: newer versions of the client no longer know it."""
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": WEATHER["function"]["parameters"],
}
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
each_server = pytest.mark.parametrize("model", ["local", "distant"])


@pytest.fixture
async def client(served: Proxy) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with client_of(served) as client:
        yield client


@pytest.fixture
async def replay(recorded: Proxy) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """A client of a proxy whose Ollama answers by transcripts."""
    async with client_of(recorded) as client:
        yield client


@pytest.fixture
async def staged(stage: Stage) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """A client of scripted servers."""
    async with client_of(stage.proxy) as client:
        yield client


def client_of(proxy: Proxy) -> anthropic.AsyncAnthropic:
    http = anthropic.DefaultAsyncHttpxClient(verify=False)  # certificates take longer to read than most tests
    return anthropic.AsyncAnthropic(api_key="none", base_url=proxy.url, max_retries=0, timeout=300, http_client=http)


async def said(client: anthropic.AsyncAnthropic, stream: bool, **fields: Any) -> Message:
    """The message, which the client puts together of a stream's events."""
    if not stream:
        message: Message = await client.messages.create(**fields)
        return message
    async with client.messages.stream(**fields) as events:
        return await events.get_final_message()


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def calls_of(message: Message) -> list[tuple[str, Any]]:
    calls = [block for block in message.content if block.type == "tool_use"]
    assert len({call.id for call in calls}) == len(calls)
    return [(call.name, call.input) for call in calls]


# -- answers -----------------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_a_message_streamed_says_what_the_whole_one_says(client: anthropic.AsyncAnthropic) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "messages": HELLO, "max_tokens": 8, "extra_body": GREEDY}
    whole = await client.messages.create(**fields)
    async with client.messages.stream(**fields) as events:
        pieces = [piece async for piece in events.text_stream]
        streamed = await events.get_final_message()
    assert text_of(whole) and "".join(pieces) == text_of(streamed) == text_of(whole) and len(pieces) > 4
    for message in (whole, streamed):
        assert (message.type, message.role, message.model) == ("message", "assistant", "smollm2")
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        assert message.usage.output_tokens == 8
    counted = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert counted > 8 and whole.id != streamed.id


@needs_llama_cpp
async def test_a_system_prompt_counts(client: anthropic.AsyncAnthropic) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
    short = await client.messages.create(**fields)
    long = await client.messages.create(**fields, system="Speak like a pirate.")
    tokens = [usage.input_tokens + (usage.cache_read_input_tokens or 0) for usage in (short.usage, long.usage)]
    assert tokens[1] >= tokens[0] + len("Speak like a pirate."), "a token of this model is a byte"


@needs_llama_cpp
@both_ways
async def test_a_tool_is_called_and_its_result_is_understood(client: anthropic.AsyncAnthropic, stream: bool) -> None:
    """SmolLM2 calls a tool when it has seen it done twice."""
    messages: list[Any] = []
    for city in ("Rome", "Bern"):
        call = {"type": "tool_use", "id": f"toolu_{city}", "name": "get_weather", "input": {"city": city}}
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": RAIN}
        messages += [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "content": [call]}]
        messages += [{"role": "user", "content": [result]}, {"role": "assistant", "content": RAIN}]
    messages.append({"role": "user", "content": "Weather in Oslo?"})
    fields = {"model": "smollm2", "messages": messages, "tools": [TOOL], "extra_body": GREEDY, "max_tokens": 40}
    message = await said(client, stream, **fields)
    assert (calls_of(message), message.stop_reason) == ([("get_weather", {"city": "Oslo"})], "tool_use")


@needs_llama_cpp
@both_ways
async def test_a_schema_is_kept_to_by_an_ollama(chain: Chain, stream: bool) -> None:
    """llama-server's own `/v1/messages` (b11434) ignores `output_config`."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    config = {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}}
    async with client_of(chain.distant) as client:
        fields = {
            "model": "smollm2",
            "messages": HELLO,
            "extra_body": GREEDY,
            "max_tokens": 40,
            "output_config": config,
        }
        assert isinstance(json.loads(text_of(await said(client, stream, **fields)))["ok"], bool)


@needs_llama_cpp
async def test_tokens_are_counted(client: anthropic.AsyncAnthropic) -> None:
    """By the model's tokenizer, or by an estimate where there is none to ask."""
    short = await client.messages.count_tokens(model="tiny", messages=HELLO)
    long = await client.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief. " * 50)
    assert 0 < short.input_tokens < long.input_tokens


@needs_llama_cpp
@both_ways
async def test_a_refusal_is_raised_as_the_class_that_fits(client: anthropic.AsyncAnthropic, stream: bool) -> None:
    async def create(**fields: Any) -> None:
        await client.messages.create(
            **{"model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": stream, **fields}
        )

    with pytest.raises(anthropic.NotFoundError, match="model 'nosuch' not found") as unknown:
        await create(model="nosuch")
    body: Any = unknown.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="model is required"):
        await create(model="")


# -- what is asked of the servers --------------------------------------------------------------------------------------


@each_server
async def test_images_and_tools_reach_a_server_as_it_takes_them(
    stage: Stage, staged: anthropic.AsyncAnthropic, model: str
) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    tools: Any = [TOOL]
    message = await staged.messages.create(model=model, messages=messages, tools=tools, max_tokens=9, system="Look.")
    assert text_of(message).startswith("t0 t1 t2 t3 ")
    if model == "local":
        [event] = [event for event in stage.local.events("request") if event["path"] == "/v1/messages"][-1:]
        body = json.loads(event["body"])
        assert (body["messages"], body["tools"], body["system"]) == (messages, tools, "Look.")
    else:
        body = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])
        question = {"role": "user", "content": "What is this?", "images": [PIXEL]}
        assert body["messages"] == [{"role": "system", "content": "Look."}, question]
        assert body["tools"] == [WEATHER] and body["options"]["num_predict"] == 9


@both_ways
@each_server
async def test_a_tool_call_of_a_server_reaches_the_client(
    stage: Stage, staged: anthropic.AsyncAnthropic, model: str, stream: bool
) -> None:
    await stage.distant.set(tool_call=["get_weather", {"city": "Zürich"}])
    messages = [{"role": "user", "content": steered(tokens=2, tool_call=["get_weather", {"city": "Zürich"}])}]
    message = await said(staged, stream, model=model, messages=messages, tools=[TOOL], max_tokens=9)
    assert (calls_of(message), message.stop_reason) == ([("get_weather", {"city": "Zürich"})], "tool_use")
    assert text_of(message).startswith("t0 t1 ")


@both_ways
@each_server
async def test_an_error_of_a_server_is_raised(
    stage: Stage, staged: anthropic.AsyncAnthropic, model: str, stream: bool
) -> None:
    await stage.distant.set(error_after=2)
    messages: list[Any] = [{"role": "user", "content": steered(error_after=2)}]
    pieces: list[str] = []
    with pytest.raises(anthropic.APIStatusError, match=r"fake failure|unexpected EOF"):
        if stream:
            async with staged.messages.stream(model=model, messages=messages, max_tokens=9) as events:
                pieces += [piece async for piece in events.text_stream]
        else:
            await staged.messages.create(model=model, messages=messages, max_tokens=9)


# -- recorded answers --------------------------------------------------------------------------------------------------


def asked(name: str) -> dict[str, Any]:
    """Model and messages of a transcript's request; its tools in Anthropic's shape."""
    body = json.loads((GOLDEN / f"{name}.json").read_text())["request"]["body"]
    functions = [tool["function"] for tool in body.get("tools", ())]
    tools = [{"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in functions]
    fields = {"model": body["model"], "messages": body["messages"], "max_tokens": 64}
    return fields | ({"tools": tools} if tools else {})


@both_ways
async def test_recorded_answers_reach_the_client_whole(replay: anthropic.AsyncAnthropic, stream: bool) -> None:
    assert text_of(await said(replay, stream, **asked("chat-stream"))) == "Hello, wörld \u2028🙂!"
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = await said(replay, stream, **asked("chat-thinking"), thinking=thinking)
    assert [(block.type, getattr(block, block.type)) for block in message.content] == [
        ("thinking", "Two and two make four."),
        ("text", "It is 4."),
    ]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (15, 9)
    limited = await said(replay, stream, **{**asked("chat-length"), "max_tokens": 3})
    assert (text_of(limited), limited.stop_reason) == ("1, 2", "max_tokens")


@both_ways
@pytest.mark.parametrize("name", ["chat-tools", "chat-tools-native"])
async def test_recorded_tool_calls_reach_the_client(replay: anthropic.AsyncAnthropic, name: str, stream: bool) -> None:
    message = await said(replay, stream, **asked(name))
    assert text_of(message) == "Let me look." and message.stop_reason == "tool_use"
    places = [{"place": "Zürich", "unit": "celsius"}, {"place": "Oslo"}]
    assert calls_of(message) == [("get_weather", place) for place in places]


@both_ways
async def test_an_answer_that_breaks_off_is_raised(replay: anthropic.AsyncAnthropic, stream: bool) -> None:
    words = "an error was encountered while running the model: unexpected EOF"
    got: list[str] = []
    with pytest.raises(anthropic.APIStatusError, match=words):
        if stream:
            async with replay.messages.stream(**asked("chat-error-midway")) as events:
                async for piece in events.text_stream:
                    got.append(piece)
        else:
            await replay.messages.create(**asked("chat-error-midway"))
    assert got == (["I was", " about to"] if stream else [])
