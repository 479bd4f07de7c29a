"""People before tasks, as clients of every API see it: a background prompt gives way, and is answered all the same."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.support.agent_clients import WAYS, Way
from tests.support.e2e_support import CHAT, Fakes, fakes, queued, waits
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes"]
TAGS = "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history"
ASKED = (CHAT, "/v1/messages", "/v1/completions")
WHOLE = [way for way in WAYS if not way.stream]


def sent(fakes: Fakes) -> list[str]:
    """What the model was asked, in order: `task` or `person`."""
    asked = [event["body"] for event in fakes.events("request") if event["path"] in ASKED]
    return ["task" if "### Task" in body else "person" for body in asked]


async def broken_off(fakes: Fakes, proxy: Proxy, way: Way) -> None:
    """A task is under way when a person comes, on the only slot; both are answered."""
    wedged, before, closed = fakes.folder / "wedged", len(sent(fakes)), len(fakes.events("closed"))
    await asyncio.to_thread(wedged.touch)
    task = asyncio.ensure_future(way.ask(proxy, way.body(TAGS)))
    await until(lambda: sent(fakes)[before:] == ["task"], what="the task")
    person = asyncio.ensure_future(way.ask(proxy, way.body("Hello")))
    await until(lambda: sent(fakes)[before:] == ["task", "person"], what="the person's request")
    assert not task.done()
    await asyncio.to_thread(wedged.unlink)
    answers = await asyncio.gather(task, person)
    assert answers[0] == answers[1] and answers[0].status == 200, way
    assert sent(fakes)[before:] == ["task", "person", "task"], way
    await until(lambda: len(fakes.events("closed")) == closed + 1, what="the first connection's end")


async def test_a_task_is_broken_off_and_repeated_unseen_by_its_client_in_every_api(fakes: Fakes) -> None:
    model = fakes.model(WEDGED=fakes.folder / "wedged", fields={"parallel": 1})
    async with running_proxy(fakes.config({"m": model}, keep_alive=-1)) as proxy:
        for way in WHOLE:
            await broken_off(fakes, proxy, way)
        assert "is sent again" in proxy.log
        assert (await proxy.health())["status"] == "healthy"


@pytest.mark.parametrize("way", [way for way in WHOLE if way.path in ("/v1/chat/completions", "/api/chat")])
async def test_row_19_the_first_message_of_a_chat_loads_its_model_once_and_is_answered_before_its_title(
    fakes: Fakes, way: Way
) -> None:
    """As Open WebUI asks: the title first, and tags and follow-ups together after the answer."""
    loaded, task = fakes.folder / "loaded", "### Task:\n"
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_UNTIL=loaded, fields={"parallel": 1})})) as proxy:
        limit = {"max_tokens": 1000} if way.path == CHAT else {"options": {"num_predict": 1000}}
        title = way.body(f"{task}Generate a concise, 3-5 word title with an emoji", **limit)
        first = [asyncio.ensure_future(way.ask(proxy, title))]
        await until(lambda: waits(proxy, "m", 1), what="the title")
        first.append(asyncio.ensure_future(way.ask(proxy, way.body("hi"))))
        await until(lambda: waits(proxy, "m", 2), what="the chat")
        await asyncio.to_thread(loaded.touch)
        answers = await asyncio.gather(*first)
        others = ("Generate 1-3 broad tags", "Suggest 3-5 relevant follow-up questions")
        answers += await asyncio.gather(*(way.ask(proxy, way.body(task + other)) for other in others))
    assert [answer.status for answer in answers] == [200] * 4 and len(fakes.events("start")) == 1
    assert sent(fakes) == ["person", "task", "task", "task"]
    assert [body.get("max_tokens") for body in fakes.generated()] == [None, 512, 512, 512]


async def test_tasks_may_be_treated_like_people(fakes: Fakes) -> None:
    wedged = fakes.folder / "wedged"
    model = fakes.model(WEDGED=wedged, fields={"parallel": 1})
    config = fakes.config({"m": model}, keep_alive=-1)
    config["server_pool"] |= {"tasks": "equal"}
    async with running_proxy(config) as proxy:
        await asyncio.to_thread(wedged.touch)
        way, requests = Way(CHAT, stream=False), []
        for number, text in enumerate((TAGS, "Hello", TAGS), 1):
            requests.append(asyncio.ensure_future(way.ask(proxy, way.body(text, max_tokens=1000))))
            await until(partial(_inside, fakes, proxy, number), what="the request")
        await asyncio.to_thread(wedged.unlink)
        await asyncio.gather(*requests)
    assert sent(fakes) == ["task", "person", "task"]
    assert [body["max_tokens"] for body in fakes.generated()] == [1000] * 3


async def _inside(fakes: Fakes, proxy: Proxy, number: int) -> bool:
    """Whether so many requests are at the model or wait for it."""
    return len(sent(fakes)) + await queued(proxy, "m") == number
