"""Filters of a model's requests, as its server gets them: in every API, relayed or not, and for virtual models."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e_support import CHAT, MESSAGES, Fakes
from tests.support.harness import Proxy, running_proxy
from tests.support.ollamas import FakeOllama, running_ollama
from tests.support.raw_client import post
from tests.support.speakers import SPEAKERS
from tests.support.toxic import Link, RawUpstream, Request, plain, raw_upstream

FILTERS = {"strip": ["top_k", "temperature"], "set": {"top_p": 0.5, "chat_template_kwargs.enable_thinking": False}}
ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]}


@dataclass
class Filtering:
    """`proxy` has models with filters on each kind of server."""

    proxy: Proxy
    fakes: Fakes
    remote: RawUpstream
    ollama: FakeOllama


@pytest.fixture
async def filtering(tmp_path: Path) -> AsyncIterator[Filtering]:
    fakes = Fakes(tmp_path)

    async def script(link: Link, asked: Request) -> None:
        await link.send(plain(json.dumps(ANSWER).encode()))

    async with raw_upstream(script) as remote, running_ollama("held") as ollama:
        models = {
            "plain": fakes.model(),
            "local": fakes.model(fields={"filters": FILTERS}),
            "hot": {"model": "local", "filters": {"set": {"temperature": 2, "top_p": 0.9}}},
            "held": {"backend": "ollama", "filters": {"strip": ["options.top_k"], "set": {"options.seed": 7}}},
            "distant:hot": {"model": "distant", "filters": {"set": {"temperature": 2}}},
        }
        config = fakes.config(models, size=3)
        config["remotes"] = {
            "up": {"url": f"http://127.0.0.1:{remote.port}", "models": ["distant"], "filters": FILTERS}
        }
        config["ollama"] = {"host": f"127.0.0.1:{ollama.port}", "pull": "never"}
        config["agents"] = ["think"]
        async with running_proxy(config) as proxy:
            yield Filtering(proxy, fakes, remote, ollama)


def body(model: str, **fields: object) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "max_tokens": 4, "temperature": 0.1, "top_k": 4, **fields}


def check(sent: dict[str, Any], **expected: object) -> None:
    """What is in a request that a server got, of the fields that the filters name; None: it is not there."""
    assert {name: sent.get(name) for name in expected} == expected
    assert "messages" in sent or "prompt" in sent


FILTERED = {"temperature": None, "top_k": None, "top_p": 0.5, "chat_template_kwargs": {"enable_thinking": False}}


async def test_a_server_gets_what_the_filters_leave(filtering: Filtering) -> None:
    proxy, fakes = filtering.proxy, filtering.fakes
    for agents in ("", "think"):
        headers = [("X-Agents", agents)]
        for stream in (False, True):
            for name, expected in (("local", FILTERED), ("hot", FILTERED | {"temperature": 2, "top_p": 0.9})):
                assert (await post(proxy.port, CHAT, body(name, stream=stream), headers=headers)).status == 200
                check(fakes.generated()[-1], **expected)
            check_plain = body("plain", stream=stream)
            assert (await post(proxy.port, CHAT, check_plain, headers=headers)).status == 200
            check(fakes.generated()[-1], temperature=0.1, top_k=4, top_p=None)


async def test_a_remote_and_an_ollama_get_it_too(filtering: Filtering) -> None:
    proxy = filtering.proxy
    for name, temperature in (("distant", None), ("up/distant", None), ("distant:hot", 2)):
        assert (await post(proxy.port, CHAT, body(name))).status == 200
        check(filtering.remote.requests[-1].json(), **FILTERED | {"temperature": temperature})
    options = {"top_k": 4, "num_predict": 4}
    for path, asked in ((CHAT, body("held")), ("/api/chat", body("held", options=options, stream=False))):
        assert (await post(proxy.port, path, asked)).status == 200
        sent = json.loads(filtering.ollama.events("request", "/api/chat")[-1]["body"])
        assert sent["options"]["seed"] == 7 and "top_k" not in sent["options"]


async def test_clients_of_every_api_are_filtered(filtering: Filtering) -> None:
    for speaker in SPEAKERS.values():
        for stream in (False, True):
            outcome = await speaker.ask(filtering.proxy.port, speaker.body("local", stream=stream))
            assert (outcome.status, outcome.error) == (200, None), speaker.name
            sent = [json.loads(event["body"]) for event in filtering.fakes.events("request") if event.get("body")]
            check(sent[-1], top_p=0.5, temperature=None)
