"""What cannot be said to an Ollama or in its API: half characters, tools of another shape, names that forge a log."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.harness import until
from tests.support.ollama_calls import ABOUT, ASKING, V1, Eager, ask, body_of, both_backends, eager, refused
from tests.support.stages import Stage

__all__ = ["eager"]  # a fixture
LONE = "\ud800"
LONE_MESSAGES = [{"role": "user", "content": LONE}]
TEXTS: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": LONE_MESSAGES},
    "/api/generate": {"prompt": LONE, "system": LONE},
    "/api/embed": {"input": LONE},
    "/api/embeddings": {"prompt": LONE},
    "/v1/chat/completions": {"messages": LONE_MESSAGES},
    "/v1/completions": {"prompt": LONE},
    "/v1/messages": {"messages": LONE_MESSAGES, "system": LONE},
    "/v1/embeddings": {"input": LONE},
}


@both_backends
@pytest.mark.parametrize("path", TEXTS)
async def test_half_a_character_in_a_text_is_another_character(stage: Stage, path: str, model: str) -> None:
    for field, value in TEXTS[path].items():
        body = body_of(model, **{field: value})
        if field == "prompt":
            del body["messages"]  # it would be a chat
        answer = await ask(stage.proxy, path, body)
        assert answer.status == 200, (field, answer)


@pytest.mark.parametrize("path", [*ASKING, *ABOUT, *V1])
async def test_half_a_character_names_no_model(eager: Eager, path: str) -> None:
    pulls = len(eager.fake.events("pull"))
    answer = await ask(eager.proxy, path, body_of(LONE))
    refused(answer, path, status=404 if answer.status == 404 else 400)
    assert len(eager.fake.events("pull")) == pulls


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("tools", [5, "x", {"function": {"name": "f"}}, ["x"], [TOOL, None]])
async def test_tools_of_another_shape_are_refused_over_an_ollama(stage: Stage, tools: object) -> None:
    for choice in ("auto", {"type": "function", "function": {"name": "f"}}):
        body = body_of("distant", tools=tools, tool_choice=choice)
        assert "tools" in refused(await ask(stage.proxy, V1[0], body), V1[0])


@pytest.mark.parametrize("choice", [5, ["f"], {"function": "f"}, {"function": {"name": 5}}, {"function": ["f"]}])
async def test_a_tool_choice_of_another_shape_is_refused_over_an_ollama(stage: Stage, choice: object) -> None:
    refused(await ask(stage.proxy, V1[0], body_of("distant", tools=[TOOL], tool_choice=choice)), V1[0])


FORGED = "2026-01-01 00:00:00,000 INFO    proxy.access: forged"


@pytest.mark.parametrize("end", ["\n", "\r", "\u2028", "\x85", "\x1b[2K\r"], ids=ascii)
async def test_a_name_forges_no_line_of_the_log(eager: Eager, end: str) -> None:
    before = len(eager.proxy.log)
    for path in [*ASKING, *ABOUT, *V1, "/models/unload", "/models/load"]:
        await ask(eager.proxy, path, body_of(f"a{end}{FORGED}"))
    await until(lambda: "POST /models/load" in eager.proxy.log[before:], what="the last line")
    log = eager.proxy.log[before:]
    assert FORGED in log, "it is shown, but within a line"
    assert not [line for line in log.splitlines() if line.startswith(FORGED)]
    assert "\x1b" not in log
