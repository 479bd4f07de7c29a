"""Requests for an answer, between Ollama's two endpoints and OpenAI's shape.

Into OpenAI's shape go the fields that it has, under its names. All others are set aside, and so is the spelling of
those it can say in one way only: on the way back a body is what it was, save for what somebody changed on purpose.

A request that came through another API becomes an Ollama request by the same tables. Ollama has no place for
`tool_choice` (but "none" leaves the tools out, and a named one all others), `logit_bias`, `parallel_tool_calls`,
`user`, the `name` and `strict` of a schema, and unknown fields: they are dropped. More than one answer, and a prompt of
tokens, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import KEPT, ChatRequest, Json, bare
from llama_smart_proxy.proxy.dialects.ollama.fields import (
    CHAT_FIELDS,
    GENERATE_FIELDS,
    Said,
    checked,
    keep_alive_s,
    remember,
    restored,
)
from llama_smart_proxy.proxy.dialects.ollama.messages import (
    checked_messages,
    content_of,
    decode_messages,
    encode_messages,
    remember_messages,
    text_and_media,
)
from llama_smart_proxy.proxy.dialects.ollama.options import (
    EXTRAS,
    decode_format,
    decode_logprobs,
    decode_options,
    decode_think,
    encode_format,
    encode_logprobs,
    encode_options,
    encode_think,
)
from llama_smart_proxy.proxy.errors import BadRequest

CHAT_PATH = "/api/chat"
GENERATE_PATH = "/api/generate"
_GENERATE_ONLY = GENERATE_FIELDS.keys() - CHAT_FIELDS.keys()
_CHAT_ONLY = {"messages", "tools", "chat_template_kwargs", "response_format", "logprobs", "top_logprobs"}


def decode_chat(said: Json) -> ChatRequest:
    """The request that a body for `/api/chat` means. Raises: BadRequest, with the text that Ollama has for it."""
    said = checked(said, CHAT_FIELDS, "ChatRequest")
    theirs = checked_messages(said.get("messages") or ())
    body = _common(said, text=False) | {"messages": decode_messages(theirs)}
    if said.get("tools"):
        body["tools"] = [checked(tool, {}, "ChatRequest.tools", "api.Tool") for tool in said["tools"]]
    request = ChatRequest(body, stream=said.get("stream") is not False)
    ours = encode(request)[1]
    remember_messages(body["messages"], theirs, ours["messages"])
    if said.get("messages"):
        said, ours = _without_messages(said), _without_messages(ours)
    remember(body, said, ours, CHAT_PATH)
    return request


def decode_generate(said: Json) -> ChatRequest:
    """The request that a body for `/api/generate` means: a chat of one question, or, with `raw` or `suffix`, a text to
    be continued. `context` and `template` are set aside."""
    said = checked(said, GENERATE_FIELDS, "GenerateRequest")
    raw, suffix, system = said.get("raw"), said.get("suffix"), said.get("system")
    if raw and (said.get("template") or system or said.get("context")):
        raise BadRequest("raw mode does not support template, system, or context")
    body = _common(said, text=bool(raw or suffix))
    content = content_of(said.get("prompt"), said.get("images"), "GenerateRequest.images")
    if raw or suffix:
        body["prompt"] = said.get("prompt") or ""
        body |= {} if raw else {"suffix": suffix}
    else:
        before = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*before, {"role": "user", "content": content}]
    request = ChatRequest(body, stream=said.get("stream") is not False)
    body[KEPT] = Said({}, {}, GENERATE_PATH)
    remember(body, said, encode(request)[1], GENERATE_PATH)
    return request


def as_text(request: ChatRequest, prompt: str) -> ChatRequest:
    """The text request that goes on from `prompt`, which is the chat of `request` put into the model's template."""
    body = {name: value for name, value in request.body.items() if name not in _CHAT_ONLY}
    body |= {"prompt": prompt} | decode_format(encode_format(request.body), text=True)
    if request.body.get("logprobs"):
        body["logprobs"] = request.body.get("top_logprobs", 1)
    return ChatRequest(body, request.stream)


def encode(request: ChatRequest) -> tuple[str, Json]:
    """Path and body of the Ollama request that means `request`, whichever API that came through.

    What came from `/api/generate` goes there again, unless somebody made a longer chat of it.
    """
    body = request.body
    if body.get("n") not in (None, 1):
        raise BadRequest("an Ollama model gives one answer at a time; n must be 1", param="n")
    asked = _endpoint(body)
    if request.is_text:
        path, fresh = GENERATE_PATH, _text(body)
    elif asked == GENERATE_PATH and (prompt := _prompt(body["messages"])) is not None:
        path, fresh = GENERATE_PATH, prompt
    else:
        path, fresh = CHAT_PATH, _chat(body)
    fresh |= _settings(body) | {"stream": request.stream}
    fresh = restored(fresh, body)
    if asked == GENERATE_PATH != path:
        fresh = {key: value for key, value in fresh.items() if key not in _GENERATE_ONLY}
    return path, fresh


def _common(said: Mapping[str, Any], *, text: bool) -> Json:
    """The fields that both endpoints have, in OpenAI's shape."""
    keep_alive_s(said.get("keep_alive"))
    body = decode_options(said.get("options"))
    thinking = decode_think(said.get("think"))
    body |= decode_format(said.get("format"), text=text) | ({} if text else thinking)
    body |= decode_logprobs(said, text=text)
    if said.get("model") is not None:
        body["model"] = said["model"]
    return body


def _settings(body: Mapping[str, Any]) -> Json:
    """All fields but those that say what to answer."""
    found = {
        "model": body.get("model"),
        "options": encode_options(body) or None,
        "format": encode_format(body),
        "think": encode_think(body),
    }
    found |= {name: body[name] for name in EXTRAS if name != "options" and body.get(name) is not None}
    return {name: value for name, value in found.items() if value is not None} | encode_logprobs(body)


def _chat(body: Mapping[str, Any]) -> Json:
    if not isinstance(body.get("messages"), list):
        raise BadRequest("messages must be a list", param="messages")
    fresh: Json = {"messages": encode_messages(body["messages"])}
    tools = bare(body.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRequest("tools must be a list of objects", param="tools")
    if tools := _chosen(tools, body.get("tool_choice")):
        fresh["tools"] = tools
    return fresh


def _chosen(tools: list[Json], choice: Any) -> list[Json]:
    """The tools that the model gets to see. Ollama cannot be told which to call; it can be shown no other ones."""
    if choice == "none":
        return []
    named = _function_name(choice)
    if not isinstance(choice, str | dict | None) or (isinstance(choice, dict) and "function" in choice and not named):
        raise BadRequest("tool_choice must be a string or name a function", param="tool_choice")
    return tools if named is None else [tool for tool in tools if _function_name(tool) == named]


def _function_name(value: Any) -> str | None:
    """The name in `{"function": {"name": ...}}`."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _text(body: Mapping[str, Any]) -> Json:
    """A text to be continued. With a suffix, Ollama's template makes the prompt that asks for what goes between."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("the prompt for an Ollama model must be one text", param="prompt")
    return {"prompt": prompt, "suffix": body["suffix"]} if body.get("suffix") else {"prompt": prompt, "raw": True}


def _prompt(messages: Any) -> Json | None:
    """The fields that make these messages again, if it is still one question with perhaps a system prompt."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"]):
        return None
    text, images = text_and_media(messages[-1].get("content"))
    fresh: Json = {"prompt": text}
    if images:
        fresh["images"] = images
    if len(messages) == 2:
        fresh["system"] = text_and_media(messages[0].get("content"))[0]
    return fresh


def _endpoint(body: Mapping[str, Any]) -> str:
    """Which of Ollama's endpoints the client asked; empty if it was none of them."""
    said = body.get(KEPT)
    return said.endpoint if isinstance(said, Said) else ""


def _without_messages(fields: Mapping[str, Any]) -> Json:
    return {key: value for key, value in fields.items() if key != "messages"}
