"""The Responses API for OpenAI's own Python client, which checks all types strictly: over llama.cpp, over an Ollama
that is real llama.cpp too, over scripted servers of both kinds, and over a remote."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import ParsedResponse, Response, ResponseFunctionToolCall

from tests.conftest import Shared
from tests.contract.test_clients_openai import Place
from tests.support import raw_client, toxic
from tests.support.e2e_support import PIXEL, WEATHER, needs_llama_cpp, steered
from tests.support.harness import Proxy, running_proxy
from tests.support.stages import Chain, Stage
from tests.support.toxic import RawUpstream, raw_upstream, token

QUIET: dict[str, Any] = {"temperature": 0, "extra_body": {"seed": 1, "stop": [".", "!"]}}
TOOL: Any = {"type": "function", "strict": True, **WEATHER["function"]}
NAMED: list[Any] = [
    {"role": "user", "content": "I am Ann."},
    {"role": "assistant", "content": "Hello Ann."},
    {"role": "user", "content": [{"type": "input_text", "text": "Who am I?"}]},
]
each_server = pytest.mark.parametrize("model", ["local", "distant"])


def client_of(url: str) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(verify=False)  # certificates take longer to read than most tests
    base = f"{url}/v1"
    return openai.AsyncOpenAI(
        base_url=base, api_key="none", max_retries=0, timeout=60, http_client=http, _strict_response_validation=True
    )


@pytest.fixture
async def client(served: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(served.url) as client:
        yield client


@pytest.fixture
async def staged(stage: Stage) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of scripted servers."""
    async with client_of(stage.proxy.url) as client:
        yield client


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> tuple[list[str], ParsedResponse[Any]]:
    """The types of the events, and the response that the client's own helper builds of them."""
    async with client.responses.stream(**fields) as stream:
        kinds: list[str] = [event.type async for event in stream]
        return kinds, await stream.get_final_response()


def calls(response: Response) -> list[tuple[str, Any]]:
    found = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    assert all(item.call_id and item.id != item.call_id for item in found)
    return [(item.name, json.loads(item.arguments)) for item in found]


async def said_to(stage: Stage, model: str, text: str) -> str:
    """Have the scripted server of `model` answer with `text`; the message that makes it do so."""
    if model == "local":
        return steered(answer=text)
    await stage.distant.set(answer=text)
    return "hi"


# -- over real models --------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_a_response_streamed_says_what_the_whole_one_says(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "input": NAMED, "instructions": "Be kind.", **QUIET}
    whole = await client.responses.create(**fields, max_output_tokens=64)
    kinds, final = await streamed(client, **fields, max_output_tokens=64)
    assert whole.output_text and final.output_text == whole.output_text and whole.status == "completed"
    assert kinds.count("response.output_text.delta") > 2 and kinds[-1] == "response.completed"
    assert whole.usage is not None and final.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens > 2
    assert (whole.instructions, whole.temperature, whole.model, whole.store) == ("Be kind.", 0, "smollm2", False)
    cut = await client.responses.create(**fields, max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


@needs_llama_cpp
async def test_a_schema_is_kept_to(client: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": "smollm2", "input": "Are you at home?", "text_format": Place, **QUIET}
    parsed = (await client.responses.parse(**fields)).output_parsed
    assert isinstance(parsed, Place)
    assert (await streamed(client, **fields))[1].output_parsed == parsed


@needs_llama_cpp
async def test_tokens_are_counted_by_a_server_that_can_and_estimated_for_others(chain: Chain) -> None:
    async with client_of(chain.local.url) as client:
        counted = await client.responses.input_tokens.count(model="smollm2", input=NAMED)
        response = await client.responses.create(model="smollm2", input=NAMED, max_output_tokens=1)
        assert response.usage is not None and counted.input_tokens == response.usage.input_tokens
    async with client_of(chain.distant.url) as client:
        assert (await client.responses.input_tokens.count(model="smollm2", input=NAMED)).input_tokens == 7


# -- over scripted servers ---------------------------------------------------------------------------------------------


@each_server
async def test_a_tool_is_called_and_its_result_goes_back(staged: openai.AsyncOpenAI, stage: Stage, model: str) -> None:
    call = ["get_weather", {"city": "Oslo"}]
    await stage.distant.set(tool_call=call, tokens=2)
    first: Any = {"role": "user", "content": steered(tool_call=call, tokens=2) if model == "local" else "hi"}
    kinds, answer = await streamed(staged, model=model, input=[first], tools=[TOOL])
    assert calls(answer) == [("get_weather", {"city": "Oslo"})] and answer.output_text == "t0 t1 "
    assert calls(await staged.responses.create(model=model, input=[first], tools=[TOOL])) == calls(answer)
    assert "response.function_call_arguments.done" in kinds
    done: Any = {"type": "function_call_output", "call_id": "", "output": "rain"}
    done["call_id"] = next(item.call_id for item in answer.output if isinstance(item, ResponseFunctionToolCall))
    await stage.distant.set(tool_call=None)
    history: list[Any] = [first, *(item.to_dict() for item in answer.output), done]
    await staged.responses.create(model=model, input=history, tools=[TOOL])
    _, assistant, result = asked(stage, model)["messages"]
    assert assistant["content"] == "t0 t1 " and assistant["tool_calls"][0]["function"]["name"] == "get_weather"
    assert (result["role"], result["content"]) == ("tool", "rain")
    assert result["tool_call_id"] == done["call_id"] == assistant["tool_calls"][0]["id"]


def asked(stage: Stage, model: str) -> Any:
    """The body of the last chat that a server got."""
    source: Any = stage.local if model == "local" else stage.distant
    path = "/v1/chat/completions" if model == "local" else "/api/chat"
    bodies = [event["body"] for event in source.events("request") if event["path"] == path]
    return json.loads(bodies[-1]) if isinstance(bodies[-1], str) else bodies[-1]


@each_server
async def test_an_image_reaches_the_server(staged: openai.AsyncOpenAI, stage: Stage, model: str) -> None:
    url = f"data:image/png;base64,{PIXEL}"
    parts: Any = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "hi"}]
    await staged.responses.create(model=model, input=[{"role": "user", "content": parts}])
    assert PIXEL in json.dumps(asked(stage, model)["messages"][-1])


@each_server
async def test_tools_and_items_of_other_types_do_not_matter(
    staged: openai.AsyncOpenAI, stage: Stage, model: str
) -> None:
    text = await said_to(stage, model, "fine")
    items: list[Any] = [
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"role": "user", "content": text},
    ]
    tools: list[Any] = [TOOL, {"type": "web_search"}, {"type": "local_shell"}, {"type": "custom", "name": "patch"}]
    response = await staged.responses.create(model=model, input=items, tools=tools)
    assert response.output_text == "fine" and [tool.type for tool in response.tools] == [t["type"] for t in tools]
    offered = [tool["function"]["name"] for tool in asked(stage, model)["tools"]]
    assert offered == ["get_weather", "patch"]


async def test_errors_are_openais(staged: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send the whole conversation in 'input'") as refused:
        await staged.responses.create(model="local", input="hi", previous_response_id="resp_1")
    assert (refused.value.param, refused.value.type) == ("previous_response_id", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="known models: "):
        await staged.responses.create(model="nothing", input="hi")
    with pytest.raises(openai.InternalServerError, match="unwell"):
        await staged.responses.create(model="local", input=steered(refuse=[500, "unwell"]), stream=True)
    seen: list[str] = []
    with pytest.raises(openai.APIError, match="fake failure"):
        async for event in await staged.responses.create(
            model="local", input=steered(tokens=4, error_after=2), stream=True
        ):
            seen.append(event.type)
    assert seen.count("response.output_text.delta") == 2


# -- over a remote -----------------------------------------------------------------------------------------------------


async def test_a_remote_is_asked_for_a_chat(upstream: RawUpstream) -> None:
    end = toxic.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    async with raw_upstream(toxic.stream(token("Hi"), end, toxic.DONE)) as server:
        config = {"remotes": {"far": {"url": f"http://127.0.0.1:{server.port}", "models": ["m"]}}}
        async with running_proxy(config) as proxy, client_of(proxy.url) as client:
            assert (await client.responses.create(model="m", input="hi")).output_text == "Hi"
            assert (await streamed(client, model="m", input="hi"))[1].output_text == "Hi"
            counting = {"model": "m", "input": "12345678"}
            assert server.requests[-1].line.startswith("POST /v1/chat/completions ")
            server.script = toxic.plain(b'{"error":{"message":"no such endpoint"}}', 404)
            counted = await raw_client.post(proxy.port, "/responses/input_tokens", counting)
            assert counted.json() == {"object": "response.input_tokens", "input_tokens": 2}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
async def test_a_remote_with_an_endpoint_of_its_own_is_asked_there_as_the_client_asks(
    shared: Shared, upstream: RawUpstream, path: str
) -> None:
    """`shared` has a remote with `responses: true`."""
    upstream.script = toxic.plain(b'{"theirs":1}')
    body = {"model": "m", "input": "hi", "previous_response_id": "resp_1", "tools": [{"type": "web_search"}]}
    answer = await raw_client.post(shared.proxy.port, path, body)
    assert answer.body == b'{"theirs":1}' and upstream.requests[-1].json() == body
    assert upstream.requests[-1].line == f"POST {path} HTTP/1.1"
