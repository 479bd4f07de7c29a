"""Plugins that were written for llama-smart-proxy run unchanged: found in the folder `plugins` beside the
configuration, enabled by a `config.json` of their own, with plain functions for hooks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ollama
import openai
import psutil
import pytest

from llama_smart_proxy.agents.compat.adapter import MAX_THREADS
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, PIXEL, Fakes, fakes
from tests.support.harness import Proxy, environment, running_proxy

__all__ = ["fakes"]
MARKING = """
from plugins.mark_it.signs import LEFT, RIGHT


class MarkIt:
    '''Marks both sides.'''

    def __init__(self):
        self.seen = 0

    def process_request(self, request):
        self.seen += 1
        if "messages" in request:
            request["messages"][-1]["content"] = LEFT + request["messages"][-1]["content"] + RIGHT
        else:
            request["prompt"] = LEFT + request["prompt"] + RIGHT
        return request

    def process_response(self, response):
        response["choices"][0]["message"]["content"] += " (seen)"
        return response
"""
SIGNS = "LEFT, RIGHT = '[', ']'\n"
MEASURING = """
import threading


class GPUAgent:
    def process_request(self, request):
        self.model = request["model"]
        return request

    def process_response(self, response):
        assert response["object"] == "chat.completion" and response["id"] and response["model"]
        assert threading.current_thread() is not threading.main_thread()
        response["vram_accuracy"] = {"model": self.model, "variance_gb": 0.5}
        return response
"""
EDITING = """
class Edit:
    def process_request(self, request):
        messages = [{"role": "system", "content": "Be brief."}, *request["messages"]]
        return {"messages": messages, "temperature": 0.25, "max_tokens": 7}
"""
FAILING = """
import threading


class Failing:
    def process_request(self, request):
        REQUEST
        return request

    def process_response(self, response):
        RESPONSE
        return response
"""
ENABLED: dict[str, object] = {"enabled": True, "description": "Does something.", "end_point": "/chat/completions"}
CHATS = [Way(path, stream) for path in (CHAT, "/api/chat") for stream in (True, False)]


def write_plugin(folder: Path, name: str, source: str, config: Mapping[str, object] = ENABLED) -> Path:
    place = folder / "plugins" / name
    place.mkdir(parents=True)
    (place / "agent.py").write_text(source)
    (place / "config.json").write_text(json.dumps(config))
    return place


@asynccontextmanager
async def proxy_beside(fakes: Fakes, agents: Any = ("help",), **manners: object) -> AsyncIterator[Proxy]:
    """A proxy whose configuration file is in the folder where the plugins were written."""
    config = fakes.config({"m": fakes.model(fields={"parallel": 4}, **manners)}, keep_alive=-1)
    async with running_proxy(config | {"agents": agents}, beside=fakes.folder, clean_log=False) as proxy:
        yield proxy


async def test_an_enabled_plugin_runs_when_it_is_called_in_every_api(fakes: Fakes) -> None:
    (write_plugin(fakes.folder, "mark_it", MARKING) / "signs.py").write_text(SIGNS)
    for agents in (["help"], []):
        async with proxy_beside(fakes, agents, ECHO=1) as proxy:
            for way in WAYS:
                said = await way.ask(proxy, way.body("/mark_it Hello"))
                assert (said.text, said.error) == ("[Hello] (seen)", None), way
                assert said.finish in ("stop", "end_turn"), way
                assert (await way.ask(proxy, way.body("Hello"))).text == "Hello", way
            listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
            assert listed["mark_it"]["command"] == "/mark_it"
            assert listed["mark_it"]["description"] == "Does something."


async def test_it_runs_in_every_chat_if_the_operator_has_it_so(fakes: Fakes) -> None:
    (write_plugin(fakes.folder, "mark_it", MARKING) / "signs.py").write_text(SIGNS)
    async with proxy_beside(fakes, [{"mark_it": {"always": True}}], ECHO=1) as proxy:
        for way in CHATS:
            assert (await way.ask(proxy, way.body("Hello"))).text == "[Hello] (seen)", way


async def test_official_clients_get_what_the_plugin_has_added(fakes: Fakes) -> None:
    write_plugin(fakes.folder, "gpu", MEASURING)
    messages: list[Any] = [{"role": "user", "content": "/gpu Hello"}]
    measured = {"model": "m", "variance_gb": 0.5}
    async with proxy_beside(fakes, ECHO=1) as proxy:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="-") as client:
            whole = await client.chat.completions.create(model="m", messages=messages)
            assert (whole.choices[0].message.content, whole.model_extra) == ("Hello", whole.model_extra)
            assert (whole.model_extra or {})["vram_accuracy"] == measured
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
        assert [(chunk.model_extra or {}).get("vram_accuracy") for chunk in chunks][-1] == measured
        async with ollama.AsyncClient(host=proxy.url, verify=False) as other:
            answer = await other.chat(model="m", messages=messages)
            assert answer.message.content == "Hello"
        for stream_it in (True, False):
            body = {"model": "m", "messages": messages, "stream": stream_it}
            last = (await raw_client.post(proxy.port, "/api/chat", body)).body.strip().splitlines()[-1]
            assert json.loads(last)["vram_accuracy"] == measured


@pytest.mark.parametrize("way", CHATS, ids=lambda way: way.name)
async def test_edits_of_a_request_reach_the_model(fakes: Fakes, way: Way) -> None:
    write_plugin(fakes.folder, "edit", EDITING)
    async with proxy_beside(fakes) as proxy:
        said = await way.ask(proxy, way.body("/edit Hello", options={"top_k": 3}))
        assert said.error is None
        (asked,) = fakes.generated()
        assert [message["content"] for message in asked["messages"]] == ["Be brief.", "Hello"]
        assert (asked["temperature"], asked["max_tokens"], asked.get("top_k")) == (0.25, 7, None)


async def test_what_it_does_not_touch_stays_as_the_client_sent_it(fakes: Fakes) -> None:
    write_plugin(fakes.folder, "failing", FAILING.replace("REQUEST", "pass").replace("RESPONSE", "pass"))
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    parts = [{"type": "text", "text": "/failing What is this?"}, picture]
    chat = {"model": "m", "messages": [{"role": "user", "content": parts}], "logit_bias": {"5": -1}, "top_k": 3}
    async with proxy_beside(fakes) as proxy:
        for agents in (True, False):
            assert (await raw_client.post(proxy.port, CHAT, chat | {"agents": agents})).status == 200
    called, plain = fakes.generated()
    plain["messages"][0]["content"][0]["text"] = "What is this?"
    for either in (called, plain):
        either.pop("agents", None)
        either.pop("stream", None)
        either.pop("stream_options", None)
    assert called == plain


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('secret')", "failed: RuntimeError"),
        ("raise StopIteration", "failed: RuntimeError"),
        ("raise SystemExit(3)", "failed: SystemExit"),
        ("return 7", "failed: TypeError"),
        ("threading.Event().wait()", "did not go on within 0.2 s"),
    ],
    ids=["raises", "stops", "exits", "nonsense", "hangs"],
)
async def test_its_failure_is_an_error_that_names_it(fakes: Fakes, code: str, words: str) -> None:
    names = ("before", "after")
    for name, hook in zip(names, ("REQUEST", "RESPONSE"), strict=True):
        source = FAILING.replace(hook, code).replace("REQUEST", "pass").replace("RESPONSE", "pass")
        write_plugin(fakes.folder, name, source)
    limits = {"timeout_s": 0.2 if "within" in words else 60}
    async with proxy_beside(fakes, [{name: limits} for name in names]) as proxy:
        for way in CHATS:
            for name in names:
                said = await way.ask(proxy, way.body(f"/{name} Hello"))
                assert (said.text, said.error) == ("", f"agent {name} {words}"), way
            assert (await way.ask(proxy, way.body("Hello"))).error is None


async def test_threads_that_hang_take_no_more_than_their_places(fakes: Fakes) -> None:
    source = FAILING.replace("REQUEST", "threading.Event().wait()").replace("RESPONSE", "pass")
    write_plugin(fakes.folder, "failing", source)
    way, calls = CHATS[0], 2 * MAX_THREADS
    async with proxy_beside(fakes, [{"failing": {"timeout_s": 0.02}}], ECHO=1) as proxy:
        before = psutil.Process(proxy.pid).num_threads()
        for _ in range(calls):
            said = await way.ask(proxy, way.body("/failing Hello"))
            assert said.error == "agent failing did not go on within 0.02 s"
        assert psutil.Process(proxy.pid).num_threads() < before + calls
        assert (await way.ask(proxy, way.body("Hello"))).text == "Hello"


async def test_one_that_is_to_be_skipped_changes_nothing_when_it_fails(fakes: Fakes) -> None:
    source = FAILING.replace("REQUEST", "request.clear(); raise RuntimeError").replace("RESPONSE", "pass")
    write_plugin(fakes.folder, "failing", source)
    async with proxy_beside(fakes, [{"failing": {"on_error": "skip"}}], ECHO=1) as proxy:
        for way in CHATS:
            said = await way.ask(proxy, way.body("/failing Hello"))
            assert (said.text, said.error) == ("Hello", None), way


def test_only_enabled_plugins_with_a_config_json_are_found(tmp_path: Path) -> None:
    idle = "class Idle:\n    def process_request(self, request):\n        return request\n"
    write_plugin(tmp_path, "on", idle)
    write_plugin(tmp_path, "off", idle, {"enabled": False})
    write_plugin(tmp_path, "unsaid", idle, {"description": "It does not say."})
    write_plugin(tmp_path, "_part", idle)
    (tmp_path / "plugins" / "on" / "config.json").write_text('\ufeff{"enabled": true}', encoding="utf-8")
    (tmp_path / "plugins" / "helper.py").write_text("x = 1\n")
    (write_plugin(tmp_path, "garbled", idle) / "config.json").write_text("{enabled}")
    (write_plugin(tmp_path, "plain", idle) / "config.json").unlink()
    config = tmp_path / "config.yaml"
    argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(config)]

    def checked(agents: str) -> tuple[int, str]:
        config.write_text(f"agents: {agents}\n")
        done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
        return done.returncode, done.stderr

    status, told = checked("[on, garbled]")
    assert status == 0 and told.startswith("warning: agents: garbled cannot be loaded: config.json cannot be read: ")
    assert told.count("\n") == 1
    for name in ("off", "unsaid"):
        place = tmp_path / "plugins" / name / "config.json"
        assert checked(f"[{name}]") == (2, f"{config}: agents.0: the agent {name} is not enabled in {place}\n")
    for name in ("plain", "helper", "part", "_part"):
        status, told = checked(f"[{name}]")
        assert status == 2 and f"unknown agent {name}; known agents: " in told and "garbled, help, on" in told
