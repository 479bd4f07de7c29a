"""The four APIs as strict clients: how each asks for a chat, and the one form in which each may be answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support import raw_client
from tests.support.e2e_support import WEATHER
from tests.support.raw_client import BrokenAnswer


@dataclass(frozen=True)
class Outcome:
    """What a client got. `form` is how it was told that the answer is over; `error` are the words if it failed."""

    status: int
    form: str
    text: str = ""
    calls: tuple[tuple[str, Any], ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Received:
    """A response as it came; `intact` is False if the connection broke off within it."""

    status: int
    content_type: str
    body: bytes
    intact: bool

    def json(self) -> Any:
        assert self.intact and self.content_type.partition(";")[0] == "application/json"
        return json.loads(self.body)


@dataclass(frozen=True)
class Speaker:
    """One API. `failed` takes the words out of the error body; `streamed` and `whole` read an answer."""

    name: str
    path: str
    failed: Callable[[Any], str]
    streamed: Callable[[Received], Outcome]
    whole: Callable[[Any], Outcome]

    def body(self, model: str, text: str = "hi", *, stream: bool, tools: bool = False) -> dict[str, Any]:
        """A chat of one message."""
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
        function = WEATHER["function"]
        if self.name == "anthropic":
            parts = {"name": function["name"], "input_schema": function["parameters"]}
            return body | {"max_tokens": 64} | ({"tools": [parts]} if tools else {})
        if self.name == "responses":
            body["input"] = body.pop("messages")
            return body | ({"tools": [{"type": "function", **function}]} if tools else {})
        return body | ({"tools": [WEATHER]} if tools else {})

    async def ask(self, port: int, body: dict[str, Any]) -> Outcome:
        """The outcome of one request on a connection of its own. Fails if its form is not exactly the API's."""
        async with raw_client.connected(port) as client:
            await client.send(raw_client.request("POST", self.path, body))
            return await self.received(client, stream=body["stream"])

    async def received(self, client: raw_client.RawClient, *, stream: bool) -> Outcome:
        """The outcome of a request that was sent. Fails as `ask`."""
        return self.read(await _received(client), stream=stream)

    def read(self, received: Received, *, stream: bool) -> Outcome:
        if received.status != 200:
            words = self.failed(received.json())
            assert words and isinstance(words, str)
            return Outcome(received.status, f"{received.status} {{error}}", error=words)
        return self.streamed(received) if stream else self.whole(received.json())


async def _received(client: raw_client.RawClient) -> Received:
    _, status, headers = await client.head()
    found = dict(headers)
    pieces, intact = [], True
    try:
        if found.get("transfer-encoding") == "chunked":
            while piece := await client.chunk():
                pieces.append(piece)
        else:
            pieces.append(await client.exactly(int(found["content-length"])))
    except (BrokenAnswer, ConnectionError):
        intact = False
    return Received(status, found["content-type"], b"".join(pieces), intact)


# -- OpenAI ------------------------------------------------------------------------------------------------------------


def _openai_error(body: Any) -> str:
    assert set(body) == {"error"} and {"message", "type", "code"} <= set(body["error"])
    return str(body["error"]["message"])


def _openai_stream(received: Received) -> Outcome:
    assert received.intact and received.content_type == "text/event-stream"
    *events, rest = received.body.split(b"\n\n")
    assert rest == b"" and events[-1] == b"data: [DONE]" and events.count(b"data: [DONE]") == 1, received.body
    values = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert not any("error" in value for value in values[:-1]), "an error is the last thing that is said"
    error = _openai_error(values.pop()) if values and "error" in values[-1] else None
    choices = [value["choices"][0] for value in values if value["choices"]]
    deltas = [choice["delta"] for choice in choices]
    parts: dict[int, list[str]] = {}
    for call in [call for delta in deltas for call in delta.get("tool_calls") or ()]:
        part = parts.setdefault(call["index"], ["", ""])
        part[0] += call["function"].get("name") or ""
        part[1] += call["function"].get("arguments") or ""
    return Outcome(
        200,
        "200 error [DONE]" if error else "200 [DONE]",
        "".join(delta.get("content") or "" for delta in deltas),
        tuple((name, _parsed(arguments)) for name, arguments in parts.values()),
        next((choice["finish_reason"] for choice in reversed(choices) if choice["finish_reason"]), None),
        error,
    )


def _openai_whole(body: Any) -> Outcome:
    choice = body["choices"][0]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    read = tuple((call["name"], json.loads(call["arguments"])) for call in calls)
    return Outcome(200, "200", choice["message"]["content"], read, choice["finish_reason"])


def _parsed(arguments: str) -> Any:
    """The arguments of a call, or their text if the stream broke off within them."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


# -- Anthropic ---------------------------------------------------------------------------------------------------------


def _anthropic_error(body: Any) -> str:
    """llama-server's own `/v1/messages` has OpenAI's envelope, and in a stream none at all (b11434)."""
    return str(body.get("error", body)["message"])


def _anthropic_stream(received: Received) -> Outcome:
    assert received.intact and received.content_type == "text/event-stream"
    *events, rest = received.body.split(b"\n\n")
    named = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in map(_lines, events)
    ]
    kinds = [kind for kind, _ in named]
    assert rest == b"" and kinds[-1] in ("message_stop", "error") and not {"message_stop", "error"} & set(kinds[:-1])
    error = _anthropic_error(named.pop()[1]) if kinds[-1] == "error" else None
    assert all(kind == value["type"] for kind, value in named)
    assert not named or kinds[0] == "message_start"
    names = {value["index"]: value["content_block"] for kind, value in named if kind == "content_block_start"}
    said: dict[int, str] = dict.fromkeys(names, "")
    for _, value in named:
        if value["type"] == "content_block_delta":
            said[value["index"]] += value["delta"].get("text") or value["delta"].get("partial_json") or ""
    text = "".join(said[index] for index, block in names.items() if block["type"] == "text")
    calls = [(block["name"], said[index]) for index, block in names.items() if block["type"] == "tool_use"]
    finish = next((value["delta"]["stop_reason"] for kind, value in named if kind == "message_delta"), None)
    form = "200 event: error" if error else "200 message_stop"
    return Outcome(200, form, text, tuple((name, _parsed(arguments)) for name, arguments in calls), finish, error)


def _anthropic_whole(body: Any) -> Outcome:
    assert body["type"] == "message" and body["role"] == "assistant"
    text = "".join(block["text"] for block in body["content"] if block["type"] == "text")
    calls = tuple((block["name"], block["input"]) for block in body["content"] if block["type"] == "tool_use")
    return Outcome(200, "200", text, calls, body["stop_reason"])


def _lines(event: bytes) -> list[str]:
    lines = event.decode().split("\n")
    assert len(lines) == 2 and lines[0].startswith("event: ") and lines[1].startswith("data: "), event
    return lines


# -- OpenAI's Responses ------------------------------------------------------------------------------------------------


def _responses_stream(received: Received) -> Outcome:
    assert received.intact and received.content_type == "text/event-stream"
    *events, rest = received.body.split(b"\n\n")
    named = [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in map(_lines, events)
    ]
    kinds = [kind for kind, _ in named]
    assert rest == b"" and kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert all(kind == value["type"] for kind, value in named)
    assert [value["sequence_number"] for _, value in named] == list(range(len(named)))
    last, response = named[-1][0], named[-1][1]["response"]
    ends = ("response.completed", "response.incomplete", "response.failed")
    assert last in ends and not set(ends) & set(kinds[:-1]) and response["id"] == named[0][1]["response"]["id"]
    failed = [value for kind, value in named if kind == "error"]
    assert len(failed) == (last == "response.failed") and all(kinds[-2] == "error" for _ in failed)
    deltas = [value["delta"] for kind, value in named if kind == "response.output_text.delta"]
    outcome = _responses_read(response)
    assert "".join(deltas) == outcome.text
    error = str(failed[0]["message"]) if failed else None
    assert error == (response["error"] or {}).get("message")
    form = "200 error response.failed" if failed else f"200 {last}"
    return Outcome(200, form, outcome.text, outcome.calls, None if failed else outcome.finish, error)


def _responses_whole(body: Any) -> Outcome:
    assert body["status"] in ("completed", "incomplete") and body["error"] is None
    return _responses_read(body)


def _responses_read(response: Any) -> Outcome:
    assert response["object"] == "response" and response["store"] is False
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    read = tuple((call["name"], _parsed(call["arguments"])) for call in calls)
    return Outcome(200, "200", "".join(part["text"] for part in parts), read, response["status"])


# -- Ollama ------------------------------------------------------------------------------------------------------------


def _ollama_error(body: Any) -> str:
    assert set(body) == {"error"} and isinstance(body["error"], str)
    return str(body["error"])


def _ollama_stream(received: Received) -> Outcome:
    assert received.content_type == "application/x-ndjson"
    *lines, rest = received.body.split(b"\n")
    assert rest == b"" and lines and all(lines), f"a blank line, or half a line: {received.body!r}"
    values = [json.loads(line) for line in lines]
    assert not any("error" in value or value["done"] for value in values[:-1])
    error = None
    if "error" in values[-1]:
        last = values.pop()
        error = _ollama_error({"error": last.pop("error")})
        if last:  # the proxy's own has a form that chat UIs can show, as well
            assert last["done"] is False and error.splitlines()[0][:100] in last["message"]["content"]
    assert received.intact is (error is None), "the connection breaks off behind an error, and only there"
    assert error or values[-1]["done"] is True
    messages = [value["message"] for value in values]
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    return Outcome(
        200,
        "200 {error} cut off" if error else "200 done",
        "".join(message["content"] for message in messages),
        tuple((call["name"], call["arguments"]) for call in calls),
        None if error else values[-1]["done_reason"],
        error,
    )


def _ollama_whole(body: Any) -> Outcome:
    assert body["done"] is True
    calls = [call["function"] for call in body["message"].get("tool_calls") or ()]
    read = tuple((call["name"], call["arguments"]) for call in calls)
    return Outcome(200, "200", body["message"]["content"], read, body["done_reason"])


SPEAKERS = {
    "openai": Speaker("openai", "/v1/chat/completions", _openai_error, _openai_stream, _openai_whole),
    "ollama": Speaker("ollama", "/api/chat", _ollama_error, _ollama_stream, _ollama_whole),
    "anthropic": Speaker("anthropic", "/v1/messages", _anthropic_error, _anthropic_stream, _anthropic_whole),
    "responses": Speaker("responses", "/v1/responses", _openai_error, _responses_stream, _responses_whole),
}
