"""Laws of Anthropic requests: there and back without a loss, and no field of theirs among OpenAI's."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import ChatRequest, Extensions, Json, extensions_of, without_extensions
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES
from tests.support.laws import JSON_VALUES, TEXT, law, objects_in, unknown_fields

KNOWN = frozenset(
    (
        *(
            "model",
            "max_tokens",
            "messages",
            "system",
            "role",
            "content",
            "type",
            "text",
            "source",
            "media_type",
            "data",
        ),
        *("url", "id", "name", "input", "tool_use_id", "thinking", "budget_tokens", "temperature", "top_p", "top_k"),
        *("stream", "stop_sequences", "tools", "description", "input_schema", "tool_choice", "chat_template_kwargs"),
        *("disable_parallel_tool_use", "output_config", "format", "schema", "metadata", "user_id"),
    )
)
"""The fields that have a meaning somewhere; all others are unknown everywhere."""
OPENAI_ONLY = (
    *(
        "stop",
        "user",
        "response_format",
        "parallel_tool_calls",
        "thinking_budget_tokens",
        "reasoning_content",
        "_extensions",
    ),
    *("tool_calls", "tool_call_id", "function", "parameters", "arguments", "image_url", "json_schema"),
)
TOP_LEVEL = {
    *("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "stream", "stop", "tools", "tool_choice"),
    *("parallel_tool_calls", "chat_template_kwargs", "thinking_budget_tokens", "response_format", "user"),
}
MESSAGE_LEVEL = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}


def objects(fields: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(fields, optional=optional)


def block(kind: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return objects({"type": st.just(kind), **fields})


OBJECT = st.dictionaries(TEXT, JSON_VALUES, max_size=3)
TEXT_BLOCK = block("text", text=TEXT)
URLS = TEXT | st.sampled_from(["https://example.com/cat.png", "data:image/png;base64,QUJD", "data:,x"])
SOURCES = block("base64", media_type=st.sampled_from(["image/png", "image/jpeg"]), data=TEXT) | block("url", url=URLS)
PART = st.one_of(
    TEXT_BLOCK,
    block("image", source=SOURCES),
    block("document", source=block("text", media_type=st.just("text/plain"), data=TEXT)),
)
TOOL_RESULT = objects(
    {"type": st.just("tool_result"), "tool_use_id": TEXT}, content=st.none() | TEXT | st.lists(PART, max_size=3)
)
THINKING = block("thinking", thinking=TEXT, signature=TEXT) | block("redacted_thinking", data=TEXT)
TOOL_USE = block("tool_use", id=TEXT, name=TEXT, input=OBJECT)


def message(role: str, blocks: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return objects({"role": st.just(role), "content": TEXT | st.lists(blocks, max_size=5)})


MESSAGE = st.one_of(
    message("user", PART | TOOL_RESULT),
    message("assistant", PART | THINKING | TOOL_USE),
    message("system", TEXT_BLOCK),
)
PARALLEL = st.booleans() | st.none()
CHOICE = st.one_of(
    objects({"type": st.sampled_from(["auto", "any", "none"])}, disable_parallel_tool_use=PARALLEL),
    objects({"type": st.just("tool"), "name": TEXT}, disable_parallel_tool_use=PARALLEL),
)
TOOL = objects(
    {"name": TEXT, "input_schema": OBJECT}, description=TEXT | st.none(), type=st.sampled_from(["custom", None])
)
THINK = objects(
    {"type": st.sampled_from(["enabled", "disabled", "adaptive"])}, budget_tokens=st.integers(0, 9) | st.none()
)
BODY = objects(
    {"max_tokens": st.integers(0, 2**31), "messages": st.lists(MESSAGE, min_size=1, max_size=4)},
    model=TEXT,
    system=st.none() | TEXT | st.lists(TEXT_BLOCK, max_size=3),
    temperature=st.floats(0, 2) | st.none(),
    top_k=st.integers(0, 99),
    stream=st.booleans() | st.none(),
    stop_sequences=st.lists(TEXT, max_size=2) | st.none(),
    tools=st.lists(TOOL, max_size=2) | st.none(),
    tool_choice=CHOICE | st.none(),
    thinking=THINK | st.none(),
    output_config=objects({}, format=block("json_schema", schema=OBJECT) | st.none()) | st.none(),
    metadata=objects({}, user_id=TEXT | st.none()) | st.none(),
    chat_template_kwargs=OBJECT,
)


@st.composite
def bodies(draw: st.DrawFn) -> Json:
    """Requests with unknown fields at every level, also under names that mean something in OpenAI's API."""
    body = draw(unknown_fields(draw(BODY), KNOWN))
    for target in objects_in(body):
        for name in draw(st.lists(st.sampled_from(OPENAI_ONLY), max_size=2)):
            target.setdefault(name, draw(JSON_VALUES))
    return body


def decoded(body: Json) -> ChatRequest:
    return MESSAGES.decode(copy.deepcopy(body))


# -- laws --------------------------------------------------------------------------------------------------------------


@given(bodies())
@law(200)
def test_request_comes_back_as_it_was_with_fields_nobody_knows_at_every_level(body: Json) -> None:
    request = decoded(body)
    assert MESSAGES.encode(request) == body
    assert request.stream is (body.get("stream") is True)


@given(bodies())
@law(100)
def test_only_fields_of_openai_are_seen_by_others(body: Json) -> None:
    request = without_extensions(decoded(body).body)
    assert request.keys() <= TOP_LEVEL
    for told in request["messages"]:
        assert told.keys() <= MESSAGE_LEVEL
        parts = told["content"] if isinstance(told["content"], list) else []
        assert all(part.keys() in ({"type", "text"}, {"type", "image_url"}) for part in parts)
        assert all(call.keys() == {"id", "type", "function"} for call in told.get("tool_calls", ()))
    assert all(tool.keys() == {"type", "function"} for tool in request.get("tools", ()))
    assert not any(isinstance(value, Extensions) for found in objects_in(request) for value in found.values())


def edited(content: Any) -> Any:
    """The content of one message, each text of it marked."""
    if isinstance(content, str):
        return f"{content}!"
    for part in content:
        if "text" in part and part["type"] == "text":
            part["text"] += "!"
    return content


def edited_body(body: Json) -> Json:
    """What the same edit is in Anthropic's shape."""
    body = copy.deepcopy(body)
    if body.get("system"):
        body["system"] = edited(body["system"])
    for told in body["messages"]:
        inner = [told, *(told["content"] if isinstance(told["content"], list) else ())]
        for holder in inner:
            if holder.get("type") == "document":
                holder["source"]["data"] += "!"
            elif holder is told or (holder["type"] == "tool_result" and holder.get("content")):
                holder["content"] = edited(holder["content"])
                documents = holder["content"] if holder is not told and isinstance(holder["content"], list) else ()
                for found in documents:
                    if found["type"] == "document":
                        found["source"]["data"] += "!"
    return body


def is_empty(told: Json) -> bool:
    """Whether there is no text in it that could be edited: an empty tool result, an assistant that only calls."""
    return told["content"] == "" and (told["role"] == "tool" or bool(told.keys() & {"tool_calls", "reasoning_content"}))


@given(bodies())
@law(150)
def test_edit_of_the_texts_is_what_comes_back_and_all_else_stays(body: Json) -> None:
    request = decoded(body)
    for told in request.body["messages"]:
        only_thoughts = (
            told["role"] == "assistant" and told["content"] == "" and extensions_of(told, "anthropic").get("content")
        )
        if not is_empty(told) and not only_thoughts:
            told["content"] = edited(told["content"])
    assert MESSAGES.encode(request) == edited_body(body)
