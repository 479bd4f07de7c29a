"""Files that clients send, written to the disk as they arrive: a form's (`multipart/form-data`), or a whole body.

Source: RFC 7578; RFC 2046 5.1.1; RFC 6266 for names of files.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.utils import collapse_rfc2231_value
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from llama_smart_proxy.backends.threads import begin_in_thread
from llama_smart_proxy.proxy.api.multipart import MAX_PARTS, boundary_of
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded
from llama_smart_proxy.proxy.http.body import arriving
from llama_smart_proxy.proxy.http.coding import coding_of

WRITTEN_BYTES = 2**20
"""So many bytes are written at once, in a thread."""
FORM_BYTES = 2**20
"""What a form may have besides its file: other fields, headers, boundaries."""
FIELD_BYTES = 64 * 1024
_HEAD = 16 * 1024
"""Bytes of the headers of a part."""
_LONGEST_NAME = 255
"""Characters of the name of a file; longer ones lose their beginning, as the end says what type it has."""


class Part(NamedTuple):
    """The head of a field: its name, and the name and type of its file; `filename` is None for a text."""

    name: str
    filename: str | None = None
    media_type: str = ""


class FormParser:
    """Splits a form into its fields while it arrives."""

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._rest = b"\r\n"
        self._in_head = False
        self._in_part = False
        self._parts = 0
        self.ended = False
        """Whether the last boundary has been seen; what follows is ignored."""

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """The next heads, and pieces of the content of the last one. Raises: BadRequest for what is no form."""
        self._rest += data
        while not self.ended:
            if self._in_head:
                head, end, rest = self._rest.partition(b"\r\n\r\n")
                if not end:
                    if len(self._rest) > _HEAD:
                        raise _invalid()
                    return
                self._rest, self._in_head, self._in_part = rest, False, True
                yield _part(head)
                continue
            at = self._rest.find(self._mark)
            whole = 0 <= at <= len(self._rest) - len(self._mark) - 2
            content = at if at >= 0 else max(0, len(self._rest) - len(self._mark))
            if content and self._in_part:
                yield self._rest[:content]
            self._rest = self._rest[content:]
            if not whole:
                return
            self._boundary(self._rest[len(self._mark) :][:2])

    def _boundary(self, after: bytes) -> None:
        """One has been found; `after` are the two bytes that follow it."""
        self._parts += 1
        if after == b"--":
            self.ended = True
        elif after != b"\r\n":
            raise _invalid()
        elif self._parts > MAX_PARTS:
            raise BadRequest(f"the form has over {MAX_PARTS} fields", status=413, code="request_too_large")
        self._rest = self._rest[len(self._mark) :]
        self._in_head = True


def _part(head: bytes) -> Part:
    """From the headers of a field."""
    headers = Message()
    for line in head.decode("utf-8", "replace").split("\r\n"):
        header, _, value = line.partition(":")
        if header.strip().lower() in ("content-disposition", "content-type"):
            headers[header.strip()] = "".join(character for character in value if character.isprintable()).strip()
    try:
        if headers.get_content_disposition() != "form-data":
            raise _invalid()
        name = headers.get_param("name", "", "content-disposition")
        media_type = headers.get_content_type() if "Content-Type" in headers else ""
        return Part(collapse_rfc2231_value(name or ""), headers.get_filename(), media_type)
    except (ValueError, LookupError, TypeError):  # an encoding of a parameter that there is not
        raise _invalid() from None


def _invalid() -> BadRequest:
    return BadRequest("the form in the request body is not valid", code="invalid_form")


@dataclass
class Upload:
    """What has been received: the texts of a form by name, and its file at `path`, with the name and the type that the
    client has given."""

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    name: str = ""
    media_type: str = ""
    size: int = 0
    has_file: bool = False


@asynccontextmanager
async def uploaded(http: web.BaseRequest, folder: Path, max_mib: int, *, is_form: bool) -> AsyncIterator[Upload]:
    """The file in the body of `http`, or that is its body, in `folder` within the context, unless it was moved.

    Raises: BadRequest 413 for one of over `max_mib` MiB, 415 for one with a content coding, 400 for what is no form, or
    one with several files; Overloaded if it cannot be written.
    """
    if coding_of(http.headers.get("Content-Encoding", "")) is not None:
        raise BadRequest("files are not accepted in a Content-Encoding", status=415, code="unsupported_media_type")
    if (http.content_length or 0) > max_mib * 2**20 + FORM_BYTES * is_form:
        raise _too_large(max_mib)
    upload = Upload(folder / secrets.token_hex(16))
    sink = _Sink(upload, max_mib)
    try:
        await (_receive_form(http, sink) if is_form else _receive_body(http, sink))
        yield upload
    finally:
        sink.close()


async def _receive_body(http: web.BaseRequest, sink: _Sink) -> None:
    sink.upload.media_type = http.content_type if "Content-Type" in http.headers else ""
    sink.upload.has_file = True
    async with aclosing(arriving(http)) as pieces:
        async for piece in pieces:
            await sink.write(piece)
    await sink.flush()


async def _receive_form(http: web.BaseRequest, sink: _Sink) -> None:
    parser = FormParser(boundary_of(http.headers.get("Content-Type", "")))
    part, left, upload = Part(""), FORM_BYTES, sink.upload
    async with aclosing(arriving(http)) as pieces:
        async for piece in pieces:
            left -= len(piece)
            for item in parser.feed(piece):
                if isinstance(item, Part):
                    part = item
                    _begin(part, upload)
                elif part.filename is not None:
                    left += len(item)
                    await sink.write(item)
                else:
                    _add_text(upload, part.name, item)
            if left < 0:
                raise BadRequest("the form has too much besides its file", status=413, code="request_too_large")
    if not parser.ended:
        raise BadRequest("the form in the request body is not complete", code="invalid_form")
    await sink.flush()


def _begin(part: Part, upload: Upload) -> None:
    if part.filename is None:
        return
    if part.name != "file" or upload.has_file:
        raise BadRequest("the form must have one file, in the field file", code="invalid_form", param="file")
    upload.has_file, upload.name, upload.media_type = True, name_of(part.filename), part.media_type


def _add_text(upload: Upload, name: str, data: bytes) -> None:
    text = upload.fields.get(name, "") + data.decode("utf-8", "replace")
    if len(text) > FIELD_BYTES:
        raise BadRequest(f"the field {name[:50]!r} is too long", status=413, code="request_too_large", param=name[:50])
    upload.fields[name] = text


def name_of(path: str) -> str:
    """The name of a file as clients give it, without folders and without what cannot be printed."""
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(character if character.isprintable() else "_" for character in name).strip()
    return name[-_LONGEST_NAME:] if name.strip(".") else "unnamed"


class _Sink:
    """Writes a file in pieces, each in a thread, so that a slow disk holds up no one else."""

    def __init__(self, upload: Upload, max_mib: int) -> None:
        self.upload = upload
        self._max_mib = max_mib
        self._waiting = bytearray()
        self._writing: asyncio.Future[None] | None = None
        try:
            self._handle = os.open(upload.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise _not_kept(exc) from None

    async def write(self, data: bytes) -> None:
        self.upload.size += len(data)
        if self.upload.size > self._max_mib * 2**20:
            raise _too_large(self._max_mib)
        self._waiting += data
        if len(self._waiting) >= WRITTEN_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what waits."""
        data, self._waiting = self._waiting, bytearray()
        try:
            self._writing = begin_in_thread(partial(_write, self._handle, data))
            await asyncio.shield(self._writing)
        except OSError as exc:
            raise _not_kept(exc) from None

    def close(self) -> None:
        """Let go of the file, once nothing is written to it any more."""
        self.upload.path.unlink(missing_ok=True)
        if self._writing is None or self._writing.done():
            os.close(self._handle)
        else:
            self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        writing.exception()  # which no one waits for
        os.close(self._handle)


def _write(handle: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _not_kept(exc: OSError) -> Overloaded:
    reason = f"the file cannot be kept in the state directory: {exc.strerror}"
    return Overloaded(reason, code="storage_unavailable", retry_after_s=60)


def _too_large(max_mib: int) -> BadRequest:
    message = f"the file is larger than {max_mib} MiB; knowledge.max_file_mib sets the limit"
    return BadRequest(message, status=413, code="request_too_large", param="file")
