"""The bytes both ends agree on: what a client sends, what the stub answers, and how to tell that all of it arrived."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import takewhile

CHAT_PATH = "/v1/chat/completions"
OLLAMA_PATH = "/api/chat"
MODEL = "m"
OLLAMA_MODEL = "o:latest"
"""What the stub serves as an OpenAI-style server, and what as an Ollama server."""
SYSTEM = "You are a helpful assistant."
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200"
LAST_CHUNK = b"0\r\n\r\n"
TOKEN_MARK = b'" t'
"""Stands once in each frame that carries a token, whatever the API, and nowhere else in an answer."""

_CREATED = 1_700_000_000
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_QUESTION_WITHIN = 16 * 1024
"""Bytes of a body that are searched for a question: those behind it belong to an upload."""
_QUESTION = re.compile(rb"Say (\d+) words, one every ([0-9.]+) ms")


class BrokenRun(Exception):
    """A figure that must not be reported: bytes were missing, different, late beyond reason, or a process died."""


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def text(index: int) -> str:
    """The text of one token; every index differs, so a lost or swapped one shows."""
    return f" t{index:05d}"


@cache
def token(index: int) -> bytes:
    """One SSE frame as llama-server sends it for one token."""
    choice = {"finish_reason": None, "index": 0, "delta": {"content": text(index)}}
    frame = {
        "choices": [choice],
        "created": _CREATED,
        "id": "chatcmpl-0q8Zc1Yb2Xd3We4Vf5Ug6Th7Si8Rj9Qk",
        "model": MODEL,
        "system_fingerprint": "b6000-0123abcd",
        "object": "chat.completion.chunk",
    }
    return b"data: " + _compact(frame) + b"\n\n"


@cache
def stream_body(tokens: int) -> bytes:
    """The whole body of a streamed answer: `tokens` frames, then `[DONE]`."""
    return b"".join(token(index) for index in range(tokens)) + DONE


@cache
def line(index: int) -> bytes:
    """One line as Ollama sends it for one token."""
    frame = {
        "model": OLLAMA_MODEL,
        "created_at": f"2026-01-02T03:04:05.{index:09d}Z",
        "message": {"role": "assistant", "content": text(index)},
        "done": False,
    }
    return _compact(frame) + b"\n"


@cache
def last_line(tokens: int) -> bytes:
    """The line that ends an answer of Ollama's."""
    frame = {
        "model": OLLAMA_MODEL,
        "created_at": "2026-01-02T03:04:06.123456789Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 2_123_456_789,
        "load_duration": 12_345_678,
        "prompt_eval_count": 12,
        "prompt_eval_duration": 23_456_789,
        "eval_count": tokens,
        "eval_duration": 2_012_345_678,
    }
    return _compact(frame) + b"\n"


@cache
def lines_body(tokens: int) -> bytes:
    """The whole body of a streamed answer of Ollama's."""
    return b"".join(line(index) for index in range(tokens)) + last_line(tokens)


@cache
def plain_body() -> bytes:
    """The whole body of an answer that is not streamed, about 600 bytes."""
    text = "A proxy stands between two parties and passes on what each has to say, " * 3
    answer = {
        "choices": [{"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": text.strip()}}],
        "created": _CREATED,
        "id": "chatcmpl-0q8Zc1Yb2Xd3We4Vf5Ug6Th7Si8Rj9Qk",
        "model": MODEL,
        "system_fingerprint": "b6000-0123abcd",
        "object": "chat.completion",
        "usage": {"completion_tokens": 48, "prompt_tokens": 12, "total_tokens": 60},
        "timings": {"prompt_n": 12, "prompt_ms": 11.25, "predicted_n": 48, "predicted_ms": 240.5},
    }
    return _compact(answer)


def question(tokens: int, interval_ms: float) -> str:
    """What a client says that wants a stream: it is the one thing that comes through every translation as it is.

    The stub sends the first token at once, the others on a clock of its own, one every `interval_ms`.
    """
    return f"Say {tokens} words, one every {interval_ms:g} ms"


def asked(body: bytes) -> tuple[int, float] | None:
    """Tokens and interval in milliseconds of the `question` in a request; None for one that wants no stream."""
    found = _QUESTION.search(body, 0, _QUESTION_WITHIN)
    return (int(found[1]), float(found[2])) if found else None


@cache
def plain_request() -> bytes:
    """A chat request for an answer that is not streamed, head and body."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What does a proxy do?"}]
    return post(CHAT_PATH, {"model": MODEL, "messages": messages, "temperature": 0.7})


def post(path: str, body: object) -> bytes:
    """A request, head and body."""
    return post_raw(path, _compact(body))


def post_raw(path: str, raw: bytes) -> bytes:
    """A request whose body is JSON already."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


def content_length(head: bytes) -> int | None:
    """The `Content-Length` of a head, None without one."""
    found = _CONTENT_LENGTH.search(head)
    return int(found[1]) if found else None


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of HTTP's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def body_of(response: bytes) -> bytes:
    """The body of one whole response, chunks joined.

    Raises: `BrokenRun` when the status is not 200 or the body ends early.
    """
    head, _, rest = response.partition(b"\r\n\r\n")
    if not head.startswith(OK):
        raise BrokenRun(f"expected status 200, got {response[:400]!r}")
    if b"\r\ntransfer-encoding: chunked" in head.lower():
        return _joined(rest)
    length = content_length(head)
    if length is not None and length != len(rest):
        raise BrokenRun(f"expected {length} bytes of body, got {len(rest)}")
    return rest


def _joined(coded: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        line_end = coded.find(b"\r\n", at)
        if line_end < 0:
            raise BrokenRun("the chunked body ends before its last chunk")
        size = int(coded[at:line_end], 16)
        if not size:
            return b"".join(pieces)
        start = line_end + 2
        at = start + size + 2
        pieces.append(coded[start : start + size])


def check_body(response: bytes, expected: bytes) -> None:
    """Raise `BrokenRun` unless `response` is a 200 whose body is `expected`, byte for byte."""
    body = body_of(response)
    if body != expected:
        pairs = zip(body, expected, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise BrokenRun(f"body differs from what the stub sent at byte {same} ({len(body)} of {len(expected)} bytes)")
