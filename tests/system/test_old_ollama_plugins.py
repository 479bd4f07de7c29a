"""Plugins that were written for ollama-smart-proxy run unchanged: in every API, streamed or whole."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import ollama
import openai
import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, PIXEL, Fakes, fakes
from tests.support.harness import Proxy, running_proxy

__all__ = ["fakes"]
AS_DOCUMENTED = '''
from src.shared.base_agent import BaseAgent

class MyAgent(BaseAgent):
    """Marks both sides."""
    @property
    def name(self) -> str:
        return "myagent"

    async def on_request(self, context):
        if "messages" in context:
            context["messages"][-1]["content"] = f"[{context['messages'][-1]['content']}]"
        else:
            context["prompt"] = f"[{context['prompt']}]"
        return context

    async def on_response(self, context):
        if "message" in context:
            context["message"]["content"] += " (seen)"
        else:
            context["response"] += " (seen)"
        return context
'''
NOTING = """
import json
from typing import Any, Dict
from pathlib import Path
from shared.base_agent import BaseAgent

class Noting(BaseAgent):
    name = "note"

    def note(self, **what):
        with open(Path(__file__).with_name("notes"), "a") as file:
            file.write(json.dumps(what, default=str) + "\\n")

    async def on_request(self, request: Dict[str, Any]) -> Dict[str, Any]:
        self.note(request=request)
        request["_mine"] = self
        return request

    async def on_response(self, request: Dict[str, Any], response: Dict[str, Any]) -> Dict[str, Any]:
        self.note(kept=request["_mine"] is self, response=response)
        return response
"""
EDITING = """
from src.shared.base_agent import BaseAgent

class Editing(BaseAgent):
    name = "edit"

    async def on_request(self, request):
        request = dict(request)
        request["messages"] = [{"role": "system", "content": "Be brief."}] + request["messages"]
        request["options"] = {**request["options"], "temperature": 0.25, "num_predict": 7, "num_ctx": 4096}
        request["format"] = "json"
        request["documents"] = ["a note of the plugin's own"]
        return request

    async def on_response(self, request, response):
        return response
"""
ANSWERING = """
from src.shared.base_agent import BaseAgent

class Answering(BaseAgent):
    name = "answer"

    async def on_request(self, context):
        answer = ANSWER
        return answer if WHOLE else {**context, **answer}

    async def on_response(self, request, response):
        return response
"""
FAILING = """
import asyncio
from src.shared.base_agent import BaseAgent

class Failing(BaseAgent):
    name = "failing"

    async def on_request(self, request):
        REQUEST
        return request

    async def on_response(self, request, response):
        RESPONSE
        return response
"""
CHATS = [Way(path, stream) for path in (CHAT, "/api/chat") for stream in (True, False)]


@asynccontextmanager
async def proxy_with(
    fakes: Fakes, plugins: Mapping[str, str], entries: list[Any] | None = None, **manners: object
) -> AsyncIterator[Proxy]:
    """A proxy that finds these plugins where the variable says, and has a list of agents that does not name them unless
    `entries` does."""
    folder = fakes.folder / "src" / "plugins"
    for name, source in plugins.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "agent.py").write_text(source)
    config = fakes.config({"m": fakes.model(fields={"parallel": 4}, **manners)}, keep_alive=-1)
    config["agents"] = entries or ["help", "example"]
    env = {"OLLAMA_PROXY_PLUGINS_DIR": str(folder)}
    async with running_proxy(config, env=env, clean_log="FAILING" not in str(plugins) and not entries) as proxy:
        yield proxy


async def test_the_documented_plugin_runs_when_it_is_called_in_every_api(fakes: Fakes) -> None:
    async with proxy_with(fakes, {"my_agent": AS_DOCUMENTED}, ECHO=1) as proxy:
        for way in WAYS:
            said = await way.ask(proxy, way.body("/myagent Hello world"))
            assert (said.text, said.error) == ("[Hello world] (seen)", None), way
            assert said.finish in ("stop", "end_turn"), way
            assert (await way.ask(proxy, way.body("Hello world"))).text == "Hello world", way
        listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert listed["my_agent"]["command"] == "/myagent"
        assert listed["my_agent"]["description"] == "Marks both sides."
        told = await WAYS[0].ask(proxy, WAYS[0].body("/help"))
        assert "`/myagent` Marks both sides." in told.text


async def test_official_clients_get_what_the_plugin_made_of_it(fakes: Fakes) -> None:
    messages: list[Any] = [{"role": "user", "content": "/myagent Hello"}]
    async with proxy_with(fakes, {"my_agent": AS_DOCUMENTED}, ECHO=1) as proxy:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="-") as client:
            whole = await client.chat.completions.create(model="m", messages=messages)
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert whole.choices[0].message.content == "".join(pieces) == "[Hello] (seen)"
        async with ollama.AsyncClient(host=proxy.url, verify=False) as other:
            answer = await other.chat(model="m", messages=messages)
            parts = [part.message.content or "" async for part in await other.chat("m", messages, stream=True)]
        assert answer.message.content == "".join(parts) == "[Hello] (seen)"


async def test_hooks_get_the_request_and_the_answer_as_ollama_has_them(fakes: Fakes) -> None:
    async with proxy_with(fakes, {"noting": NOTING}, ANSWER="so it is") as proxy:
        for path, question in (("/api/chat", "messages"), ("/api/generate", "prompt"), (CHAT, "messages")):
            (fakes.folder / "src" / "plugins" / "noting" / "notes").unlink(missing_ok=True)
            way = Way(path, stream=False)
            fields = {"options": {"temperature": 0.5, "num_ctx": 2048}} if path != CHAT else {"temperature": 0.5}
            assert (await way.ask(proxy, way.body("/note Hello", **fields))).text == "so it is"
            lines = (fakes.folder / "src" / "plugins" / "noting" / "notes").read_text().splitlines()
            request, after = (json.loads(line) for line in lines)
            shown = request["request"]
            assert shown["model"] == "m" and shown["stream"] is False
            assert shown[question] == ("Hello" if question == "prompt" else [{"role": "user", "content": "Hello"}])
            assert shown["options"] == ({"temperature": 0.5, "num_ctx": 2048} if path != CHAT else {"temperature": 0.5})
            assert after["kept"] is True, "what on_request left in the request is there"
            answer = after["response"]
            said = answer["response"] if question == "prompt" else answer["message"]["content"]
            assert said == answer["choices"][0]["message"]["content"] == "so it is"
            assert (answer["done"], answer["done_reason"], answer["model"]) == (True, "stop", "m")
            assert answer["eval_count"] > 0 and answer["prompt_eval_count"] > 0


@pytest.mark.parametrize("way", CHATS, ids=lambda way: way.name)
async def test_edits_of_a_request_reach_the_model(fakes: Fakes, way: Way) -> None:
    async with proxy_with(fakes, {"edit": EDITING}) as proxy:
        assert (await way.ask(proxy, way.body("/edit Hello"))).error is None
        (asked,) = fakes.generated()
        assert [message["content"] for message in asked["messages"]] == ["Be brief.", "Hello"]
        assert (asked["temperature"], asked["max_tokens"]) == (0.25, 7)
        assert asked["response_format"] == {"type": "json_object"}
        assert not {"documents", "options", "format"} & asked.keys(), "no server gets what it does not know"


async def test_images_stay_with_their_message(fakes: Fakes) -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    parts = [{"type": "text", "text": "/myagent What is this?"}, picture]
    async with proxy_with(fakes, {"my_agent": AS_DOCUMENTED}) as proxy:
        chat = {"model": "m", "messages": [{"role": "user", "content": parts}]}
        assert (await raw_client.post(proxy.port, CHAT, chat)).status == 200
        chat = {"model": "m", "messages": [{"role": "user", "content": "/myagent What is this?", "images": [PIXEL]}]}
        assert (await raw_client.post(proxy.port, "/api/chat", {**chat, "stream": False})).status == 200
        for asked in fakes.generated():
            assert asked["messages"][-1]["content"] == [{"type": "text", "text": "[What is this?]"}, picture]


@pytest.mark.parametrize(
    "answer",
    [
        {"message": {"role": "assistant", "content": "mine"}, "done": True},
        {"response": "mine", "done": True},
        {"choices": [{"message": {"role": "assistant", "content": "mine"}, "finish_reason": "stop"}]},
        {"message": "mine"},
    ],
    ids=["message", "response", "choices", "text"],
)
@pytest.mark.parametrize("whole", [True, False], ids=["new", "added"])
async def test_a_context_that_gains_an_answer_needs_no_model(fakes: Fakes, answer: dict[str, Any], whole: bool) -> None:
    source = ANSWERING.replace("ANSWER", repr(answer)).replace("WHOLE", repr(whole))
    async with proxy_with(fakes, {"answer": source}) as proxy:
        for way in WAYS:
            said = await way.ask(proxy, way.body("/answer Hello"))
            assert (said.text, said.error) == ("mine", None), way
        assert fakes.events("request") == []


async def test_an_answer_that_is_not_changed_leaves_as_it_came(fakes: Fakes) -> None:
    async with proxy_with(fakes, {"noting": NOTING}) as proxy:
        for path in (CHAT, "/v1/messages"):
            way = Way(path, stream=True)
            manners: dict[str, Any] = {"tokens": 2, "tool_call": ["f", {"a": 1}]}
            relayed = await raw_client.post(proxy.port, path, way.steered(**manners))
            passed = await raw_client.post(proxy.port, path, way.steered("/note", **manners))
            assert passed.status == relayed.status == 200
            assert passed.body.split(b'"timings"')[0] == relayed.body.split(b'"timings"')[0], path
            assert b"call_fake" in passed.body


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('secret')", "failed: RuntimeError"),
        ("return 7", "failed: TypeError"),
        ("await asyncio.Event().wait()", "did not go on within 0.2 s"),
    ],
    ids=["raises", "nonsense", "hangs"],
)
async def test_its_failure_is_an_error_that_names_it(fakes: Fakes, code: str, words: str) -> None:
    sources = {
        name: FAILING.replace('"failing"', repr(name)).replace(hook, code).replace(other, "pass")
        for name, hook, other in (("before", "REQUEST", "RESPONSE"), ("after", "RESPONSE", "REQUEST"))
    }
    limits = {"timeout_s": 0.2 if "within" in words else 60}
    async with proxy_with(fakes, sources, [{name: limits} for name in sources]) as proxy:
        for way in CHATS:
            for name in sources:
                said = await way.ask(proxy, way.body(f"/{name} Hello"))
                assert (said.text, said.error) == ("", f"agent {name} {words}"), way
            assert (await way.ask(proxy, way.body("Hello"))).error is None


@pytest.mark.parametrize("hook", ["REQUEST", "RESPONSE"])
async def test_one_that_is_to_be_skipped_changes_nothing_when_it_fails(fakes: Fakes, hook: str) -> None:
    code = "request.clear(); raise RuntimeError" if hook == "REQUEST" else "response.clear(); raise RuntimeError"
    source = FAILING.replace(hook, code).replace("REQUEST", "pass").replace("RESPONSE", "pass")
    async with proxy_with(fakes, {"failing": source}, [{"failing": {"on_error": "skip"}}], ECHO=1) as proxy:
        for way in CHATS:
            said = await way.ask(proxy, way.body("/failing Hello"))
            assert (said.text, said.error) == ("Hello", None), way


async def test_it_goes_before_a_shipped_agent_with_the_same_command(fakes: Fakes) -> None:
    source = AS_DOCUMENTED.replace('"myagent"', '"example"')
    async with proxy_with(fakes, {"example_agent": source}, ECHO=1) as proxy:
        assert (await WAYS[0].ask(proxy, WAYS[0].body("/example Hello"))).text == "[Hello] (seen)"
        names = [item["name"] for item in (await raw_client.get(proxy.port, "/plugins")).json()]
        assert sorted(names) == ["example_agent", "help"]


async def test_a_plugin_that_cannot_be_used_is_reported_and_the_rest_serve(fakes: Fakes) -> None:
    nameless = AS_DOCUMENTED.replace("def name", "def title")
    needy = AS_DOCUMENTED.replace("class MyAgent", "from src.shared.config import Config\nclass MyAgent")
    async with proxy_with(fakes, {"nameless": nameless, "needy": needy, "my_agent": AS_DOCUMENTED}, ECHO=1) as proxy:
        assert (await WAYS[0].ask(proxy, WAYS[0].body("/myagent Hello"))).text == "[Hello] (seen)"
        listed = {item["name"]: item.get("error", "") for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert listed["nameless"] == "MyAgent has no name, which is the command that it is called by"
        assert "ModuleNotFoundError: No module named 'src.shared.config'" in listed["needy"]
        assert (await proxy.health())["status"] == "degraded"


async def test_a_saved_plugin_is_loaded_anew(fakes: Fakes) -> None:
    folder = fakes.folder / "old" / "my_agent"
    folder.mkdir(parents=True)
    (folder / "agent.py").write_text(AS_DOCUMENTED)
    config = fakes.config({"m": fakes.model(ECHO=1)}) | {"plugins_dir": str(folder.parent)}
    async with running_proxy(config, args=["--reload"]) as proxy:
        assert (await WAYS[0].ask(proxy, WAYS[0].body("/myagent Hello"))).text == "[Hello] (seen)"
        (folder / "agent.py").write_text(AS_DOCUMENTED.replace("(seen)", "(seen again)"))
        assert (await WAYS[0].ask(proxy, WAYS[0].body("/myagent Hello"))).text == "[Hello] (seen again)"
