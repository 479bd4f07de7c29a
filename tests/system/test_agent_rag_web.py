"""The agent `rag` and the web: when that is searched, what is done without it, and that all ends with the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support import raw_client
from tests.support.agent_clients import Way
from tests.support.documents import with_documents
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, free_port, session_proxy, until
from tests.support.toxic import Link, RawUpstream, Request, plain, raw_upstream

WHOLE, STREAM = Way(CHAT, stream=False), Way(CHAT, stream=True)
KIWI = "Are kiwis birds of New Zealand?"
RESULT = {"url": "http://kiwi.example/", "title": "Kiwis", "content": "Kiwis are flightless birds of New Zealand."}
OTHER = {"url": "http://other.example/", "title": "Other", "content": "Nothing of that."}


def results(*found: dict[str, str]) -> bytes:
    return plain(json.dumps({"results": list(found)}).encode())


@dataclass(frozen=True)
class Stage:
    """The model `m`, a search engine at `engine`, and no documents."""

    proxy: Proxy
    fakes: Fakes
    engine: RawUpstream

    def sent(self) -> dict[str, Any]:
        """The last chat that a model got."""
        return self.fakes.generated()[-1]

    @property
    def queries(self) -> list[str]:
        """The queries that the search engine got."""
        return [parse_qs(urlsplit(request.line.split()[1]).query)["q"][0] for request in self.engine.requests]

    async def asked(self, text: str, **fields: Any) -> dict[str, Any]:
        """The whole answer to a chat."""
        answer = await raw_client.post(self.proxy.port, CHAT, WHOLE.body(text, **fields))
        assert answer.status == 200, answer.body
        return dict(answer.json())


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes, int]]:
    fakes, port = Fakes(tmp_path_factory.mktemp("web")), free_port()
    models = {
        "m": fakes.model(fields={"parallel": 4}, IF=json.dumps([["search query", "kiwi taxonomy"]])),
        "mute": fakes.model(fields={"parallel": 4}, WEDGED=str(fakes.folder / "log-of-models")),
        "needs": {"model": "m", "agents": [{"rag": {"required": True}}]},
        "grades": {"model": "m", "agents": [{"rag": {"grader": "llm", "grader_model": "mute"}}]},
        "rephrases": {"model": "m", "agents": [{"rag": {"rewrite_model": "m"}}]},
        "rewrites": {"model": "m", "agents": [{"rag": {"rewrite_model": "mute"}}]},
    }
    (fakes.folder / "log-of-models").touch()
    options = {
        "searxng_host": f"http://127.0.0.1:{port}",
        "web_pages": 0,
        "cache_ttl": 0,
        "circuit_breaker_failures": 99,
    }
    options |= {"searxng_safesearch": 2}
    for name in ("needs", "grades", "rephrases", "rewrites"):
        models[name]["agents"][0]["rag"] |= options
    with session_proxy(with_documents(fakes, models, agents=["parallel", {"rag": options}])) as proxy:
        yield proxy, fakes, port


@pytest.fixture
async def web(searching: tuple[Proxy, Fakes, int]) -> AsyncIterator[Stage]:
    proxy, fakes, port = searching
    async with raw_upstream(results(RESULT, OTHER), port=port) as engine:
        yield Stage(proxy, fakes, engine)


async def test_what_no_document_answers_is_answered_from_the_web(web: Stage) -> None:
    answer = await web.asked(f"/rag {KIWI}")
    (source,) = answer["x_sources"]
    assert (source["title"], source["url"]) == ("Kiwis", RESULT["url"])
    assert RESULT["content"] in web.sent()["messages"][0]["content"] and web.queries == [KIWI]
    assert answer["choices"][0]["message"]["content"].endswith("- [1] Kiwis (http://kiwi.example/)")


async def test_a_page_about_something_else_leads_to_another_query(web: Stage) -> None:
    web.engine.script = results(OTHER)
    answer = await web.asked(f"/rag trace=on {KIWI}")
    assert web.queries == [KIWI, "kiwi taxonomy"], "made by the chat's own model, as a second round needs it"
    assert answer["x_sources"] == [] and answer["x_rag"]["rounds"] == 2
    assert web.sent()["messages"] == [{"role": "user", "content": KIWI}]
    assert "another query, by a model" in answer["choices"][0]["message"]["reasoning_content"]


async def test_a_question_that_follows_on_is_rephrased_by_the_configured_model(web: Stage) -> None:
    chat = [
        {"role": "user", "content": KIWI},
        {"role": "assistant", "content": "They are."},
        {"role": "user", "content": "and of Australia?"},
    ]
    await raw_client.post(web.proxy.port, CHAT, {"model": "rephrases", "messages": chat})
    assert web.queries == ["kiwi taxonomy"]
    asked = web.fakes.generated()[-2]["messages"][0]["content"]
    assert f"user: {KIWI}\nassistant: They are.\nuser: and of Australia?" in asked
    web.engine.requests.clear()
    await raw_client.post(web.proxy.port, CHAT, {"model": "needs", "messages": chat})
    assert web.queries == [f"{KIWI} and of Australia?"], "by a rule, without a model"


async def test_open_webui_shows_the_sources_as_its_own(web: Stage) -> None:
    body, headers = STREAM.body(f"/rag {KIWI}"), [("User-Agent", "Open WebUI")]
    answer = await raw_client.post(web.proxy.port, CHAT, body, headers=headers)
    events = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
    (source,) = [event["event"]["data"] for event in events if event.get("event", {}).get("type") == "source"]
    assert source["source"] == {"name": "Kiwis", "url": RESULT["url"]} and source["document"] == [RESULT["content"]]
    assert "event" in events[0], "before the answer, so that [1] is known when it comes"


async def test_without_the_web_it_says_so_and_searches_for_nothing(web: Stage) -> None:
    answer = await web.asked(f"/rag web=off {KIWI}")
    assert web.queries == [] and web.sent()["messages"] == [{"role": "user", "content": KIWI}]
    assert answer["x_rag"]["reasons"] == ["there is no collection with documents", "the web is switched off"]


async def test_options_that_do_not_fit_together_are_refused_by_their_command(web: Stage) -> None:
    said = await WHOLE.ask(web.proxy, WHOLE.body(f"/rag grader=rerank {KIWI}"))
    assert said.status == 400 and "options of /rag: grader: rerank requires grader_model" in (said.error or "")


async def test_a_search_engine_that_fails_leaves_an_answer_that_says_so(web: Stage) -> None:
    web.engine.script = plain(b"{}", 500)
    answer = await web.asked(f"/rag {KIWI}")
    assert web.sent()["messages"] == [{"role": "user", "content": KIWI}]
    assert any("the web cannot be searched" in reason for reason in answer["x_rag"]["reasons"])
    said = await WHOLE.ask(web.proxy, WHOLE.body(KIWI, model="needs"))
    assert said.status == 503 and "the web cannot be searched" in (said.error or "")


@pytest.mark.parametrize("way", [STREAM, WHOLE], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", ["web", "grades", "rewrites", "answer"])
async def test_everything_ends_with_the_client(web: Stage, phase: str, way: Way) -> None:
    hanging: list[Link] = []

    async def silent(link: Link, request: Request) -> None:
        hanging.append(link)
        await link.gone()

    async def running() -> list[Any]:
        return list((await raw_client.get(web.proxy.port, "/running")).json()["requests"])

    closed, asked = len(web.fakes.events("closed")), len(web.fakes.generated())
    if phase == "web":
        web.engine.script = silent
    elif phase == "rewrites":
        web.engine.script = results(OTHER)
    stalls = {"fake": {"stall_after": 1}} if phase == "answer" else {}
    body = way.body(KIWI, model={"web": "needs", "answer": "m"}.get(phase, phase), **stalls)
    async with raw_client.connected(web.proxy.port) as client:
        await client.send(raw_client.request("POST", CHAT, body, headers=[("X-Agents", "rag")]))
        await until(lambda: bool(hanging) if phase == "web" else len(web.fakes.generated()) > asked)
        client.leave()
    if phase != "web":
        await until(lambda: len(web.fakes.events("closed")) > closed, what="the model's server is left")

    async def over() -> bool:
        return await running() == []

    await until(over, what="nothing of the request runs any more")
    assert web.engine.open_links == 0 or phase != "web"
