"""Gives the chunks of a server's answer the form of OpenAI's reference, where servers deviate from it. No I/O."""

from __future__ import annotations

from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.chat.chunk import REASONING, reasoning_of
from llama_smart_proxy.proxy.errors import UpstreamFailed
from llama_smart_proxy.proxy.stream.tool_calls import CallSequence

_FINISH_REASONS = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "function_call",
    "content_filter": "content_filter",
    "refusal": "content_filter",
}
"""OpenAI's finish reasons by those of servers: Anthropic's, Mistral's; every other one means `stop` (`eos_token` and
`stop_sequence` of TGI, `abort` of vLLM)."""
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


class Normaliser:
    """Normalises the chunks of one answer with `choices` choices, in place. With `renames`, reasoning is always
    `reasoning_content`, and a `function_call` is one of `tool_calls`; otherwise both keep the names that the server
    gave them, one of which is in all chunks. With `verbatim`, usual parts of tool calls are never delayed, because
    their bytes are kept."""

    def __init__(self, choices: int, *, renames: bool, verbatim: bool) -> None:
        self._verbatim = verbatim
        self._choices = choices
        self._renames = renames
        self._reasoning = "reasoning_content" if renames else ""  # its name, once known
        self._calls: dict[int, CallSequence] = {}
        self._finished: set[int] = set()
        self._first: int | None = None  # the index of an only choice, which may be 1

    @property
    def finished(self) -> bool:
        """Whether every choice has a finish reason."""
        return len(self._finished) >= self._choices

    def normalise(self, chunk: Json) -> bool:
        """Normalise `chunk`. Returns whether the bytes it came as no longer stand for it.

        Raises: TypeError, ValueError, AttributeError for a chunk that cannot be understood; UpstreamFailed for one that
        reports a failure.
        """
        choices = chunk.get("choices")
        if not chunk.get("usage") and (elsewhere := _usage_elsewhere(chunk)):
            chunk["usage"] = elsewhere
        if "usage" in chunk:
            _normalise_usage(chunk)
        choices = chunk["choices"] = [choice for choice in choices or () if choice is not None]
        return any([self._normalise_choice(choice) for choice in choices])

    def rest(self) -> Json | None:
        """A last chunk with the tool calls that were not passed on yet; None if there are none."""
        choices = []
        for index, sequence in self._calls.items():
            if parts := sequence.rest():
                choices.append({"index": index, "delta": {"tool_calls": parts}, "finish_reason": None})
        return {"choices": choices} if choices else None

    def _normalise_choice(self, choice: Json) -> bool:
        changed = self._number(choice)
        delta = choice.get("delta")
        if delta is None:
            delta = choice["delta"] = choice.pop("message", None) or {}
            changed = changed or bool(delta)
        content = delta.get("content")
        if content is not None and not isinstance(content, str):
            delta["content"], thoughts = _text_of(content)
            if thoughts and not reasoning_of(delta):
                delta["reasoning_content"] = thoughts
        if len(delta) > 1 or "content" not in delta:
            self._rename_reasoning(delta)
        reason = choice.get("finish_reason")
        if reason is not None:
            choice["finish_reason"] = reason = _finish_reason(reason)
        if not isinstance(choice.get("logprobs") or {}, dict):
            del choice["logprobs"]
        if self._renames and isinstance(call := delta.pop("function_call", None), dict):
            delta["tool_calls"] = [{"index": 0, "function": call}]  # its form before there were several
        if self._renames and reason == "function_call":
            choice["finish_reason"] = "tool_calls"
        if "tool_calls" in delta or (reason and choice["index"] in self._calls):
            changed = self._order_calls(choice["index"], delta, ended=reason is not None) or changed
        if reason:
            self._finished.add(choice["index"])
        return changed

    def _number(self, choice: Json) -> bool:
        """Give `choice` a number; the only one is 0. Returns whether it had another."""
        given = choice.get("index")
        if isinstance(given, str) and given.isdecimal() and len(given) < 10:
            index = int(given)
        else:
            index = given if isinstance(given, int) else 0
        self._first = index if self._first is None else self._first
        choice["index"] = 0 if self._choices == 1 and index == self._first else index
        return given is not None and given != choice["index"]

    def _rename_reasoning(self, delta: Json) -> None:
        for name in REASONING:
            if isinstance(delta.get(name), list):
                delta[name] = "".join(_text_of(delta[name]))
            elif not isinstance(delta.get(name), str | dict | None):
                del delta[name]
        text = reasoning_of(delta)
        if self._renames:
            for name in REASONING[1:]:
                delta.pop(name, None)
        if text:
            self._reasoning = self._reasoning or next((name for name in REASONING[:2] if name in delta), REASONING[0])
            delta[self._reasoning] = text

    def _order_calls(self, index: int, delta: Json, *, ended: bool) -> bool:
        given = delta.get("tool_calls") or []
        if isinstance(given, dict):
            given = [given]
        if not given and index not in self._calls:
            return False
        sequence = self._calls.setdefault(index, CallSequence(waits=not self._verbatim))
        parts, changed = sequence.pass_on(given)
        rest = sequence.rest() if ended else []
        delta["tool_calls"] = parts + rest
        if not delta["tool_calls"]:
            del delta["tool_calls"]
        return changed or bool(rest)


def _normalise_usage(chunk: Json) -> None:
    """Remove a `usage` without counts; in any other, every count is an integer, and details are objects."""
    usage = chunk["usage"]
    usage = usage if isinstance(usage, dict) else {}
    given = [usage[name] for name in _COUNTS if name in usage]
    odd = [name for name in usage if name.endswith("_details") and not isinstance(usage[name], dict | None)]
    if given and not odd and all(value.__class__ is int and value >= 0 for value in given):
        return
    del chunk["usage"]
    usage = {name: value for name, value in usage.items() if value is not None and name not in odd}
    for name, other in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        if name not in usage and other in usage:
            usage[name] = usage[other]
    found = {name: count for name in _COUNTS if (count := _count(usage.get(name))) is not None}
    if not found:
        return
    prompt, completion = found.get("prompt_tokens", 0), found.get("completion_tokens", 0)
    total = found.get("total_tokens") or prompt + completion
    chunk["usage"] = usage | {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def _count(given: Any) -> int | None:
    """`given` as a count; None if it is none."""
    try:
        return count if (count := int(given)) >= 0 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _usage_elsewhere(chunk: Json) -> Any:
    """The usage that Moonshot's servers put into the choice, and Groq's into a field of their own."""
    for place in (*(chunk.get("choices") or ()), chunk.get("x_groq")):
        if isinstance(place, dict) and isinstance(place.get("usage"), dict):
            return place["usage"]
    return None


def _finish_reason(given: Any) -> str | None:
    if not given or given in ("null", "none", "None"):
        return None
    if given == "error":
        raise UpstreamFailed("the model server ended its answer with an error", code="upstream_error")
    return _FINISH_REASONS.get(str(given), "stop")


def _text_of(content: Any) -> tuple[str, str]:
    """The text and the reasoning in a list of content parts, as Mistral's reasoning models send them.

    Raises: TypeError for anything else.
    """
    texts, thoughts = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            raise TypeError("content is not text")
        elif part.get("type") in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("text") or ""
            thoughts.append(inner if isinstance(inner, str) else _text_of(inner)[0])
        else:
            texts.append(part.get("text") or "")
    return "".join(texts), "".join(thoughts)
