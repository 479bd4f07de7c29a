"""What Anthropic's own Python client makes of our answers, over a real connection; it checks all types strictly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from llama_smart_proxy.proxy.chat import Fold, Json, Timing
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES, count_tokens
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed


def delta(finish: str | None = None, **fields: Any) -> Json:
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def begun(at: int) -> Json:
    return delta(tool_calls=[{"index": at, "id": f"t{at}", "function": {"name": "look", "arguments": ""}}])


def continued(at: int, arguments: str) -> Json:
    return delta(tool_calls=[{"index": at, "function": {"arguments": arguments}}])


USAGE = {
    **{"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    "prompt_tokens_details": {"cached_tokens": 2},
}
CHUNKS: list[Json] = [
    delta(role="assistant", content=None),
    *(delta(reasoning_content=text) for text in ("Let me ", "see.")),
    *(delta(content=text) for text in ("Zażółć\u2028", "!\r\n\r\n")),
    begun(0),
    *(continued(0, text) for text in ('{"at": ', '"here"}')),
    begun(1),
    continued(1, '{"at": "there"}'),
    delta("tool_calls"),
    {"choices": [], "usage": USAGE},
]
TOOL: anthropic.types.ToolParam = {"name": "look", "input_schema": {"type": "object", "properties": {}}}


async def answer(http: web.Request) -> web.StreamResponse:
    """Answers every request alike; the model `broken` fails after the first chunks."""
    try:
        request = MESSAGES.decode(await http.json())
    except BadRequest as exc:
        return web.Response(status=exc.status, body=MESSAGES.dialect.error_body(exc), content_type="application/json")
    writer = MESSAGES.writer(request, Timing(0.0))
    if not request.stream:
        whole = Fold()
        for chunk in CHUNKS:
            whole.add(chunk)
        return web.Response(body=writer.reply(whole.completion()), content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": writer.content_type})
    await response.prepare(http)
    broken = request.model == "broken"
    for chunk in CHUNKS[:4] if broken else CHUNKS:
        await response.write(writer.chunk(chunk))
    await response.write(writer.error(UpstreamFailed("it broke off")) if broken else writer.end())
    await response.write_eof()
    return response


async def count(http: web.Request) -> web.Response:
    return web.json_response({"input_tokens": count_tokens(await http.json())})


@pytest.fixture
async def client() -> AsyncIterator[anthropic.AsyncAnthropic]:
    """A client of a server that speaks by our writer."""
    app = web.Application()
    app.add_routes([web.post("/v1/messages", answer), web.post("/v1/messages/count_tokens", count)])
    async with TestServer(app) as server:
        url = str(server.make_url(""))
        async with anthropic.AsyncAnthropic(
            api_key="none", base_url=url, max_retries=0, _strict_response_validation=True
        ) as made:
            yield made


def check(message: anthropic.types.Message) -> None:
    told = message.to_dict()
    assert told["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "Zażółć\u2028!\r\n\r\n"},
        {"type": "tool_use", "id": "t0", "name": "look", "input": {"at": "here"}},
        {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "there"}},
    ]
    assert (message.id, message.model, message.role, message.stop_reason) == ("msg_1", "m", "assistant", "tool_use")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (7, 2)
    assert message.usage.output_tokens == 4


async def test_client_reads_the_whole_message(client: anthropic.AsyncAnthropic) -> None:
    check(
        await client.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}], tools=[TOOL], system="Be kind."
        )
    )


async def test_client_gathers_the_same_message_from_the_stream(client: anthropic.AsyncAnthropic) -> None:
    question: list[anthropic.types.MessageParam] = [{"role": "user", "content": "hi"}]
    async with client.messages.stream(model="m", max_tokens=9, messages=question, tools=[TOOL]) as stream:
        texts = [text async for text in stream.text_stream]
        check(await stream.get_final_message())
    assert texts == ["Zażółć\u2028", "!\r\n\r\n"]


async def test_client_sends_an_answer_back_and_it_is_understood(client: anthropic.AsyncAnthropic) -> None:
    first = await client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    results: list[anthropic.types.ToolResultBlockParam] = [
        {"type": "tool_result", "tool_use_id": at, "content": "a cat"} for at in ("t0", "t1")
    ]
    history: list[anthropic.types.MessageParam] = [first.to_param(), {"role": "user", "content": results}]
    check(await client.messages.create(model="m", max_tokens=9, messages=history))


async def test_client_raises_for_a_stream_that_fails(client: anthropic.AsyncAnthropic) -> None:
    stream = await client.messages.create(
        model="broken", max_tokens=9, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    seen: list[str] = []
    with pytest.raises(anthropic.APIError) as raised:
        seen.extend([event.type async for event in stream])
    assert raised.value.body == {"type": "error", "error": {"type": "api_error", "message": "it broke off"}}


async def test_client_raises_for_a_request_that_is_refused(client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages: at least one message is required"):
        await client.messages.create(model="m", max_tokens=9, messages=[])


async def test_client_counts_tokens(client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(model="m", messages=[{"role": "user", "content": "12345678"}])
    assert counted.input_tokens == 2
