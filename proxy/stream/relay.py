"""The path of bytes: a server's answer, unchanged, to a client of the same API.

A streamed answer is written to the client's transport within the callback that received it. While the client reads
more slowly than the model writes, reading from the upstream socket is paused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from aiohttp import web

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.dialects.framing import EventSplitter, FrameTooLong, LineSplitter, Splitter
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.headers import RECORD, downstream_headers
from llama_smart_proxy.proxy.http.response import ResponseWriter, WholeResponse
from llama_smart_proxy.proxy.stream.upstream import Attempts, frame_too_long, incomplete, refusal

logger = logging.getLogger(__name__)

PLAIN_LIMIT = 1024 * 1024
"""Answers up to this size in bytes are buffered before the first byte is sent, so that truncation results in a 502."""


async def relay(
    http: web.BaseRequest,
    model: Model | Management,
    request: UpstreamRequest,
    dialect: Dialect,
    *,
    stall_s: float,
) -> web.StreamResponse:
    """Answer `http`, whose API is `dialect`, with the answer of `model` to `request`.

    A failure before the first byte is raised, after one retry. A later one is reported in the stream, or by closing
    the connection early if the format has no error event. A client that reads nothing for `stall_s` seconds is
    disconnected.
    """
    response = ResponseWriter(http, stall_s)
    async for attempt in Attempts(model, request, lambda: response.begun):
        async with attempt as upstream:
            response.record.sent_s = upstream.sent_s
            return await _pass_on(http, upstream, dialect, response, stall_s)
    raise AssertionError("the last attempt returns or raises")


async def _pass_on(
    http: web.BaseRequest, upstream: UpstreamResponse, dialect: Dialect, response: ResponseWriter, stall_s: float
) -> web.StreamResponse:
    kind = upstream.header("content-type")
    if dialect.json_errors and upstream.status >= 400 and not kind.startswith("application/json"):
        raise await refusal(upstream)
    bodiless = upstream.status in (204, 304) or http.method == "HEAD"
    splitter = None if bodiless else _STREAMS.get(kind.partition(";")[0].strip())
    if splitter is not None:
        await upstream.first_piece()  # headers are sent with the first byte; until then a failure sets the status code
        return await _stream(upstream, dialect, response, splitter())
    body = await upstream.read(PLAIN_LIMIT)
    if body is None:
        return await _large(upstream, response)
    return _whole(http, upstream, dialect, body, stall_s)


_STREAMS: dict[str, Callable[[], Splitter]] = {
    "text/event-stream": EventSplitter,
    "application/x-ndjson": LineSplitter,
}


def _whole(
    http: web.BaseRequest, upstream: UpstreamResponse, dialect: Dialect, body: bytes, stall_s: float
) -> web.StreamResponse:
    headers = downstream_headers(upstream.headers)
    if http.method == "HEAD":
        headers.append(("content-length", upstream.header("content-length", "0")))
    elif upstream.status not in (204, 304):
        headers.append(("content-length", str(len(body))))
    record = http[RECORD]
    record.first_byte_s = record.last_byte_s = time.monotonic()
    record.count_usage = partial(dialect.usage, body)
    return WholeResponse(http, upstream.status, headers, body, stall_s)


async def _stream(
    upstream: UpstreamResponse, dialect: Dialect, response: ResponseWriter, splitter: Splitter
) -> web.StreamResponse:
    record = response.record
    record.first_byte_s = time.monotonic()
    await response.begin(upstream.status, downstream_headers(upstream.headers))
    sink = _FrameSink(response, splitter)
    failure: ProxyError | None = None
    try:
        await upstream.pipe(sink)
    except UpstreamFailed as exc:
        failure = exc
    failed = sink.end(dialect, failure)
    record.last_byte_s = time.monotonic()
    record.count_usage = partial(dialect.usage, sink.last_frames)
    return await response.finish(cut=failed and dialect.cuts)


async def _large(upstream: UpstreamResponse, response: ResponseWriter) -> web.StreamResponse:
    length = upstream.header("content-length")
    await response.begin(upstream.status, downstream_headers(upstream.headers), length=length)
    try:
        await upstream.pipe(response)
    except UpstreamFailed as exc:
        logger.warning("a large answer was truncated: %s", exc)
        response.reset()
    return await response.finish()


class _FrameSink:
    """Passes on complete frames only, so that an error event can be inserted at any time."""

    __slots__ = ("_before", "_failure", "_last", "_response", "_splitter")

    def __init__(self, response: ResponseWriter, splitter: Splitter) -> None:
        self._response = response
        self._splitter = splitter
        self._before = b""
        self._last = b""
        self._failure: UpstreamFailed | None = None

    @property
    def last_frames(self) -> bytes:
        """The last frames with content: the token counts may be in the one before the end."""
        return self._before + self._last

    def feed(self, data: bytes) -> bool:
        try:
            whole = self._splitter.push(data)
        except FrameTooLong:
            self._failure = frame_too_long()
            return False
        if not whole:
            return True
        if self._splitter.has_content(whole):
            self._before, self._last = self._last, whole
        return self._response.feed(whole)

    async def drained(self) -> None:
        if self._failure is not None:
            raise self._failure
        await self._response.drained()

    def end(self, dialect: Dialect, failure: ProxyError | None) -> bool:
        """Complete the stream: write an error event and the API's end, if the server has not sent them. Returns whether
        the answer failed."""
        if failure is None and dialect.is_end(self._splitter.rest):
            self._before, self._last = self._last, self._splitter.rest  # complete except for the final line break
            self._response.feed(self._last)
        if dialect.is_end(self._last):
            return False
        closing = dialect.ending
        if not dialect.is_error(self._last):
            failure = failure or incomplete()
            logger.warning("stream aborted: %s", failure)
            closing = dialect.error_event(failure) + closing
        if closing:
            self._response.feed(closing)
        return True
