"""Sources in an answer: OpenAI's, Anthropic's and Ollama's own Python clients read them, and the answer as before."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import ollama
import pytest

from tests.contract.test_clients_anthropic import client_of as anthropic_client
from tests.contract.test_clients_ollama import client_of as ollama_client
from tests.contract.test_clients_responses import client_of as openai_client
from tests.support.e2e_support import Fakes, fakes
from tests.support.harness import Proxy, running_proxy
from tests.support.toxic import plain, raw_upstream

__all__ = ["fakes"]
QUESTION: list[Any] = [{"role": "user", "content": "/rag Are kiwis birds of New Zealand?"}]
PAGE = {"url": "http://kiwi.example/", "title": "Kiwis", "content": "Kiwis are birds of New Zealand."}
ANSWER = "They are [1]."
LISTED = f"{ANSWER}\n\n\U0001f4da Sources:\n- [1] Kiwis (http://kiwi.example/)"
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture
async def proxy(fakes: Fakes) -> AsyncIterator[Proxy]:
    """A proxy that finds one page for each question; its model cites that."""
    async with raw_upstream(plain(json.dumps({"results": [PAGE]}).encode())) as engine:
        options = {"searxng_host": f"http://127.0.0.1:{engine.port}", "web_pages": 0}
        config = fakes.config({"m": fakes.model(ANSWER=ANSWER)}) | {"agents": [{"rag": options}]}
        async with running_proxy(config) as proxy:
            yield proxy


def check(sources: Any) -> None:
    assert [(source["title"], source["url"], source["cited"]) for source in sources] == [("Kiwis", PAGE["url"], True)]


async def test_openais_chats(proxy: Proxy) -> None:
    async with openai_client(proxy.url) as client:
        whole = await client.chat.completions.create(model="m", messages=QUESTION)
        chunks = [one async for one in await client.chat.completions.create(model="m", messages=QUESTION, stream=True)]
    message = whole.choices[0].message
    assert message.content == LISTED == "".join(one.choices[0].delta.content or "" for one in chunks)
    assert message.annotations
    (note,) = message.annotations
    assert (note.url_citation.url, note.url_citation.title) == (PAGE["url"], "Kiwis")
    assert ANSWER[note.url_citation.start_index : note.url_citation.end_index] == "[1]"
    for holder in (whole, chunks[-1]):
        check((holder.model_extra or {})["x_sources"])
    assert (chunks[-1].choices[0].delta.model_extra or {})["annotations"][0]["url_citation"]["url"] == PAGE["url"]


@both_ways
async def test_openais_responses(proxy: Proxy, stream: bool) -> None:
    kinds: list[str] = []
    async with openai_client(proxy.url) as client:
        if stream:
            async with client.responses.stream(model="m", input=QUESTION) as events:
                kinds = [event.type async for event in events]
                response: Any = await events.get_final_response()
        else:
            response = await client.responses.create(model="m", input=QUESTION)
    assert response.output_text == LISTED
    (note,) = response.output[0].content[0].annotations
    assert (note.type, note.url, ANSWER[note.start_index : note.end_index]) == ("url_citation", PAGE["url"], "[1]")
    check(response.model_extra["x_sources"])
    assert kinds.count("response.output_text.annotation.added") == stream


@both_ways
async def test_anthropics_messages(proxy: Proxy, stream: bool) -> None:
    fields: Any = {"model": "m", "max_tokens": 50, "messages": QUESTION}
    async with anthropic_client(proxy) as client:
        if not stream:
            message = await client.messages.create(**fields)
            check((message.model_extra or {})["x_sources"])
        else:
            async with client.messages.stream(**fields) as events:
                (last,) = [event async for event in events if event.type == "message_delta"]
                message = await events.get_final_message()
            check((last.model_extra or {})["x_sources"])
    assert isinstance(message, anthropic.types.Message) and message.content[0].type == "text"
    assert message.content[0].text == LISTED


async def test_ollamas_chats(proxy: Proxy) -> None:
    async with ollama_client(proxy) as client:
        whole = await client.chat("m", QUESTION)
        parts = [part async for part in await client.chat("m", QUESTION, stream=True)]
    assert isinstance(whole, ollama.ChatResponse)
    assert whole.message.content == LISTED == "".join(part.message.content or "" for part in parts)
    assert parts[-1].done and parts[-1].done_reason == "stop"
