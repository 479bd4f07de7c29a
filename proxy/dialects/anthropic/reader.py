"""Anthropic's events of a streamed Message, as chunks.

Source: the Anthropic API reference, Messages streaming.
"""

from __future__ import annotations

import orjson

from llama_smart_proxy.proxy.chat import Json, attach
from llama_smart_proxy.proxy.dialects.anthropic.shape import NAME
from llama_smart_proxy.proxy.dialects.anthropic.stream import STOP_REASONS
from llama_smart_proxy.proxy.dialects.framing import event_data
from llama_smart_proxy.proxy.dialects.upstream_errors import error_in
from llama_smart_proxy.proxy.errors import UpstreamFailed

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class MessageReader:
    """Reads the events of one Message.

    A thinking block's signature, the matched stop sequence, and stop reasons that OpenAI lacks become extensions of the
    last chunk. Citations and redacted thinking are left out.
    """

    def __init__(self) -> None:
        self.done = False
        self._usage: Json = {}
        self._calls: dict[int, int] = {}  # block index -> tool call index
        self._extensions: Json = {}

    def read(self, frame: bytes) -> Json | None:
        data = event_data(frame)
        if data is None:
            return None
        try:
            event = orjson.loads(data)
            if (error := error_in(event)) is not None:
                raise error
            return self._chunk(event)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UpstreamFailed("the model server sent an event that cannot be understood") from None

    def _chunk(self, event: Json) -> Json | None:
        match event["type"]:
            case "content_block_delta":
                return self._delta(event["index"], event["delta"])
            case "content_block_start":
                return self._start(event["index"], event["content_block"])
            case "message_start":
                message = event["message"]
                self._count(message.get("usage") or {})
                start = {"id": message["id"], "model": message["model"], **_chunk({"role": "assistant", "content": ""})}
                return start | ({"usage": self._openai_usage()} if self._usage else {})
            case "message_delta":
                return self._end(event["delta"], event.get("usage") or {})
            case "message_stop":
                self.done = True
            case "message":  # a whole one, from a server that does not stream
                return self._whole(event)
        return None

    def _whole(self, message: Json) -> Json:
        delta: Json = {"role": "assistant"}
        for number, block in enumerate(message["content"]):
            added = self._start(number, block)
            for name, value in added["choices"][0]["delta"].items() if added is not None else ():
                delta[name] = delta[name] + value if name in delta else value
        end = self._end(message, message.get("usage") or {})
        end["choices"][0]["delta"] = delta
        return {"id": message.get("id"), "model": message.get("model"), **end}

    def _start(self, index: int, block: Json) -> Json | None:
        match block["type"]:
            case "tool_use":
                number = self._calls[index] = len(self._calls)
                arguments = orjson.dumps(block["input"]).decode() if block.get("input") else ""
                function = {"name": block["name"], "arguments": arguments}
                return _chunk(
                    {"tool_calls": [{"index": number, "id": block["id"], "type": "function", "function": function}]}
                )
            case "thinking":
                self._extensions.pop("signature", None)  # of an earlier block
                return _chunk({"reasoning_content": block["thinking"]}) if block["thinking"] else None
            case "text":
                return _chunk({"content": block["text"]}) if block["text"] else None
        return None

    def _delta(self, index: int, delta: Json) -> Json | None:
        match delta["type"]:
            case "text_delta":
                return _chunk({"content": delta["text"]}) if delta["text"] else None
            case "thinking_delta":
                return _chunk({"reasoning_content": delta["thinking"]}) if delta["thinking"] else None
            case "input_json_delta" if index in self._calls:
                function = {"arguments": delta["partial_json"]}
                return _chunk({"tool_calls": [{"index": self._calls[index], "function": function}]})
            case "signature_delta" if delta["signature"]:
                self._extensions["signature"] = delta["signature"]
                return attach(_chunk({}), NAME, self._extensions)
        return None

    def _end(self, delta: Json, usage: Json) -> Json:
        self._count(usage)
        reason = delta.get("stop_reason") or "end_turn"
        finish = _FINISH_REASONS.get(reason, "stop")
        if STOP_REASONS[finish] != reason:
            self._extensions["stop_reason"] = reason
        if delta.get("stop_sequence") is not None:
            self._extensions["stop_sequence"] = delta["stop_sequence"]
        return attach({**_chunk({}, finish), "usage": self._openai_usage()}, NAME, self._extensions)

    def _count(self, usage: Json) -> None:
        """Merge token counts: each is a total, and a count that is not repeated stays valid."""
        self._usage |= {key: value for key, value in usage.items() if isinstance(value, int)}

    def _openai_usage(self) -> Json:
        counts = self._usage
        cached = counts.get("cache_read_input_tokens")
        prompt = counts.get("input_tokens", 0) + (cached or 0) + counts.get("cache_creation_input_tokens", 0)
        output = counts.get("output_tokens", 0)
        usage: Json = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return usage if cached is None else usage | {"prompt_tokens_details": {"cached_tokens": cached}}


def _chunk(delta: Json, finish: str | None = None) -> Json:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
