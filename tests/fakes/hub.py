"""A Hugging Face hub on this machine: the routes that `huggingface_hub` calls, and every bad manner we want to survive.

As a program it serves the repositories in a folder, `org/name/file`, and looks into `manners.json` in that folder anew
for each request. There, for `org/name` or `org/name/file`:

    drop: 0.37       the connection ends at that share of the file    no_ranges: 1   ranges are ignored
    hold: 0.37       the answer halts there until that is taken back      slow: n        n bytes a second
    status: 503      so it answers, with `error` as X-Error-Code          no_lfs: 1      announced with git's digest
    lie: html | short | long | more | content | range    what is sent is not what was announced
    redirect: url    where the file is said to be; {path} is its path     info: text     sent as the description
    token: t         who does not send it gets `error` (GatedRepo)        mute: 1        no answer until taken back
    times: n         all that only n times

It appends a JSON object for each request to the file `log`, before it answers: method, path, range, auth.
Source: what file_download.py, hf_api.py and utils/_http.py of huggingface_hub 2.4 send and expect.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

HTML = b"<html><body>Welcome to the airport</body></html>"
PIECE = 16 * 1024


def gguf(size: int, seed: int = 0) -> bytes:
    """So many bytes that begin as a GGUF file does."""
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


class Hub:
    """A running hub, as tests see it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self._manners: dict[str, dict[str, object]] = {}

    def add(self, path: str, data: bytes) -> bytes:
        """Put a file, `org/name/file`, into a repository; returns `data`."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return data

    def behave(self, path: str, **manners: object) -> None:
        """From now on have these manners, and no others, for a repository or a file."""
        self._manners[path] = manners
        new = self.folder / "manners.new"
        new.write_text(json.dumps(self._manners))
        new.replace(self.folder / "manners.json")

    def requests(self, method: str = "GET", having: str = "/resolve/") -> list[dict[str, Any]]:
        """The requests of that kind, oldest first."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        found = [json.loads(line) for line in lines]
        return [entry for entry in found if entry["method"] == method and having in entry["path"]]

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a program that shall use this hub, with its cache below `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@contextmanager
def running_hub(folder: Path, host: str = "127.0.0.1") -> Iterator[Hub]:
    """A hub that serves what is put into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-I", __file__, str(folder), host], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Hub(folder, f"http://{host}:{process.stdout.readline().strip()}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# -- the program -------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    folder: Path
    done: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        told = {"range": self.headers.get("Range"), "auth": self.headers.get("Authorization")}
        line = json.dumps({"method": self.command, "path": self.path, **told}) + "\n"
        with open(self.folder / "log", "ab", buffering=0) as log:
            log.write(line.encode())
        try:
            self.route(self.path.strip("/").split("/"))
        except ConnectionError:
            self.close_connection = True

    def route(self, parts: list[str]) -> None:
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            if self.allowed("/".join(parts[2:4])):
                self.describe("/".join(parts[2:4]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            if self.allowed("/".join(parts[:2]), with_token=True):
                self.file("/".join(parts[:2]), "/".join(parts[4:]))
        elif parts[0] == "cdn":
            self.key = "/".join(parts)
            self.body(self.folder / "/".join(parts[1:]), self.manners(self.key))
        else:
            self.reply(404, b"")

    def manners(self, path: str) -> dict[str, Any]:
        """Those for `path` now, unless they have been used up."""
        found = self.look(path)
        self.done[path] += 1
        return found if self.done[path] <= found.get("times", self.done[path]) else {}

    def look(self, path: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "manners.json").read_text()).get(path, {})
        except FileNotFoundError:
            return {}
        return found

    def allowed(self, repo: str, with_token: bool = False) -> bool:
        """Whether the repository is there and may be had; else the answer says so, as the real hub does."""
        manners = self.manners(repo)
        token = self.headers.get("Authorization")
        if not (self.folder / repo).is_dir():
            status, error = (401, "RepoNotFound") if token is None else (404, "RepoNotFound")
        elif with_token and "token" in manners and token != f"Bearer {manners['token']}":
            status, error = (401 if token is None else 403), manners.get("error", "GatedRepo")
        elif "status" in manners:
            status, error = manners["status"], manners.get("error", "")
        else:
            return True
        self.reply(status, b'{"error": "no"}', {"X-Error-Code": error})
        return False

    def describe(self, repo: str) -> None:
        manners = self.manners(repo)
        while "mute" in self.look(repo):
            time.sleep(0.01)
        if "info" in manners:
            return self.reply(200, manners["info"].encode())
        siblings = []
        for file in sorted(path for path in (self.folder / repo).rglob("*") if path.is_file()):
            data = file.read_bytes()
            entry = {"rfilename": str(file.relative_to(self.folder / repo)), "size": len(data), "blobId": git_id(data)}
            if "no_lfs" not in manners:
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": siblings}
        self.reply(200, json.dumps(info).encode())

    def file(self, repo: str, name: str) -> None:
        self.key = f"{repo}/{name}"
        path, manners = self.folder / self.key, self.manners(self.key)
        if not path.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        if "status" in manners:
            return self.reply(manners["status"], b"", {"X-Error-Code": manners.get("error", "")})
        digest = sha256(path.read_bytes())
        headers = {"X-Repo-Commit": self.commit(repo), "X-Linked-Etag": f'"{digest}"', "ETag": f'"{digest}"'}
        headers["X-Linked-Size"] = str(path.stat().st_size)
        if "redirect" in manners:
            location = manners["redirect"].format(path=self.key)
            return self.reply(302, b"", headers | {"Location": location})
        self.body(path, manners, headers)

    def body(self, path: Path, manners: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Send the file, or the range of it that is asked for, or what the manners make of it."""
        data, lie = path.read_bytes(), manners.get("lie")
        data = {"html": HTML, "short": data[:-1000], "long": data + b"x" * 1000}.get(str(lie), data)
        if lie == "content":
            data = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        size, first, last = len(data), 0, len(data) - 1
        asked = self.headers.get("Range")
        if lie == "more":  # without saying how much
            self.close_connection, data, last = True, data + data, 2 * size - 1
            self.head(200, {"Connection": "close"})
        elif asked is None or "no_ranges" in manners:
            self.head(200, {"Content-Length": str(size), **(headers or {})})
        else:
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
            told = f"bytes {0 if lie == 'range' else first}-{last}/{size}"
            extra = {"Content-Range": told, "Content-Length": str(last + 1 - first)}
            self.head(206, {**extra, **(headers or {})})
        if self.command == "GET":
            self.pour(data, first, last + 1, manners)

    def pour(self, data: bytes, start: int, end: int, manners: dict[str, Any]) -> None:
        drop_at = int(len(data) * manners.get("drop", 2.0))
        hold_at = int(len(data) * manners.get("hold", 2.0))
        while start < end:
            if start >= drop_at:
                raise ConnectionAbortedError
            while start >= hold_at and "hold" in self.look(self.key):
                time.sleep(0.01)
            stops = [end, start + PIECE, *(stop for stop in (drop_at, hold_at) if start < stop)]
            piece = data[start : min(stops)]
            self.wfile.write(piece)
            start += len(piece)
            if "slow" in manners:
                time.sleep(len(piece) / manners["slow"])

    def commit(self, repo: str) -> str:
        """Changes with every file of the repository."""
        files = sorted(path for path in (self.folder / repo).rglob("*") if path.is_file())
        return hashlib.sha1(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()

    def reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def main() -> None:
    """`hub.py FOLDER HOST`: serve until killed; prints the port."""
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer((sys.argv[2], 0), Handler)
    server.daemon_threads = True
    os.write(1, f"{server.server_address[1]}\n".encode())
    server.serve_forever()


if __name__ == "__main__":
    main()
