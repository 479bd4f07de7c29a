"""Every relayed endpoint, from a client through the proxy to real llama.cpp and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support import raw_client
from tests.support.e2e_support import (
    CHAT,
    DONE,
    MESSAGES,
    SMOLLM2,
    chat,
    embedded,
    events_of,
    needs_llama_cpp,
    streaming,
    text_of,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, session_proxy, until

__all__ = ["tiny_models"]  # a fixture
pytestmark = needs_llama_cpp


SERVERS = ["embedded", *filter(None, [shutil.which("llama-server")])]
"""A llama-server on PATH has to do as well as the one in the wheel."""


@pytest.fixture(scope="module", params=SERVERS, ids=["embedded", "native"][: len(SERVERS)])
def llama(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[Proxy]:
    """A proxy with SmolLM2 and tiny models to chat, to embed and to rank, all of which may be loaded at once."""
    models = {
        "smollm2": SMOLLM2,
        "tiny": tiny(tiny_models["tiny-a"], aliases=["tiny:latest-alias"]),
        "embed": tiny(tiny_models["tiny-b"], "--embeddings"),
        "rank": tiny(tiny_models["tiny-c"], "--rerank"),
    }
    with session_proxy(embedded(models, server=request.param, size=4)) as proxy:
        yield proxy


@pytest.fixture
async def client(llama: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, as a user would set it up."""
    async with openai.AsyncOpenAI(base_url=f"{llama.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


async def test_smollm2_answers_a_chat(llama: Proxy) -> None:
    answer = await chat(llama, "smollm2", max_tokens=16, temperature=0)
    assert answer.status == 200, answer.body
    value = answer.json()
    assert value["object"] == "chat.completion" and value["model"] == "smollm2"
    assert value["choices"][0]["message"]["content"].strip()
    assert value["timings"]["predicted_n"] == value["usage"]["completion_tokens"]
    assert answer.header("x-request-id")


async def test_tokens_of_smollm2_arrive_while_the_rest_is_generated(llama: Proxy) -> None:
    async def busy_slots() -> int:
        slots = (await raw_client.get(llama.port, "/slots?model=smollm2")).json()
        return sum(slot["is_processing"] for slot in slots)

    async with streaming(llama, "smollm2", max_tokens=1500, ignore_eos=True, temperature=0) as stream:
        assert stream.headers["content-type"] == "text/event-stream"
        for _ in range(3):
            stream.events.clear()
            await stream.until_text()
            assert await busy_slots() == 1, "the answer came in a lump"

    async def rested() -> bool:
        return await busy_slots() == 0

    await until(rested, what="the end of the answer that nobody wants any more")


async def test_a_streamed_answer_says_what_the_whole_one_says(llama: Proxy) -> None:
    fields: dict[str, object] = {"max_tokens": 12, "temperature": 0, "seed": 1}
    whole = (await chat(llama, "smollm2", **fields)).json()["choices"][0]["message"]["content"]
    streamed = await chat(llama, "smollm2", stream=True, **fields)
    assert text_of(events_of(streamed.body)) == whole


# -- every endpoint ----------------------------------------------------------------------------------------------------

POSTS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": MESSAGES, "max_tokens": 3}, "choices"),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3}, "choices"),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}, "output"),
    ("/v1/responses/input_tokens", {"input": "Hi"}, "input_tokens"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}, "content"),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}, "input_tokens"),
    ("/completion", {"prompt": "Once", "n_predict": 3}, "content"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}, "content"),
    ("/tokenize", {"content": "abc"}, "tokens"),
    ("/detokenize", {"tokens": [80, 81]}, "content"),
    ("/apply-template", {"messages": MESSAGES}, "prompt"),
]


@pytest.mark.parametrize("slash", ["", "/"], ids=["plain", "slash"])
@pytest.mark.parametrize(("path", "body", "key"), POSTS, ids=[path for path, _, _ in POSTS])
async def test_an_endpoint_answers_with_and_without_a_trailing_slash(
    llama: Proxy, path: str, body: dict[str, Any], key: str, slash: str
) -> None:
    answer = await raw_client.post(llama.port, path + slash, {"model": "tiny", **body})
    assert answer.status == 200, answer.body
    assert answer.json()[key]


@pytest.mark.parametrize(("path", "body", "key"), POSTS, ids=[path for path, _, _ in POSTS])
async def test_the_model_may_be_named_in_the_query(llama: Proxy, path: str, body: dict[str, Any], key: str) -> None:
    answer = await raw_client.post(llama.port, f"{path}?model=tiny", body)
    assert answer.status == 200, answer.body
    assert answer.json()[key]


@pytest.mark.parametrize("path", ["/props", "/props/", "/slots", "/slots/", "/lora-adapters"])
async def test_a_question_to_a_server_names_the_model_in_the_query(llama: Proxy, path: str) -> None:
    answer = await raw_client.get(llama.port, f"{path}?model=tiny")
    assert answer.status == 200, answer.body
    if path.startswith("/props"):
        assert answer.json()["total_slots"] == 4
    if path.startswith("/slots"):
        assert [slot["id"] for slot in answer.json()] == [0, 1, 2, 3]
    nameless = await raw_client.get(llama.port, path)
    if path.startswith("/props"):
        assert nameless.status == 200 and nameless.json()["role"] == "router"
    else:
        assert nameless.status == 400 and nameless.error["param"] == "model"


STREAMS: list[tuple[str, dict[str, Any], bytes]] = [
    (CHAT, {"messages": MESSAGES, "max_tokens": 3}, b"data: [DONE]"),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3}, b"data: [DONE]"),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}, b"event: response.incomplete"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}, b"event: message_stop"),
    ("/completion", {"prompt": "Once", "n_predict": 3}, b"data: {"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}, b"data: {"),
]


@pytest.mark.parametrize(("path", "body", "last"), STREAMS, ids=[path for path, _, _ in STREAMS])
async def test_a_stream_ends_as_its_api_ends_it_and_tells_of_no_error(
    llama: Proxy, path: str, body: dict[str, Any], last: bytes
) -> None:
    answer = await raw_client.post(llama.port, path, {"model": "tiny", "stream": True, "ignore_eos": True, **body})
    *events, end, rest = answer.body.split(b"\n\n")
    assert answer.status == 200 and len(events) >= 3 and rest == b""
    assert end.startswith(last)
    assert b"error" not in answer.body.replace(b'"error":null', b"")


async def test_an_embedding_has_as_many_numbers_as_the_model_is_wide(llama: Proxy) -> None:
    answer = await raw_client.post(llama.port, "/v1/embeddings", {"model": "embed", "input": ["one", "two"]})
    first, second = (item["embedding"] for item in answer.json()["data"])
    assert len(first) == len(second) == 64 and first != second


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/rerank/", "/rerank", "/v1/reranking", "/reranking"])
async def test_documents_are_ranked(llama: Proxy, path: str) -> None:
    body = {"model": "rank", "query": "a", "documents": ["b", "c", "d"]}
    answer = await raw_client.post(llama.port, path, body)
    assert sorted(item["index"] for item in answer.json()["results"]) == [0, 1, 2]


# -- what passes through untouched -------------------------------------------------------------------------------------


async def test_extras_of_llama_cpp_survive_in_both_directions(llama: Proxy) -> None:
    fields = {"max_tokens": 3, "return_progress": True, "timings_per_token": True, "id_slot": 2, "ignore_eos": True}
    events = events_of((await chat(llama, "tiny", stream=True, **fields)).body)
    values = [json.loads(event) for event in events if event != DONE]
    assert any("prompt_progress" in value for value in values)
    assert all("timings" in value for value in values if text_of([json.dumps(value).encode()]))
    body = {"model": "tiny", "prompt": "Once", "n_predict": 2, "id_slot": 2, "cache_prompt": False}
    native = (await raw_client.post(llama.port, "/completion", body)).json()
    assert native["id_slot"] == 2 and native["timings"]["cache_n"] == 0


async def test_an_error_of_the_server_passes_as_it_is(llama: Proxy) -> None:
    answer = await raw_client.post(llama.port, "/v1/rerank", {"model": "tiny", "query": "x", "documents": ["x"]})
    assert answer.status == 501
    assert answer.error["type"] == "not_supported_error" and "--reranking" in answer.error["message"]
    too_long = await raw_client.post(llama.port, "/completion", {"model": "tiny", "prompt": "x" * 3000})
    assert too_long.status == 400 and too_long.error["type"] == "exceed_context_size_error"


async def test_an_alias_and_another_case_reach_the_model_under_its_own_name(llama: Proxy) -> None:
    for name in ("tiny:latest-alias", "TINY", "tiny:latest"):
        answer = await chat(llama, name, max_tokens=2)
        assert answer.status == 200 and answer.json()["model"] == "tiny"


# -- the official client -----------------------------------------------------------------------------------------------

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


async def test_the_openai_client_chats(client: openai.AsyncOpenAI) -> None:
    done = await client.chat.completions.create(model="smollm2", messages=HELLO, max_tokens=8)
    assert done.choices[0].message.content
    assert done.usage is not None and done.usage.completion_tokens > 0


async def test_the_openai_client_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="smollm2", messages=HELLO, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 1
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 1


async def test_the_openai_client_completes_embeds_and_responds(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model="tiny", prompt="Once", max_tokens=3)
    assert completion.choices[0].text
    embedding = await client.embeddings.create(model="embed", input="hello")  # the client asks for base64
    assert len(embedding.data[0].embedding) == 64
    response = await client.responses.create(model="tiny", input="Hello", max_output_tokens=16)
    assert response.output_text


async def test_the_openai_client_lists_and_retrieves_models(client: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert names == ["smollm2", "tiny", "embed", "rank"]
    assert (await client.models.retrieve("tiny")).owned_by == "llama.cpp"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("org/nothing")


async def test_the_openai_client_raises_the_class_that_fits(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="known models: embed, rank, smollm2, tiny") as unknown:
        await client.chat.completions.create(model="nothing", messages=HELLO)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="tiny", messages=cast(Any, "no list"))
    with pytest.raises(openai.NotFoundError, match="no such endpoint"):
        await client.images.generate(model="tiny", prompt="a house")
    with pytest.raises(openai.BadRequestError, match="model is required"):
        await client.chat.completions.create(model="", messages=HELLO)
