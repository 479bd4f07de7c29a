"""The views of a chat for plugins of the replaced projects, and applying their edits."""

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
"""Keys of an answer; the first one that is changed is used."""


class View(Protocol):
    """One request and its answer, in the format of one plugin interface.

    `shown` is the argument of the request hook; after the hook, its result.
    """

    shown: Json

    def __init__(self, request: ChatRequest, ctx: Context) -> None: ...

    def take(self, returned: object) -> ChunkStream | None:
        """Apply the result of the request hook to the request; None means that it modified `shown` in place. Returns
        its answer, if it gave one. Raises: TypeError, ValueError for an invalid result."""

    def answer(self, reply: Reply) -> Json:
        """The argument of the response hook."""


class OllamaView:
    """A body of `/api/chat`, or of `/api/generate` for a text completion: `model`, `messages` with their
    text in `content` (or `prompt`, `system`), `options`, `format`, `think`, `tools`, `keep_alive`, `stream`.

    A key that is missing from the result is unchanged, and `stream` stays as the client set it. Other keys are the
    plugin's own: its response hook gets them, but no server does.
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
        except BadRequest as exc:  # not the client's fault
            raise ValueError(exc.message) from exc

    def _write_settings(self, changed: Json) -> None:
        body, text = self._request.body, self._request.is_text
        if "format" in changed:
            _replace(body, ("response_format", "json_schema"), ollama.decode_format(changed["format"], text=text))
        if "think" in changed:
            variables = body.get("chat_template_kwargs") or {}
            others = {k: v for k, v in variables.items() if k not in ("enable_thinking", "reasoning_effort")}
            requested = ollama.decode_think(changed["think"]).get("chat_template_kwargs", {})
            _replace(body, ("reasoning_effort",), {"chat_template_kwargs": others | requested})
        if "options" in changed:
            self._write_options(_checked(changed["options"] or {}, "options"))

    def _write_options(self, options: Json) -> None:
        """Samplers are written in the form for all servers; options for loading a model apply to Ollama only."""
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
    """A body of `/v1/chat/completions` (or, with `prompt`, of `/v1/completions`), and a `chat.completion`. Further
    fields of the client's API are hidden and kept. A field that is missing from the result is removed, except for
    `model`, `messages`, `prompt` and `stream`."""

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
    """The messages of a chat without their hidden fields; with `texts`, every content is converted to text, without
    images and the like. The plugin may modify `shown`; `back` restores what was left out."""

    def __init__(self, given: list[Json], *, texts: bool) -> None:
        self._given = given
        self.shown: list[Json] = without_extensions(given)
        for message in self.shown if texts else ():
            message["content"] = text_of(message.get("content"))
        self._before = copy.deepcopy(self.shown)
        self._positions = {id(message): position for position, message in enumerate(self.shown)}
        self._kept_alive = list(self.shown)  # else an id could be reused for another object

    def back(self, returned: object) -> list[Json]:
        """The messages of the plugin's result, with what was left out. Raises: TypeError for an invalid result."""
        if not isinstance(returned, list) or not all(isinstance(message, dict) for message in returned):
            raise TypeError("messages must be a list of dicts")
        same, free = len(returned) == len(self._given), dict.fromkeys(range(len(self._given)))
        result = []
        for position, message in enumerate(returned):
            source = self._source(message, position if same else None, free)
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

    def _source(self, message: Json, position: int | None, free: Iterable[int]) -> int | None:
        """The position of the original: the same object, an equal copy, or one modified in place; else None."""
        if id(message) in self._positions:
            return self._positions[id(message)]
        if position is not None and message == self._before[position]:
            return position
        equal = next((number for number in free if self._before[number] == message), None)
        if equal is None and position is not None and message.get("role") == self._before[position].get("role"):
            return position
        return equal


def texts_of(answer: Mapping[str, Any]) -> dict[str | int, str]:
    """The texts in `message`, `response` and `choices` (by their number) of an answer, in this order.

    Raises: TypeError for a value without text.
    """
    found: dict[str | int, str] = {name: _text(answer[name]) for name in ("message", "response") if name in answer}
    choices = answer.get("choices") or ()
    return found | {number: _text(choice) for number, choice in enumerate(choices)}


def edits(answer: object, reply: Reply, given: Mapping[str, Any]) -> tuple[dict[int, str], Json]:
    """The changes of the response hook, which got `given`, to `reply`: new texts by the number of the choice, and added
    fields. Raises: TypeError for an invalid answer."""
    answer = {"message": answer} if isinstance(answer, str) else _checked(answer, "the answer")
    texts: dict[int, str] = {}
    for key, text in texts_of(answer).items():
        number = key if isinstance(key, int) else 0
        if number < len(reply.texts) and text != reply.texts[number]:
            texts.setdefault(number, text)
    added = {name: value for name, value in answer.items() if name not in given and name not in ANSWERS}
    return texts, added


def rewritten(chunks: Sequence[Chunk], texts: Mapping[int, str], added: Json) -> Iterator[Chunk]:
    """The answer with the new texts, each where the old one began, and with the fields `added` at its end. Everything
    else, such as tool calls and usage, and unchanged chunks, is kept."""
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
    """The generation settings of a request, under Ollama's names; as the client wrote them, if it uses Ollama's API."""
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
    """The parts of a content with their text replaced by `text`."""
    first = first_text_part(parts)
    others = [part for part in parts if first_text_part([part]) is None]
    return [{**(first or {"type": "text"}), "text": text}, *others] if text or not others else others


def _text(value: Any) -> str:
    """The text of a message, of a choice, or of an object that contains one of these."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        for name in ("content", "message", "text", "response"):
            if name in value:
                return text_of(value[name]) if isinstance(value[name], list) else _text(value[name])
        if not value or "role" in value:  # a message that only calls tools
            return ""
    raise TypeError(f"a {type(value).__name__} contains no text of an answer")


def _checked(value: object, what: str) -> Json:
    if not isinstance(value, dict):
        raise TypeError(f"{what} returned a {type(value).__name__}, not a dict")
    return value
