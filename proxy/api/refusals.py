"""Requests of Ollama clients that a llama-server has refused and an Ollama would not have, or with other words.

Source: Ollama's server/prompt.go (which messages are left out of a chat that is too long) and server/routes.go (its
errors); llama.cpp tools/server for `/apply-template`, `/tokenize` and its errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.chat import ChatRequest, Json, extensions_of, text_of, without_extensions
from llama_smart_proxy.proxy.dialects.ollama import lacks, unconstrained
from llama_smart_proxy.proxy.errors import BadRequest, ContextExceeded, UpstreamRefused
from llama_smart_proxy.proxy.stream.upstream import post_json

KEPT = 4
"""Tokens at the beginning of a prompt that are kept when it is cut, Ollama's default of `num_keep`."""
ANSWER_SHARE = 8
"""What part of the context is kept free for the answer, as most llama-servers cannot shift their context."""
_NO_MEDIA = re.compile(r"(image|audio|video) input is not supported")
_SCHEMA = re.compile("schema|grammar", re.IGNORECASE)
_TEMPLATE_FIELDS = frozenset({"messages", "tools", "chat_template_kwargs"})
"""The fields that `/apply-template` reads."""


async def amended(model: Model, chat: ChatRequest, refused: UpstreamRefused) -> ChatRequest | None:
    """The request as the server may accept it; None if there is none.

    Raises: BadRequest with Ollama's message, if the model cannot do what is asked.
    """
    if isinstance(refused, ContextExceeded):
        if refused.limit is None or Feature.TOKENS not in model.features or _option(chat, "truncate") is False:
            return None
        shorter = None if chat.is_text else await _with_fewer_messages(model, chat, refused.limit, refused.tokens)
        if shorter is not None or _option(chat, "shift") is False:
            return shorter
        return await (_cut if chat.is_text else _with_shorter_text)(model, chat, refused.limit)
    if _SCHEMA.search(refused.message) and (free := unconstrained(chat)) is not None:
        return free
    if (media := _NO_MEDIA.search(refused.message)) is not None:
        raise BadRequest(lacks(chat.asked or model.name, "vision" if media[1] == "image" else media[1]))
    return None


def _option(chat: ChatRequest, name: str) -> Any:
    return extensions_of(chat.body, "ollama").get(name)


async def _with_fewer_messages(model: Model, chat: ChatRequest, size: int, total: int | None) -> ChatRequest | None:
    """The chat without its oldest messages, as many as are necessary; None if the last ones alone do not fit. `total`
    are the tokens of all as the server counts them."""
    groups = leaving(chat.messages)
    if not groups:
        return None
    beside = max(0, (total or 0) - await _count(model, chat, ()))  # images, above all
    images = _images(chat.messages, ())

    async def tokens(number: int) -> int:
        gone = frozenset(index for group in groups[:number] for index in group)
        return await _count(model, chat, gone) + (beside * _images(chat.messages, gone) // images if images else beside)

    limit = chat.body.get("max_tokens") or size
    room = size - 1 - min(limit, size // ANSWER_SHARE)
    fewest, most = 1, len(groups)
    while fewest < most:
        middle = (fewest + most) // 2
        if await tokens(middle) <= room:
            most = middle
        else:
            fewest = middle + 1
    if fewest == len(groups) and await tokens(fewest) >= size:
        return None
    gone = frozenset(index for group in groups[:fewest] for index in group)
    return _changed(chat, messages=_without(chat.messages, gone))


async def _with_shorter_text(model: Model, chat: ChatRequest, size: int) -> ChatRequest | None:
    """The chat without all messages that may be left out, and without the beginning of the longest text that remains;
    None if that does not suffice."""
    gone = frozenset(index for group in leaving(chat.messages) for index in group)
    messages = _without(chat.messages, gone)
    texts = [text_of(message.get("content")) if message.get("role") != "system" else "" for message in messages]
    longest = max(range(len(messages)), key=lambda index: len(texts[index]))
    tokens = await _tokens(model, texts[longest], special=False)
    surplus = await _count(model, chat, gone) - _half(chat, size)
    if surplus >= len(tokens):
        return None
    kept = str((await post_json(model, "/detokenize", {"tokens": tokens[surplus:]})).get("content", ""))
    content = messages[longest].get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": kept}, *(part for part in content if part.get("type") != "text")]
    else:
        content = kept
    messages[longest] = {**messages[longest], "content": content}
    return _changed(chat, messages=messages)


async def _cut(model: Model, chat: ChatRequest, size: int) -> ChatRequest | None:
    """The text completion without the tokens behind its first ones; None if that is not possible."""
    prompt = chat.body.get("prompt")
    if chat.body.get("suffix") or not isinstance(prompt, str):
        return None
    tokens, limit = await _tokens(model, prompt), _half(chat, size)
    kept = min(chat.body.get("n_keep") or KEPT, limit)
    cut = tokens[:kept] + tokens[kept + len(tokens) - limit :]
    return _changed(chat, prompt=cut) if len(cut) < len(tokens) else None


def _half(chat: ChatRequest, size: int) -> int:
    """The tokens of a prompt that Ollama cuts: about half of the context remains for the answer."""
    return size - max((size - (chat.body.get("n_keep") or KEPT)) // 2, 1)


def _changed(chat: ChatRequest, **fields: Any) -> ChatRequest:
    return ChatRequest({**chat.body, **fields}, chat.stream, chat.asked)


def leaving(messages: Sequence[Json]) -> list[list[int]]:
    """The messages that may be left out, by index, in the order in which they are, each group as a whole.

    System messages, the last message of a user and the last group stay. Before that message of the user a group is a
    turn: what a user said, and all answers and tool results up to the next message of a user. After it, it is an answer
    with the results of its tool calls.
    """
    roles = [str(message.get("role")) for message in messages]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    groups: list[list[int]] = []
    for index, role in enumerate(roles):
        if role in ("system", "developer") or index == last_user:
            continue
        begins = role == "user" if index < last_user else role != "tool"
        if begins or not groups or groups[-1][-1] < last_user < index:
            groups.append([index])
        else:
            groups[-1].append(index)
    if groups and groups[-1][-1] == len(messages) - 1:
        groups.pop()
    return groups


def _without(messages: Sequence[Json], gone: frozenset[int] | Sequence[int]) -> list[Json]:
    return [message for index, message in enumerate(messages) if index not in gone]


async def _count(model: Model, chat: ChatRequest, gone: frozenset[int] | Sequence[int]) -> int:
    """The tokens of the chat without these messages, and without images."""
    return len(await _tokens(model, await _formatted(model, chat, gone)))


async def _formatted(model: Model, chat: ChatRequest, gone: frozenset[int] | Sequence[int]) -> str:
    fields = without_extensions({name: chat.body[name] for name in _TEMPLATE_FIELDS if name in chat.body})
    fields["messages"] = [_text_only(message) for message in _without(fields["messages"], gone)]
    return str((await post_json(model, "/apply-template", fields)).get("prompt", ""))


async def _tokens(model: Model, text: str, *, special: bool = True) -> list[int]:
    answer = await post_json(model, "/tokenize", {"content": text, "add_special": special, "parse_special": special})
    return list(answer.get("tokens", ()))


def _text_only(message: Json) -> Json:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if part.get("type") == "text"] or ""}


def _images(messages: Sequence[Json], gone: frozenset[int] | Sequence[int]) -> int:
    """How many images and other parts than texts they have."""
    contents = [message.get("content") for message in _without(messages, gone)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part.get("type") != "text" for part in parts)
