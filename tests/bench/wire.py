"""The bytes both ends agree on: what a client sends, what the stub answers, and how to tell that all of it arrived."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import takewhile

CHAT_PATH = "/v1/chat/completions"
MODEL = "m"
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200"
LAST_CHUNK = b"0\r\n\r\n"

_CREATED = 1_700_000_000
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class BrokenRun(Exception):
    """A figure that must not be reported: bytes were missing, different, late beyond reason, or a process died."""


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@cache
def token(index: int) -> bytes:
    """One SSE frame as llama-server sends it for one token; every index differs, so a lost or swapped one shows."""
    choice = {"finish_reason": None, "index": 0, "delta": {"content": f" t{index:05d}"}}
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


def chat_request(*, path: str, model: str, tokens: int = 0, interval_ms: float = 0) -> bytes:
    """A chat request, head and body; streamed when `tokens` is not 0.

    The stub sends the first token at once, the others on a clock of its own, one every `interval_ms`.
    """
    body: dict[str, object] = {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What does a proxy do?"},
        ],
        "temperature": 0.7,
    }
    if tokens:
        body |= {"stream": True, "max_tokens": tokens, "bench_interval_ms": interval_ms}
    raw = _compact(body)
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
