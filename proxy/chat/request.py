"""A request for a generated answer, in one shape for all APIs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.proxy.chat.extensions import Extensions, Json


@dataclass(slots=True)
class ChatRequest:
    """One request for a generated answer.

    `body` is OpenAI's: with `messages` (`/v1/chat/completions`), or with `prompt` and perhaps `suffix`
    (`/v1/completions`). `stream` is whether the client expects a stream, by a field or by its API's default. `asked` is
    the model's name in the client's spelling, empty if the answer is to have that of `model`. The properties read and
    write the body.
    """

    body: Json
    stream: bool = True
    asked: str = ""

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @model.setter
    def model(self, name: str) -> None:
        self.body["model"] = name

    @property
    def is_text(self) -> bool:
        """Whether it is a text completion rather than a chat."""
        return "messages" not in self.body

    @property
    def messages(self) -> list[Json]:
        """The messages of a chat, which may be changed in place; for a text a new empty list."""
        messages: list[Json] = self.body.get("messages", [])
        return messages

    @messages.setter
    def messages(self, messages: Iterable[Json]) -> None:
        """Raises: ValueError for a text completion, which has a prompt and no messages."""
        if self.is_text:
            raise ValueError("a text completion has a prompt, and no messages")
        self.body["messages"] = list(messages)

    @property
    def tools(self) -> list[Json]:
        """The tools that the model may call, in OpenAI's shape. Setting none also removes the choice among them."""
        return self.body.get("tools") or []

    @tools.setter
    def tools(self, tools: Iterable[Json]) -> None:
        self.body["tools"] = list(tools)
        if not self.body["tools"]:
            for name in ("tools", "tool_choice", "parallel_tool_calls"):
                self.body.pop(name, None)

    @property
    def system(self) -> str:
        """The text of the first message if that is a system message, else empty. Setting it inserts or replaces that
        message; an empty text removes it. A text completion has no system message: a text is put in front of its
        prompt. Raises: ValueError if that prompt is no text."""
        first = self.messages[0] if self.messages else {}
        return text_of(first.get("content")) if first.get("role") in ("system", "developer") else ""

    @system.setter
    def system(self, text: str) -> None:
        if self.is_text:
            self._prepend(text)
            return
        if self.messages and self.messages[0].get("role") in ("system", "developer"):
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def _prepend(self, text: str) -> None:
        prompt = self.body.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not all(isinstance(one, str) for one in prompts):
            raise ValueError("a text cannot be put in front of a prompt that is no text")
        written = [f"{text}\n\n{one}" if text else one for one in prompts]
        self.body["prompt"] = written if isinstance(prompt, list) else written[0]

    @property
    def last_user_text(self) -> str:
        """The prompt of a text, or the text of the last user message (its first text part if it has parts); empty if
        there is none. Setting it keeps everything else in that message, such as images: a text part is added if there
        is none, and removed for an empty text."""
        holder, key = self._last_user_place()
        text = holder.get(key) if isinstance(holder, dict) else holder and holder[key]
        return text if isinstance(text, str) else ""

    @last_user_text.setter
    def last_user_text(self, text: str) -> None:
        message = last_user_message(self.messages)
        if message is not None and isinstance(message.get("content"), list):
            _set_text(message["content"], text)
            return
        holder, key = self._last_user_place()
        if holder is not None:
            holder[key] = text

    def _last_user_place(self) -> tuple[Any, Any]:
        """The object that contains the last user text, and its key; `(None, None)` if there is none."""
        if self.is_text:
            prompt = self.body.get("prompt")
            alone = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)
            return (prompt, 0) if alone else (self.body, "prompt")
        message = last_user_message(self.body["messages"])
        if message is None:
            return None, None
        if isinstance(parts := message.get("content"), list):
            part = first_text_part(parts)
            return (None, None) if part is None else (part, "text")
        return message, "content"

    def copy(self) -> ChatRequest:
        """A deep copy; strings and extensions are shared."""
        return ChatRequest(_copied(self.body), self.stream, self.asked)


def last_user_message(messages: Iterable[Any]) -> Json | None:
    """The last message of role `user`, in the shape of any API; None if there is none."""
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            return message
    return None


def first_text_part(parts: Iterable[Any]) -> Json | None:
    """The first text part of a message's content, in OpenAI's or Anthropic's shape; None if there is none."""
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
    return None


def _set_text(parts: list[Any], text: str) -> None:
    """Set the first text part. An empty one beside other parts is removed: not every API accepts it."""
    part = first_text_part(parts)
    if part is None:
        parts[:0] = [{"type": "text", "text": text}] if text else []
    elif text or len(parts) == 1:
        part["text"] = text
    else:
        parts.remove(part)


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string, a list of parts, or None; text parts are joined by LF."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if first_text_part([part]) is not None)
    return content if isinstance(content, str) else ""


def _copied(value: Any) -> Any:
    if isinstance(value, Extensions):
        return value
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
