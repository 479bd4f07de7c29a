"""The path of bytes: a server's answer, unchanged, to a client of the same API.

A streamed answer is written to the client's transport within the callback that received it. While the client reads
more slowly than the model writes, reading from the upstream socket is paused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.tasks import Task
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.dialects.framing import (
    BOM,
    EventSplitter,
    FrameTooLong,
    LineSplitter,
    Splitter,
    event_data,
    opening,
)
from llama_smart_proxy.proxy.dialects.upstream_errors import error_in, refused
from llama_smart_proxy.proxy.errors import ContextExceeded, ProxyError, UpstreamFailed, let_go
from llama_smart_proxy.proxy.http.headers import RECORD, downstream_headers
from llama_smart_proxy.proxy.http.response import ResponseWriter, WholeResponse
from llama_smart_proxy.proxy.stream.decoder import Progressed
from llama_smart_proxy.proxy.stream.upstream import (
    Attempts,
    frame_too_long,
    incomplete,
    not_a_stream,
    succeeded,
)

logger = logging.getLogger(__name__)

PLAIN_LIMIT = 1024 * 1024
"""Answers up to this size in bytes are buffered before the first byte is sent, so that truncation results in a 502."""


_STREAMS: dict[str, type[EventSplitter] | type[LineSplitter]] = {
    "text/event-stream": EventSplitter,
    "application/x-ndjson": LineSplitter,
}
LONGEST_SIGN = 64 * 1024
"""An unfinished frame of more bytes is a part of the answer, and neither a comment nor an announcement."""
PROGRESS = b'"prompt_progress"'
Unstreamed = Callable[[UpstreamResponse], Awaitable[web.StreamResponse]]
"""Answers a request for a stream although the server's answer, of which nothing was read yet, is none, or one for a
whole answer although that is a stream."""


async def relay(
    response: ResponseWriter,
    model: Model | Management,
    request: UpstreamRequest,
    dialect: Dialect,
    *,
    generates: bool = False,
    streams: bool = False,
    unstreamed: Unstreamed | None = None,
    progressed: Progressed | None = None,
) -> web.StreamResponse:
    """Answer the client of `response`, whose API is `dialect`, with the answer of `model` to `request`. `generates`:
    that is to be a generated answer, with `streams` as a stream; `unstreamed` is for servers that send the other kind.
    If the server reports its progress although the client has not asked it to, `progressed` gets the reports.

    A failure before the first piece of the answer is raised, after one retry. A later one, or one after the headers, is
    reported in the stream, or by closing the connection early if the format has no error event.
    """
    try:
        async for attempt in Attempts(model, request, lambda: response.begun):
            async with attempt as upstream:
                response.record.sent_s = upstream.sent_s
                return await _pass_on(
                    upstream, dialect, response, generates, streams, unstreamed, progressed, request.task
                )
    except ProxyError as exc:
        if not response.opened:
            raise
        logger.warning("stream aborted: %s", exc)
        failure = exc
        let_go(exc)
    except asyncio.CancelledError as exc:
        failure = response.record.cancellation(exc)
        if not response.opened:
            raise failure from None
    else:
        raise AssertionError("the last attempt returns or raises")
    return await response.fail(failure, dialect)


async def relay_bytes(response: ResponseWriter, model: Model, request: UpstreamRequest) -> web.StreamResponse:
    """Answer with what the server of `model` answers to `request`, in no API: its status, headers and bytes.

    A failure before the headers is raised, after one retry; after a later one the connection is reset.
    """
    async for attempt in Attempts(model, request, lambda: response.opened):
        async with attempt as upstream:
            response.record.sent_s = upstream.sent_s
            await upstream.first_piece()
            response.record.first_byte_s = time.monotonic()
            try:
                return await _large(upstream, response)
            finally:
                response.record.last_byte_s = time.monotonic()
    raise AssertionError("the last attempt returns or raises")


async def _pass_on(
    upstream: UpstreamResponse,
    dialect: Dialect,
    response: ResponseWriter,
    generates: bool,
    streams: bool,
    unstreamed: Unstreamed | None,
    progressed: Progressed | None,
    task: Task | None,
) -> web.StreamResponse:
    answered = succeeded(upstream.status)
    bodiless = upstream.status in (204, 304) or response.http.method == "HEAD"
    kind = upstream.header("content-type").partition(";")[0].strip().lower()
    declared = kind in _STREAMS
    if answered and declared and not streams and unstreamed is not None:
        return await unstreamed(upstream)
    if answered and not bodiless and (declared or (unstreamed is not None and streams and upstream.status == 200)):
        splitter = _STREAMS[kind if unstreamed is None else dialect.stream_type]
        # headers are sent with the first byte; until then a failure sets the status code
        await upstream.first_piece(blanks=declared)
        first = opening(upstream.peek()) or b"-"
        if unstreamed is not None and first in splitter.foreign:
            return await unstreamed(upstream)
        if declared or first in splitter.openings:
            declared = declared and splitter is _STREAMS[kind]
            return await _stream(upstream, dialect, response, splitter(), declared, progressed)
    body = await upstream.read(PLAIN_LIMIT)
    if response.opened:  # the client has the headers of a stream
        raise _in_place_of_stream(upstream.status, body or b"")
    if body is None:
        if task is not None:
            task.whole = False  # from now on the client gets it in pieces
        return await _large(upstream, response)
    if upstream.status >= 400 and not bodiless:
        _check_error(upstream.status, body, dialect)
    elif generates and upstream.status == 200 and body.startswith(_NO_ANSWERS):
        _check_answer(body)
    return _whole(response, upstream, dialect, body)


_NO_ANSWERS = (b"<", b'{"error"', b'{ "error"', b"{\n", b"\n", b"\r", b" ")
"""How bodies begin that may be a web page or an error, unlike nearly all answers, which are not parsed."""


def _in_place_of_stream(status: int, body: bytes) -> ProxyError:
    """The error for a server's answer that is no stream."""
    if not succeeded(status):
        return refused(status, body)
    return _error_of(body) or not_a_stream("a web page" if opening(body) == b"<" else "something else")


def _check_answer(body: bytes) -> None:
    """Raises: UpstreamRefused or UpstreamFailed if `body`, with the status 200, is an error or a web page."""
    if opening(body) == b"<":
        raise not_a_stream("a web page")
    if (error := _error_of(body)) is not None:
        raise error


def _check_error(status: int, body: bytes, dialect: Dialect) -> None:
    """Raises: UpstreamRefused if the server's error is not in the client's format, or is one that clients recognize by
    a text or a code that the server does not use."""
    error = refused(status, body)
    if (isinstance(error, ContextExceeded) and dialect.matched_context_error) or not dialect.is_error_body(body):
        raise error


def _whole(response: ResponseWriter, upstream: UpstreamResponse, dialect: Dialect, body: bytes) -> web.StreamResponse:
    headers, http = downstream_headers(upstream.headers), response.http
    response.begin()  # no more signs of life
    if http.method == "HEAD":
        headers.append(("content-length", upstream.header("content-length", "0")))
    elif upstream.status not in (204, 304):
        headers.append(("content-length", str(len(body))))
    record = http[RECORD]
    record.first_byte_s = record.last_byte_s = time.monotonic()
    record.count_usage = partial(dialect.usage, body)
    return WholeResponse(http, upstream.status, headers, body, response.stall_s)


async def _stream(
    upstream: UpstreamResponse,
    dialect: Dialect,
    response: ResponseWriter,
    splitter: Splitter,
    declared: bool,
    progressed: Progressed | None,
) -> web.StreamResponse:
    """`declared`: the server's content type is that of a stream. Raises: UpstreamFailed as long as nothing but signs of
    life has come."""
    record = response.record
    record.first_byte_s = time.monotonic()
    headers = downstream_headers(upstream.headers)
    if not declared:
        headers = [pair for pair in headers if pair[0] != "content-type"] + [("content-type", dialect.stream_type)]
    response.open(upstream.status, headers)
    upstream.skip(BOM)
    sink = _FrameSink(response, splitter, dialect, upstream.stop)
    reports = _Reports(type(splitter)(), progressed) if progressed is not None else None
    failure: ProxyError | None = None
    try:
        while response.waiting and (data := await upstream.piece()):
            if not sink.start(data, reports):
                await sink.drained()
        if reports is not None and response.waiting and reports.rest:  # without a line end: no report
            sink.feed(reports.rest)
        await upstream.pipe(sink)
    except UpstreamFailed as exc:
        if not response.begun:
            raise
        failure = exc.with_traceback(None)  # which would refer to this very frame
    failed = sink.end(failure)
    record.last_byte_s = time.monotonic()
    record.count_usage = partial(dialect.usage, sink.last_frames)
    return await response.finish(cut=failed and dialect.cuts)


async def _large(upstream: UpstreamResponse, response: ResponseWriter) -> web.StreamResponse:
    length = upstream.header("content-length")
    response.open(upstream.status, downstream_headers(upstream.headers), length=length)
    response.begin()
    try:
        await upstream.pipe(response)
    except UpstreamFailed as exc:
        logger.warning("an answer was truncated: %s", exc)
        response.reset()
    except asyncio.CancelledError:
        response.reset()
        raise
    return await response.finish()


def _error_of(body: bytes) -> ProxyError | None:
    """The error that a JSON object in the place of an answer reports; None if it reports none."""
    with suppress(orjson.JSONDecodeError):
        parsed = orjson.loads(body.removeprefix(BOM))
        return error_in(parsed) if isinstance(parsed, dict) else None
    return None


class _Reports:
    """Takes the reports for `progressed` out of the beginning of a stream."""

    __slots__ = ("_progressed", "_splitter")

    def __init__(self, splitter: Splitter, progressed: Progressed) -> None:
        self._splitter = splitter
        self._progressed = progressed

    @property
    def rest(self) -> bytes:
        """The bytes of an incomplete frame."""
        return self._splitter.rest

    def taken_from(self, data: bytes) -> bytes:
        """The frames that `data` completes, without reports."""
        whole = self._splitter.push(data)
        if PROGRESS not in whole:
            return whole
        return b"".join(frame for frame in self._splitter.split(whole) if not self._is_report(frame))

    def _is_report(self, frame: bytes) -> bool:
        with suppress(orjson.JSONDecodeError, AttributeError):
            report = orjson.loads(event_data(frame) or b"").get("prompt_progress")
            if isinstance(report, dict):
                self._progressed(report)
                return True
        return False


class _FrameSink:
    """Passes on complete frames only, so that an error event can be inserted at any time. `ended` is called with the
    frame that ends the answer: what the server sends later, or its end, is not waited for."""

    __slots__ = ("_dialect", "_earlier", "_end_mark", "_ended", "_failure", "_last", "_response", "_splitter")

    def __init__(
        self, response: ResponseWriter, splitter: Splitter, dialect: Dialect, ended: Callable[[], None]
    ) -> None:
        self._response = response
        self._splitter = splitter
        self._dialect = dialect
        self._end_mark = dialect.end_mark
        self._ended = ended
        self._earlier: tuple[bytes, bytes] = (b"", b"")
        self._last = b""
        self._failure: UpstreamFailed | None = None

    @property
    def last_frames(self) -> bytes:
        """The last frames with content: finish reason and token counts may be in those before the end."""
        return b"".join((*self._earlier, self._last))

    def start(self, data: bytes, reports: _Reports | None) -> bool:
        """As `feed`, until there is something of the answer, which comments and announcements are not. The server's
        `reports` do not reach the client."""
        if reports is not None:
            try:
                data = reports.taken_from(data)
            except FrameTooLong:
                self._failure = frame_too_long()
                return False
        long = self._splitter.held > LONGEST_SIGN  # looked at again with each piece, it would cost quadratic time
        frames = data if long else self._splitter.rest + data
        if long or self._splitter.has_content(frames):
            self._response.begun = True
            if not self._dialect.is_announcement(frames):
                self._response.begin()
                data += reports.rest if reports is not None else b""
        return not data or self.feed(data)

    def feed(self, data: bytes) -> bool:
        try:
            whole = self._splitter.push(data)
        except FrameTooLong:
            self._failure = frame_too_long()
            return False
        if not whole:
            return True
        if self._splitter.has_content(whole):
            self._earlier, self._last = (self._earlier[1], self._last), whole
            if self._end_mark and self._end_mark in whole and self._dialect.is_end(whole):
                self._ended()
                self._response.ended = True
        return self._response.feed(whole)

    async def drained(self) -> None:
        if self._failure is not None:
            raise self._failure
        await self._response.drained()

    def end(self, failure: ProxyError | None) -> bool:
        """Complete the stream: write an error event and the API's end, if the server has not sent them. Returns whether
        the answer failed."""
        dialect, rest = self._dialect, self._splitter.rest
        if failure is None and rest and (dialect.is_end(rest) or dialect.is_finished(rest) or dialect.is_error(rest)):
            self._earlier, self._last = (self._earlier[1], self._last), rest  # complete but for the final line break
            self._response.feed(rest if dialect.is_end(rest) else rest + b"\n\n")
        if dialect.is_end(self._last):
            return False
        closing, failed = dialect.ending, True
        if failure is None and dialect.is_finished(self.last_frames):
            failed = False
        elif not dialect.is_error(self._last):
            failure = failure or _error_of(rest) or incomplete()
            logger.warning("stream aborted: %s", failure)
            self._response.record.error = failure.code
            closing = dialect.error_event(failure) + closing
        else:
            self._response.record.error = "upstream_error"
        if self._response.waiting:
            self._response.begin()
        if closing:
            self._response.feed(closing)
        return failed
