"""Converts requests of Ollama's `/api/chat` and `/api/generate` to OpenAI's shape, and back.

Fields that OpenAI's shape has get its names. All others are extensions, and so is the client's spelling where OpenAI's
shape has only one: an unchanged request is encoded to the body that was decoded.

A request of another API is converted by the same tables. Ollama has no `tool_choice` (with "none" the tools are left
out, with a named function all others), `logit_bias`, `parallel_tool_calls`, `user`, and no `name` and `strict` of a
schema: these and unknown fields are dropped. More than one answer, and a prompt of tokens, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import EXTENSIONS, ChatRequest, Json, without_extensions
from llama_smart_proxy.proxy.dialects.ollama.fields import (
    CHAT_FIELDS,
    GENERATE_FIELDS,
    ClientSpelling,
    checked,
    keep_alive_s,
    record_spelling,
    restore_spelling,
)
from llama_smart_proxy.proxy.dialects.ollama.messages import (
    checked_messages,
    content_of,
    decode_messages,
    encode_messages,
    record_message_spellings,
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


def decode_chat(sent: Json) -> ChatRequest:
    """Convert a body of `/api/chat`. Raises: BadRequest with Ollama's own message."""
    sent = checked(sent, CHAT_FIELDS, "ChatRequest")
    messages = checked_messages(sent.get("messages") or ())
    body = _common(sent, text=False) | {"messages": decode_messages(messages)}
    if sent.get("tools"):
        body["tools"] = [checked(tool, {}, "ChatRequest.tools", "api.Tool") for tool in sent["tools"]]
    request = ChatRequest(body, stream=sent.get("stream") is not False)
    canonical = encode(request)[1]
    record_message_spellings(body["messages"], messages, canonical["messages"])
    if sent.get("messages"):
        sent, canonical = _without_messages(sent), _without_messages(canonical)
    record_spelling(body, sent, canonical, CHAT_PATH)
    return request


def decode_generate(sent: Json) -> ChatRequest:
    """Convert a body of `/api/generate`: to a chat with one user message, or, with `raw` or `suffix`, to a text
    completion. `context` and `template` become extensions. Raises: BadRequest with Ollama's own message."""
    sent = checked(sent, GENERATE_FIELDS, "GenerateRequest")
    raw, suffix, system = sent.get("raw"), sent.get("suffix"), sent.get("system")
    if raw and (sent.get("template") or system or sent.get("context")):
        raise BadRequest("raw mode does not support template, system, or context")
    body = _common(sent, text=bool(raw or suffix))
    content = content_of(sent.get("prompt"), sent.get("images"), "GenerateRequest.images")
    if raw or suffix:
        body["prompt"] = sent.get("prompt") or ""
        body |= {} if raw else {"suffix": suffix}
    else:
        before = [{"role": "system", "content": system}] if system else []
        body["messages"] = [*before, {"role": "user", "content": content}]
    request = ChatRequest(body, stream=sent.get("stream") is not False)
    body[EXTENSIONS] = ClientSpelling({}, {}, GENERATE_PATH)  # for `encode`, which depends on the endpoint
    record_spelling(body, sent, encode(request)[1], GENERATE_PATH)
    return request


def as_text(request: ChatRequest, prompt: str) -> ChatRequest:
    """The text completion of `prompt`, which is the chat of `request` formatted by the model's template."""
    body = {name: value for name, value in request.body.items() if name not in _CHAT_ONLY}
    body |= {"prompt": prompt} | decode_format(encode_format(request.body), text=True)
    if request.body.get("logprobs"):
        body["logprobs"] = request.body.get("top_logprobs", 1)
    return ChatRequest(body, request.stream, request.asked)


def encode(request: ChatRequest) -> tuple[str, Json]:
    """Path and body of the Ollama request for `request`, of whichever API.

    A request of `/api/generate` is sent there again, unless it was changed to a longer chat. Raises: BadRequest.
    """
    body = request.body
    if body.get("n") not in (None, 1):
        raise BadRequest("an Ollama model gives one answer at a time; n must be 1", param="n")
    endpoint = _endpoint(body)
    if request.is_text:
        path, encoded = GENERATE_PATH, _text(body)
    elif endpoint == GENERATE_PATH and (prompt := _prompt(body["messages"])) is not None:
        path, encoded = GENERATE_PATH, prompt
    else:
        path, encoded = CHAT_PATH, _chat(body)
    encoded |= _settings(body) | {"stream": request.stream}
    encoded = restore_spelling(encoded, body)
    if endpoint == GENERATE_PATH != path:
        encoded = {key: value for key, value in encoded.items() if key not in _GENERATE_ONLY}
    return path, encoded


def _common(sent: Mapping[str, Any], *, text: bool) -> Json:
    """The fields that both endpoints have, in OpenAI's shape."""
    keep_alive_s(sent.get("keep_alive"))
    body = decode_options(sent.get("options"))
    thinking = decode_think(sent.get("think"))
    body |= decode_format(sent.get("format"), text=text) | ({} if text else thinking)
    body |= decode_logprobs(sent, text=text)
    if sent.get("model") is not None:
        body["model"] = sent["model"]
    return body


def _settings(body: Mapping[str, Any]) -> Json:
    """All fields other than messages, tools and prompt."""
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
    encoded: Json = {"messages": encode_messages(body["messages"])}
    tools = without_extensions(body.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRequest("tools must be a list of objects", param="tools")
    if tools := _offered(tools, body.get("tool_choice")):
        encoded["tools"] = tools
    return encoded


def _offered(tools: list[Json], choice: Any) -> list[Json]:
    """The tools to send. Ollama has no `tool_choice`, but it cannot call tools that are not in the request."""
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
    """The fields of a text completion. With a suffix, Ollama applies its infill template, else none (`raw`)."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadRequest("the prompt for an Ollama model must be one text", param="prompt")
    return {"prompt": prompt, "suffix": body["suffix"]} if body.get("suffix") else {"prompt": prompt, "raw": True}


def _prompt(messages: Any) -> Json | None:
    """The fields of `/api/generate` for `messages`; None unless they are one user message with at most a system message
    before it."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles not in (["user"], ["system", "user"]):
        return None
    text, images = text_and_media(messages[-1].get("content"))
    encoded: Json = {"prompt": text}
    if images:
        encoded["images"] = images
    if len(messages) == 2:
        encoded["system"] = text_and_media(messages[0].get("content"))[0]
    return encoded


def _endpoint(body: Mapping[str, Any]) -> str:
    """The path of the Ollama endpoint that the request was sent to; empty if it was sent to another API."""
    spelling = body.get(EXTENSIONS)
    return spelling.endpoint if isinstance(spelling, ClientSpelling) else ""


def _without_messages(fields: Mapping[str, Any]) -> Json:
    return {key: value for key, value in fields.items() if key != "messages"}
