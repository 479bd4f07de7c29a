"""`kb add`: sends files, folders and addresses of pages to the knowledge base, but not what it has already."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli.remote import FAILED, Remote, RemoteError, Unreadable, at
from llama_smart_proxy.proxy.cli.tables import print_json
from llama_smart_proxy.proxy.log import shown

INTERRUPTED = 130
LINE_S = 10.0
"""How often progress is printed where there is no terminal."""
FIRST_POLL_S, LAST_POLL_S = 0.02, 0.5
PIECE_BYTES = 2**20
SKIPPED = {"__pycache__", "node_modules"}
"""Folders without documents, besides hidden ones."""
PAGES = ("http://", "https://")


class Found(NamedTuple):
    """A file, by its path from the root of this machine, or a page; or what is there and cannot be read: why not."""

    source: str
    problem: str = ""


@dataclass
class Outcome:
    """What has become of all files: their numbers, and those that cannot be read, with the reason."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    is_complete: bool = True
    """Whether what was sent has been read as well."""

    @property
    def total(self) -> int:
        return self.added + self.changed + self.unchanged + len(self.unreadable)


def add_command(proxy: Remote, args: argparse.Namespace) -> int:
    """Add `args.paths`. Returns the exit status: 1 if something could not be added. Raises: RemoteError."""
    outcome = Outcome()
    show = _Bar() if sys.stderr.isatty() and not args.json else _Lines()
    try:
        collection = _collection(proxy, args.collection)
        known = _known(proxy, collection)
        total = sum(1 for _ in walked(args.paths, args.pattern)) if isinstance(show, _Bar) else 0
        show.begin("adding", total)
        for found in walked(args.paths, args.pattern):
            _add(proxy, collection, found, known, outcome)
            show.step(outcome.total)
        show.end()
        outcome.is_complete = args.wait
        if args.wait:
            _wait(proxy, collection, outcome, show)
    except KeyboardInterrupt:
        show.end()
        print("stopped; run the same command to continue", file=sys.stderr)
        return INTERRUPTED
    except BaseException:
        show.end()
        raise
    _print(outcome, args)
    return FAILED if outcome.unreadable else 0


def _collection(proxy: Remote, name: str) -> str:
    """The id of the collection, which is made if there is none of this name."""
    try:
        return str(proxy.ask("GET", at("v1", "vector_stores", name))["id"])
    except RemoteError as exc:
        if exc.error.get("code") != "not_found":
            raise
    return str(proxy.ask("POST", at("v1", "vector_stores"), {"name": name})["id"])


def _known(proxy: Remote, collection: str) -> dict[str, str]:
    """The digests of what the collection has, by source; "" of what could not be read, which is tried again."""
    documents = map(json.loads, proxy.lines(at("knowledge", collection)))
    return {
        document["source"]: "" if document["status"] == "failed" else document["digest"]
        for document in documents
        if document["source"]
    }


def walked(paths: Sequence[str], patterns: Sequence[str]) -> Iterator[Found]:
    """The files at and below `paths`, without hidden ones and, in folders, without those that match none of
    `patterns`, and the pages; each folder in the order of its names."""
    for path in paths:
        if path.startswith(PAGES):
            yield Found(path)
        elif os.path.isdir(path):
            yield from _below(os.path.abspath(path), patterns)
        else:
            yield Found(os.path.abspath(path))


def _below(top: str, patterns: Sequence[str]) -> Iterator[Found]:
    problems: list[Found] = []
    errors = problems.append
    for folder, folders, names in os.walk(top, onerror=lambda exc: errors(Found(str(exc.filename), _why(exc)))):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED)
        for name in sorted(names):
            if not name.startswith(".") and (not patterns or any(fnmatchcase(name, glob) for glob in patterns)):
                yield Found(os.path.join(folder, name))
    yield from problems


def _add(proxy: Remote, collection: str, found: Found, known: dict[str, str], outcome: Outcome) -> None:
    """Raises: RemoteError if nothing further can be added, either."""
    source = found.source
    if source in outcome.sources:
        return
    outcome.sources.add(source)
    try:
        if found.problem:
            raise Unreadable(found.problem)
        answer = (
            _page(proxy, collection, source) if source.startswith(PAGES) else _file(proxy, collection, source, known)
        )
    except (OSError, Unreadable) as exc:
        outcome.unreadable[source] = _why(exc)
    except RemoteError as exc:
        if exc.status != FAILED or not exc.error or exc.error.get("code") in _ENDING:
            raise
        outcome.unreadable[source] = exc.message
    else:
        outcome.unchanged += not answer["changed"]
        outcome.changed += answer["changed"] and source in known
        outcome.added += answer["changed"] and source not in known


_ENDING = ("rate_limit_exceeded", "storage_unavailable", "shutting_down", "insufficient_scope")
"""Codes of errors that the next file would get as well."""


def _page(proxy: Remote, collection: str, url: str) -> Json:
    return dict(proxy.ask("PUT", at("knowledge", collection, url=url), timeout_s=None))


def _file(proxy: Remote, collection: str, path: str, known: dict[str, str]) -> Json:
    if not path.isprintable():  # such as one that is not valid UTF-8
        raise Unreadable("its name has characters that cannot be shown")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Unreadable("it is no file")
    with open(path, "rb") as file:
        if path in known and known[path] == _digest(file):
            return {"changed": False}
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return dict(proxy.send("PUT", at("knowledge", collection, source=path), file, size))


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while data := file.read(PIECE_BYTES):
        digest.update(data)
    return digest.hexdigest()


def _why(exc: Exception) -> str:
    return str(getattr(exc, "strerror", None) or exc).replace("\n", " ")


def _wait(proxy: Remote, collection: str, outcome: Outcome, show: _Lines) -> None:
    """Return when nothing is in progress, with what could not be read among `unreadable`."""
    path, most, known = at("v1", "vector_stores", collection), 0, ""
    pause_s = FIRST_POLL_S
    while left := (answer := proxy.ask("GET", path))["file_counts"]["in_progress"]:
        if left > most:
            most = left
            show.begin("reading", most)
        show.step(most - left)
        if (problem := answer.get("x_problem", "")) not in ("", known):
            known = problem
            print(f"reading waits: {shown(problem)}", file=sys.stderr, flush=True)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, LAST_POLL_S)
    if most:
        show.step(most)
    show.end()
    for line in proxy.lines(at("knowledge", collection)):
        document = json.loads(line)
        if document["status"] == "failed" and document["source"] in outcome.sources:
            outcome.unreadable[document["source"]] = document["error"]


def _print(outcome: Outcome, args: argparse.Namespace) -> None:
    numbers = {name: getattr(outcome, name) for name in ("added", "changed", "unchanged")}
    if args.json:
        print_json({**numbers, "unreadable": outcome.unreadable, "complete": outcome.is_complete})
        return
    for source, reason in outcome.unreadable.items():
        print(f"{source}: {reason}")
    counted = ", ".join(f"{number} {name}" for name, number in numbers.items())
    later = "" if outcome.is_complete or not (outcome.added or outcome.changed) else "; they are being read now"
    print(f"{counted}, {len(outcome.unreadable)} not readable{later}")


class _Lines:
    """Prints progress as a line every `LINE_S` seconds."""

    def __init__(self) -> None:
        self._what, self._total, self._printed_s = "", 0, 0.0

    def begin(self, what: str, total: int) -> None:
        """A phase begins, of so many files (0: unknown)."""
        self._what, self._total, self._printed_s = what, total, time.monotonic()

    def step(self, done: int) -> None:
        """So many files are done."""
        now = time.monotonic()
        if now - self._printed_s >= LINE_S:
            self._printed_s = now
            of = f" of {self._total}" if self._total else ""
            print(f"{self._what}: {done}{of} files", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The phase is over."""


class _Bar(_Lines):
    """Shows a progress bar."""

    _bar: Any = None

    def begin(self, what: str, total: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self.end()
        self._bar = tqdm(desc=what, total=total, unit=" files", disable=not total)

    def step(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
