"""What the headers of GGUF files contain about models: read in a thread, and again only when a file has changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from llama_smart_proxy.backends.base import ModelInfo
from llama_smart_proxy.backends.llamacpp.arguments import VISION_FLAGS, context_of_slot, flags_of, takes_projector
from llama_smart_proxy.backends.threads import begin_in_thread
from llama_smart_proxy.backends.weights import projectors
from llama_smart_proxy.backends.weights.files import locate
from llama_smart_proxy.backends.weights.gguf import Elided, GgufError, GgufInfo, read_info
from llama_smart_proxy.backends.weights.models_dir import ModelFile
from llama_smart_proxy.backends.weights.stamps import Stamp, stamp_of
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import StartFailed

logger = logging.getLogger(__name__)

THINKING = ("<think>", "[THINK]", "enable_thinking", "reasoning_content", "reasoning_effort", "thinking_budget")
"""Chat templates of models that think hold one of these; the mere word `reasoning` is in the prose of others, too."""
EMBEDDING_FLAGS = {"--embedding", "--embeddings", "--rerank", "--reranking"}
READ_S = 2.0
"""Longest wait in seconds for a header; the file may be on a disk that does not answer."""
MANY = 256
"""Most headers that one list of models waits for. Of more, the first list has what their folder says."""
PAUSE_S = 0.001
"""Pause between headers of a long list, so that reading them does not slow down the event loop."""
UNREADABLE = (-1, -1, -1, -1)
"""In place of the stamp of a file that the disk did not give."""
CARD_FRESH_S = 10.0
"""Age in seconds from which the card of a file outside of `models_dir` is looked up again."""
MAX_READERS = 4
"""Most threads that read, each new one because all others wait for a disk."""


class Headers:
    """Describes models by their files. `default_args` are the flags that every model gets."""

    def __init__(self, default_args: Sequence[str] = ()) -> None:
        self._default_args = default_args
        self._known: dict[Path, _Known] = {}
        self._cards: dict[str, tuple[ModelFile | None, ModelInfo]] = {}
        self._read_at: dict[str, tuple[ModelFile | None, float]] = {}
        self._reading: dict[str, _Job] = {}
        self._jobs: deque[_Job] = deque()
        self._batch: list[_Job] = []  # what is asked for in one round of the event loop
        self._readers: dict[object, float] = {}  # since when each of them reads the same file

    def take_over(self, before: Headers) -> None:
        """Share what is known of files with the headers of an earlier configuration, which are read no more."""
        self._known = before._known

    async def info(
        self, name: str, model: ModelConfig, file: ModelFile | None = None, *, wait: bool = True
    ) -> ModelInfo:
        """What is known of a model; for one of `models_dir`, `file` is what its last scan found. No more than its
        configuration and its `file` when that is not here, or broken, which is logged once, or could not be read yet;
        without `wait` it is not read now.

        Raises: `StartFailed` when the system has no more threads.
        """
        card = self._cards.get(name)
        if wait and (card is None or file is None or card[0] != file):
            job = self._reading.get(name) or self._begin(name, model, file)
            await self._wait(job)
            card = self._cards.get(name)
        return card[1] if card is not None else _unread(name, model, file)

    def card(self, name: str, model: ModelConfig, file: ModelFile | None = None) -> ModelInfo:
        """As `info`, from memory. If that has no card of this file, or an old one of a file outside of `models_dir`,
        the file is read in the background."""
        card = self._cards.get(name)
        if card is None:
            card = self._cards[name] = None, _unread(name, model, file)
        known = file is not None and card[0] == file
        if not known and name not in self._reading and self._is_due(name, file):
            self._begin(name, model, file)
            with suppress(StartFailed):  # later, then
                self._start_reader()
        return card[1]

    def _is_due(self, name: str, file: ModelFile | None) -> bool:
        read, at_s = self._read_at.get(name, (None, -math.inf))
        return read != file or time.monotonic() - at_s > CARD_FRESH_S

    def _begin(self, name: str, model: ModelConfig, file: ModelFile | None) -> _Job:
        job = _Job(name, model, file, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._reading[name] = job
        return job

    async def _wait(self, job: _Job) -> None:
        """Wait until it is done, but not for a disk that is known not to answer, nor with too many others."""
        batch = self._batch
        if not batch:
            asyncio.get_running_loop().call_soon(self._end_batch)
        batch.append(job)
        if len(batch) > MANY:
            return
        self._start_reader()
        await asyncio.sleep(0)  # all of one list have come then
        all_blocked = len(self._readers) == MAX_READERS and self._are_blocked()
        if len(batch) > MANY or all_blocked or time.monotonic() - job.begun_s > READ_S:
            return
        if len(self._jobs) > MANY:  # of a long list; this one is waited for
            with suppress(ValueError):
                self._jobs.remove(job)
                self._jobs.appendleft(job)
        await asyncio.wait({job.done}, timeout=READ_S)

    def _end_batch(self) -> None:
        self._batch = []

    def _are_blocked(self) -> bool:
        return all(time.monotonic() - since_s > READ_S for since_s in self._readers.values())

    def _start_reader(self) -> None:
        """Start a reader if all that there are wait for a disk: one at a time, since a header may take 40 MiB."""
        if self._jobs and self._are_blocked() and len(self._readers) < MAX_READERS:
            reader = object()
            loop = asyncio.get_running_loop()
            reading = begin_in_thread(lambda: self._read(reader, loop))
            self._readers[reader] = time.monotonic()
            reading.add_done_callback(lambda reading: self._reader_ended(reader, reading))

    def _reader_ended(self, reader: object, reading: asyncio.Future[None]) -> None:
        del self._readers[reader]
        if not reading.cancelled() and (error := reading.exception()) is not None:
            logger.error("unforeseen failure to read a header", exc_info=error)
        self._start_reader()

    def _read(self, reader: object, loop: asyncio.AbstractEventLoop) -> None:
        """Do jobs until there are none; in a thread."""
        with suppress(IndexError, RuntimeError):  # none is left, or the loop is closed
            while True:
                job = self._jobs.popleft()
                self._readers[reader] = job.begun_s = time.monotonic()
                if len(self._jobs) > MANY:
                    time.sleep(PAUSE_S)
                loop.call_soon_threadsafe(self._done, job, *self._find(job.name, job.model, job.file))

    def _done(self, job: _Job, info: ModelInfo, is_final: bool) -> None:
        self._cards[job.name] = job.file if is_final else None, info
        self._read_at[job.name] = job.file, time.monotonic()
        del self._reading[job.name]
        job.done.set_result(None)

    def _find(self, name: str, model: ModelConfig, file: ModelFile | None) -> tuple[ModelInfo, bool]:
        """What is known of a model, and whether a disk that fails is no reason to read it again."""
        path = file.path if file is not None else locate(name, model)
        unread = _unread(name, model, file)
        if path is None:
            return unread, False
        known = self._known[path] = _look(path, self._known.get(path))
        if known.header is None:
            return unread, known.stamp != UNREADABLE
        args = [*self._default_args, *model.args]
        has_projector = takes_projector(args, model.env) and _projector(path, file) is not None
        info = replace(
            unread,
            digest=known.digest,
            modified=known.stamp[2] / 1e9,
            size_bytes=known.header.size_bytes,
            parameters=known.header.parameters,
            format="gguf",
            capabilities=capabilities(known.header, args, has_projector=has_projector),
            metadata=known.header.metadata,
        )
        return info, True


def _projector(path: Path, file: ModelFile | None) -> Path | None:
    return file.projector if file is not None else projectors.beside(path, log=False)


def _unread(name: str, model: ModelConfig, file: ModelFile | None) -> ModelInfo:
    """What is known of a model without its header."""
    num_ctx = context_of_slot(model.ctx, model.parallel, model.args)
    able = ("embedding",) if model.is_converted else ()
    info = ModelInfo(name, num_ctx=num_ctx, capabilities=able).configured(model, model.title)
    return (
        info if file is None else replace(info, modified=file.stamp[2] / 1e9, size_bytes=file.stamp[3], format="gguf")
    )


def capabilities(header: GgufInfo, args: Sequence[str], *, has_projector: bool = False) -> tuple[str, ...]:
    """What the model can do when llama-server runs it with `args`, by Ollama's names. `has_projector`: it gets one that
    the `args` do not name.

    A model made for embeddings can do nothing else. Tools and thinking are read from the chat templates, as Ollama
    does: there is no better place.
    """
    flags = flags_of(args)
    if f"{header.metadata.get('general.architecture')}.pooling_type" in header.metadata or flags & EMBEDDING_FLAGS:
        return ("embedding",)
    # There may be several templates; llama.cpp has one of its own for tools.
    texts = (text for key, text in header.metadata.items() if key.startswith("tokenizer.chat_template"))
    templates = _given_template(args) or "".join(text for text in texts if isinstance(text, str))
    able = {
        "completion": True,
        "tools": "tools" in templates or "tool_call" in templates,
        "thinking": any(marker in templates for marker in THINKING),
        "insert": header.infill,
        "vision": has_projector or bool(flags & VISION_FLAGS),
    }
    return tuple(capability for capability, has in able.items() if has)


def _given_template(args: Sequence[str]) -> str:
    """The chat template that `args` set in place of the model's; empty if there is none, or only the name of one of
    llama.cpp's own."""
    for flag, value in pairwise(args):
        if flag == "--chat-template-file":
            try:
                return Path(value).expanduser().read_text(errors="replace")
            except OSError:
                return ""
        if flag == "--chat-template" and "{" in value:
            return value
    return ""


@dataclass(eq=False, slots=True)
class _Job:
    """A header to be read, and the future of that. `begun_s`: when a reader began with it; infinity if none has."""

    name: str
    model: ModelConfig
    file: ModelFile | None
    done: asyncio.Future[None]
    begun_s: float = math.inf


class _Known(NamedTuple):
    """What was found in a file when that was its `stamp`."""

    stamp: Stamp
    digest: str
    header: GgufInfo | None


def _look(path: Path, known: _Known | None) -> _Known:
    """What is in the file: what is `known` if it has not changed. What is too long to keep is an empty list."""
    try:
        stamp = stamp_of(path.stat())
        if known is not None and known.stamp == stamp:
            return known
        header, digest = read_info(path), _digest(path, stamp)
    except (OSError, GgufError) as error:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            stamp = UNREADABLE
        if known is None or known.stamp != stamp:
            logger.warning("%s: the header cannot be read: %s", path, error)
        return _Known(stamp, "", None)
    kept = {key: [] if isinstance(value, Elided) else value for key, value in header.metadata.items()}
    return _Known(stamp, digest, replace(header, metadata=kept))


def _digest(path: Path, stamp: Stamp) -> str:
    """The SHA-256 of the file if it is in the cache of Hugging Face, where files have that for a name; else one of
    where it is and when it was written, since reading all of it may take minutes."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    text = "\0".join(map(str, (real, *stamp)))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
