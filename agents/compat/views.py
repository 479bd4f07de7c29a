"""What plugins of the replaced projects see of a chat, and what becomes of their edits."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from llama_smart_proxy.agents.base import Context
from llama_smart_proxy.proxy.chat import (
    EXTENSIONS,
    ChatRequest,
    Chunk,
    ChunkStream,
    Json,
    Reply,
    attach,
    extensions_of,
    first_text_part,
    say,
    text_of,
    without_extensions,
)
from llama_smart_proxy.proxy.dialects.ollama import options as ollama
from llama_smart_proxy.proxy.dialects.ollama.fields import NAME as OLLAMA
from llama_smart_proxy.proxy.dialects.ollama.fields import restore_spelling
from llama_smart_proxy.proxy.errors import BadRequest

ANSWERS = ("message", "response", "choices")
"""Keys that hold an answer, the first one that is changed counts."""


class View(Protocol):
    """One request and its answer, as the hooks of one form get them.

    `shown` is what the request hook gets; behind it, what it returned.
    """

    shown: Json

    def __init__(self, request: ChatRequest, ctx: Context) -> None: ...

    def take(self, returned: object) -> ChunkStream | None:
        """Write what the request hook returned (None: it changed `shown` in place) back into the request; the answer,
        if it gave one. Raises: TypeError, ValueError for what is no request."""

    def answer(self, reply: Reply) -> Json:
        """What the response hook gets."""


class OllamaView:
    """A body of `/api/chat`, or of `/api/generate` where the client asked for a text: `model`, `messages` with their
    text in `content` (or `prompt`, `system`), `options`, `format`, `think`, `tools`, `keep_alive`, `stream`.

    A key that is missing from what comes back is unchanged, and `stream` stays as the client set it. Other keys are
    the plugin's notes: they are there in its response hook, and no server gets them.
    """

    def __init__(self, request: ChatRequest, ctx: Context) -> None:
        self._request = request
        self._for_ollama = ctx.server == "ollama"
        self._messages = ShownMessages(request.messages, texts=True)
        self._is_chat = not request.is_text and ctx.api != "/api/generate"
        self.shown: Json = {"model": request.model, "stream": request.stream, **_settings(request.body)}
        if self._is_chat:
            self.shown["messages"] = self._messages.shown
        else:
            self.shown["prompt"] = request.body["prompt"] if request.is_text else request.last_user_text
            self.shown |= {"system": request.system} if request.system else {}
        self._before = copy.deepcopy(self.shown)

    def take(self, returned: object) -> ChunkStream | None:
        context = _checked(self.shown if returned is None else returned, "on_request")
        self.shown = context
        answered = texts_of({name: context[name] for name in ANSWERS if context.get(name) is not None})
        if answered:
            return say(next(iter(answered.values())))
        changed = {name: value for name, value in context.items() if value != self._before.get(name)}
        self._write(changed)
        return None

    def answer(self, reply: Reply) -> Json:
        usage = reply.usage or {}
        message: Json = {"role": "assistant", "content": reply.text}
        message |= {"thinking": reply.reasoning} if reply.reasoning else {}
        counts = {"prompt_eval_count": usage.get("prompt_tokens"), "eval_count": usage.get("completion_tokens")}
        return {
            "model": self._request.model,
            "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            **({"message": message} if self._is_chat else {"response": reply.text}),
            "done": True,
            "done_reason": reply.finish_reason,
            **{name: count for name, count in counts.items() if isinstance(count, int)},
            "choices": without_extensions(reply.data["choices"]),
        }

    def _write(self, changed: Json) -> None:
        request = self._request
        if "messages" in changed:
            request.body["messages"] = self._messages.back(changed["messages"])
        if isinstance(changed.get("model"), str):
            request.model = changed["model"]
        if "prompt" in changed and request.is_text:
            request.body["prompt"] = changed["prompt"]
        elif "prompt" in changed:
            request.last_user_text = str(changed["prompt"])
        if "system" in changed:
            request.system = str(changed["system"] or "")
        for name in ("tools", "keep_alive") if self._for_ollama else ("tools",):
            if name in changed:
                request.body[name] = changed[name]
        try:
            self._write_settings(changed)
        except BadRequest as exc:  # it is not the client that asked for that
            raise ValueError(exc.message) from exc

    def _write_settings(self, changed: Json) -> None:
        body, text = self._request.body, self._request.is_text
        if "format" in changed:
            _replace(body, ("response_format", "json_schema"), ollama.decode_format(changed["format"], text=text))
        if "think" in changed:
            variables = body.get("chat_template_kwargs") or {}
            others = {k: v for k, v in variables.items() if k not in ("enable_thinking", "reasoning_effort")}
            wished = ollama.decode_think(changed["think"]).get("chat_template_kwargs", {})
            _replace(body, ("reasoning_effort",), {"chat_template_kwargs": others | wished})
        if "options" in changed:
            self._write_options(_checked(changed["options"] or {}, "options"))

    def _write_options(self, options: Json) -> None:
        """Samplers go where every server understands them; what is about loading a model concerns Ollama alone."""
        body, before = self._request.body, self._before["options"]
        for name in before.keys() | options.keys():
            value = options.get(name)
            if value == before.get(name):
                continue
            if name == "num_predict":
                _replace(body, ("max_completion_tokens", "max_tokens", "n_predict"), {})
            if name in ollama.SAMPLING:
                _replace(body, (ollama.SAMPLING[name],), ollama.decode_options({name: value}))
            elif self._for_ollama:
                body["options"] = {**(body.get("options") or {}), name: value}


class OpenAIView:
    """A body of `/v1/chat/completions` (or, with `prompt`, of `/v1/completions`), and a `chat.completion`. What the
    client's API has beyond that is not shown, and stays. A field that is missing from what comes back is removed, but
    for `model`, `messages`, `prompt` and `stream`."""

    def __init__(self, request: ChatRequest, ctx: Context) -> None:
        self._request = request
        self._messages = ShownMessages(request.messages, texts=False)
        self.shown: Json = without_extensions(request.body)
        if not request.is_text:
            self.shown["messages"] = self._messages.shown
        self._before = copy.deepcopy(self.shown)

    def take(self, returned: object) -> ChunkStream | None:
        shown = _checked(self.shown if returned is None else returned, "process_request")
        self.shown = shown
        given = self._request.body
        body = {
            name: given[name] if name in given and value == self._before.get(name) else value
            for name, value in shown.items()
        }
        body |= {name: given[name] for name in (EXTENSIONS, "stream") if name in given}
        if "messages" in shown and not self._request.is_text:
            body["messages"] = self._messages.back(shown["messages"])
        for name in ("model", "messages", "prompt"):
            if name in given:
                body.setdefault(name, given[name])
        self._request.body = body
        return None

    def answer(self, reply: Reply) -> Json:
        defaults = {"id": "chatcmpl-0", "created": int(time.time()), "model": self._request.model}
        answer: Json = {**defaults, **without_extensions(reply.data)}
        return answer


class ShownMessages:
    """The messages of a chat, without what is set aside in them; with `texts`, with a text for every content, and
    images and the like left out. `shown` is theirs to change, and `back` puts the rest back."""

    def __init__(self, given: list[Json], *, texts: bool) -> None:
        self._given = given
        self.shown: list[Json] = without_extensions(given)
        for message in self.shown if texts else ():
            message["content"] = text_of(message.get("content"))
        self._before = copy.deepcopy(self.shown)
        self._places = {id(message): place for place, message in enumerate(self.shown)}
        self._kept_alive = list(self.shown)  # an id is free for another object once its own is gone

    def back(self, returned: object) -> list[Json]:
        """The messages that these mean. Raises: TypeError for what are no messages."""
        if not isinstance(returned, list) or not all(isinstance(message, dict) for message in returned):
            raise TypeError("messages must be a list of dicts")
        same, free = len(returned) == len(self._given), dict.fromkeys(range(len(self._given)))
        result = []
        for place, message in enumerate(returned):
            source = self._source(message, place if same else None, free)
            if source is not None:
                free.pop(source, None)
            result.append(self._merged(message, source))
        return result

    def _merged(self, message: Json, source: int | None) -> Json:
        if source is None:
            return dict(message)
        given, before = self._given[source], self._before[source]
        merged: Json = {
            name: value if value != before.get(name) else given.get(name, value) for name, value in message.items()
        }
        text = merged.get("content")
        if isinstance(given.get("content"), list) and isinstance(text, str):
            merged["content"] = _with_text(given["content"], text)
        return merged | ({EXTENSIONS: given[EXTENSIONS]} if EXTENSIONS in given else {})

    def _source(self, message: Json, place: int | None, free: Iterable[int]) -> int | None:
        """Which of the given messages this one was: the very object, or a copy of it, or one changed in its place."""
        if id(message) in self._places:
            return self._places[id(message)]
        if place is not None and message == self._before[place]:
            return place
        equal = next((number for number in free if self._before[number] == message), None)
        if equal is None and place is not None and message.get("role") == self._before[place].get("role"):
            return place
        return equal


def texts_of(answer: Mapping[str, Any]) -> dict[str | int, str]:
    """The texts in `message`, `response` and `choices` (by their number) of an answer, in this order.

    Raises: TypeError for what holds no text.
    """
    found: dict[str | int, str] = {name: _text(answer[name]) for name in ("message", "response") if name in answer}
    choices = answer.get("choices") or ()
    return found | {number: _text(choice) for number, choice in enumerate(choices)}


def edits(answer: object, reply: Reply, given: Mapping[str, Any]) -> tuple[dict[int, str], Json]:
    """What the response hook has made of `reply`, of which it got `given`: new texts by the number of the choice, and
    fields that it has added. Raises: TypeError for what is no answer."""
    answer = {"message": answer} if isinstance(answer, str) else _checked(answer, "the answer")
    texts: dict[int, str] = {}
    for key, text in texts_of(answer).items():
        number = key if isinstance(key, int) else 0
        if number < len(reply.texts) and text != reply.texts[number]:
            texts.setdefault(number, text)
    added = {name: value for name, value in answer.items() if name not in given and name not in ANSWERS}
    return texts, added


def rewritten(chunks: Sequence[Chunk], texts: Mapping[int, str], added: Json) -> Iterator[Chunk]:
    """The answer again, with the new texts where the old ones began, and with these fields at its end. Everything else
    in it, such as tool calls and usage, stays, and chunks that nothing is changed in leave as they came."""
    due = dict(texts)
    for chunk in chunks:
        index = chunk.index
        if chunk.choice and index in due and (chunk.text or chunk.finish_reason):
            yield Chunk.of(due.pop(index), index=index)
        if chunk.text and index in texts:
            chunk.text = ""
            if not (chunk.delta or chunk.finish_reason or chunk.usage):
                continue
        if added and chunk.finish_reason and not index:
            chunk.data.update(added)
            attach(chunk.data, OLLAMA, {**extensions_of(chunk.seen, OLLAMA), **added})
        yield chunk
    for index, text in due.items():
        yield Chunk.of(text, index=index)


def _settings(body: Json) -> Json:
    """The fields of a request that say how to generate, under Ollama's names; as the client wrote them, if it is one of
    Ollama's."""
    fresh: Json = {"options": ollama.encode_options(body)}
    fresh |= {"format": ollama.encode_format(body), "think": ollama.encode_think(body)}
    fresh |= {name: without_extensions(body[name]) for name in ("tools", "keep_alive") if body.get(name)}
    fresh = {name: value for name, value in fresh.items() if value is not None}
    as_written = without_extensions(restore_spelling(fresh, body))
    names = ("options", "format", "think", "tools", "keep_alive")
    return {"options": {}} | {name: as_written[name] for name in names if as_written.get(name) is not None}


def _replace(body: Json, names: Sequence[str], by: Json) -> None:
    for name in names:
        body.pop(name, None)
    body.update(by)


def _with_text(parts: list[Any], text: str) -> list[Any]:
    """The parts of a content with this for their text."""
    first = first_text_part(parts)
    others = [part for part in parts if first_text_part([part]) is None]
    return [{**(first or {"type": "text"}), "text": text}, *others] if text or not others else others


def _text(value: Any) -> str:
    """The text of a message, of a choice, or of an object that holds one of these."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        for name in ("content", "message", "text", "response"):
            if name in value:
                return text_of(value[name]) if isinstance(value[name], list) else _text(value[name])
        if not value or "role" in value:  # a message that only calls tools
            return ""
    raise TypeError(f"a {type(value).__name__} holds no text of an answer")


def _checked(value: object, what: str) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"{what} gave a {type(value).__name__}, not a dict")
    return value
