"""The running proxy, as the commands see it that ask something of it: where it is, with which key, and what it answers.

Nothing here needs an event loop: a command is over before one would have started.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import select
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit

from llama_smart_proxy.proxy import __version__

FAILED, NOT_RUNNING, DENIED = 1, 3, 4
"""Exit statuses of commands, as `parsers.STATUSES` describes them: the proxy refused it, it cannot be reached, it does
not accept the key."""
CONNECT_S = 10.0
"""Seconds in which a connection must be made."""
ANSWER_S = 60.0
"""Seconds in which an answer must begin, where a command does not wait for more."""
PIECE_BYTES = 256 * 1024
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to listen on that are every interface, and what to connect to there."""


class RemoteError(Exception):
    """Why a command failed, as one sentence for people. `status` is its exit status, `error` the object in the proxy's
    answer, if there is one."""

    def __init__(self, message: str, status: int = FAILED, error: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.error = error or {}


class Unreadable(Exception):
    """Why a file cannot be read."""


class Remote:
    """A running proxy at `url`, such as http://127.0.0.1:11555. Redirects are not followed, so that `key` is sent to
    that host alone.

    Raises: RemoteError (also by all methods) for an address or a key that cannot be used.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url if "://" in url else f"http://{self.url}")
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username and not parts.query
            self._port = parts.port
        except ValueError:
            usable = None
        if not usable:
            raise RemoteError(f"{url}: is not an address such as http://127.0.0.1:11555", 2)
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RemoteError("the API key (--key, LSP_API_KEY) has characters that no key has", 2)
        self._secure, self._host, self._folder = parts.scheme == "https", parts.hostname or "", parts.path
        self._headers = {"User-Agent": f"llama-smart-proxy/{__version__}", "Connection": "close"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = ANSWER_S) -> Any:
        """The JSON of an answer; `body` is sent as JSON. `path` is quoted (`at`). An answer must begin within
        `timeout_s` seconds, None is without limit."""
        with self._open(method, path, body, timeout_s) as response:
            return _parsed(_read(response), self.url)

    def send(self, method: str, path: str, file: BinaryIO, size: int) -> Any:
        """The JSON of an answer to the `size` bytes of `file`. Raises: Unreadable."""
        with self._open(method, path, _Content(file, size), ANSWER_S) as response:
            return _parsed(_read(response), self.url)

    def text(self, path: str) -> str:
        """The text of an answer to GET."""
        with self._open("GET", path, None, ANSWER_S) as response:
            return _read(response).decode(errors="replace")

    def lines(self, path: str) -> Iterator[str]:
        """The lines of an answer to GET, without their ends, each as soon as it is there, until the proxy ends it."""
        with self._open("GET", path, None, None) as response:
            try:
                while line := response.readline():
                    yield line.decode(errors="replace").rstrip("\r\n")
            except (OSError, http.client.HTTPException) as exc:
                raise RemoteError(f"the connection to {self.url} is lost: {_reason(exc)}", NOT_RUNNING) from exc

    @contextmanager
    def _open(self, method: str, path: str, body: Any, timeout_s: float | None) -> Iterator[http.client.HTTPResponse]:
        """Raises: RemoteError, also for an answer that is none of success."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        data, headers = None, dict(self._headers)
        if body is not None and not isinstance(body, _Content):
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            with _explained(self.url, CONNECT_S):
                connection.connect()
            connection.sock.settimeout(timeout_s)
            with _explained(self.url, timeout_s):
                if isinstance(body, _Content):
                    body.send(connection, method, self._folder + path, headers, may_end_early=not self._secure)
                else:
                    connection.request(method, self._folder + path, data, headers)
                response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise _refused(response, self.url, has_key="Authorization" in headers)
            yield response
        finally:
            connection.close()


class _Content(NamedTuple):
    """The body of a request: so many bytes of a file."""

    file: BinaryIO
    size: int

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, headers: Mapping[str, str], *,
        may_end_early: bool,
    ) -> None:  # fmt: skip
        """Send the request, or as much of it as is required for an answer. `may_end_early`: what comes back is one."""
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {**headers, "Content-Length": str(self.size)}.items():
            connection.putheader(name, value)
        connection.endheaders()
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in self._pieces():
                if may_end_early and select.select([connection.sock], [], [], 0)[0]:
                    return
                connection.send(piece)

    def _pieces(self) -> Iterator[bytes]:
        left = self.size
        while left:
            try:
                data = self.file.read(min(left, PIECE_BYTES))
            except OSError as exc:
                raise Unreadable(_reason(exc)) from exc
            if not data:
                raise Unreadable("it became shorter while it was read")
            left -= len(data)
            yield data


@contextmanager
def _explained(url: str, timeout_s: float | None) -> Iterator[None]:
    """Raises: RemoteError for every way in which no answer comes."""
    try:
        yield
    except ssl.SSLError as exc:
        raise RemoteError(f"{url} cannot be connected to by TLS: {_reason(exc)}", NOT_RUNNING) from exc
    except TimeoutError as exc:
        within = f" within {timeout_s:g} s" if timeout_s is not None else ""
        raise RemoteError(f"{url} has not answered{within}", NOT_RUNNING) from exc
    except OSError as exc:
        hint = "`llama-smart-proxy serve` starts it; --url or LSP_URL names another address"
        raise RemoteError(f"no proxy is running at {url} ({_reason(exc)}): {hint}", NOT_RUNNING) from exc
    except http.client.HTTPException as exc:
        raise RemoteError(f"{url} does not answer as a proxy does: {_reason(exc)}", NOT_RUNNING) from exc


def at(*parts: str, **query: str | int | None) -> str:
    """A path of these segments, each percent-encoded as a whole, with the query parameters that are not None."""
    path = "".join(f"/{quote(part, safe='')}" for part in parts)
    given = [f"{name}={quote(str(value), safe='')}" for name, value in query.items() if value is not None]
    return f"{path}?{'&'.join(given)}" if given else path


def run(args: argparse.Namespace, config: Path | None, command: Callable[[Remote], int]) -> int:
    """Call `command` with the proxy that the command line, the environment or else the file `config` names. Returns its
    exit status, or that of its failure, with the reason on stderr."""
    try:
        url = args.url or os.environ.get("LSP_URL") or configured_url(config, os.environ)
        return command(Remote(url, args.key or os.environ.get("LSP_API_KEY", "")))
    except RemoteError as exc:
        print(f"llama-smart-proxy: {exc.message}", file=sys.stderr)
        return exc.status


def configured_url(path: Path | None, env: Mapping[str, str]) -> str:
    """Where a proxy with the configuration `path` listens. Raises: RemoteError if that cannot be read, or if it picks a
    free port."""
    from llama_smart_proxy.proxy.config import read_address
    from llama_smart_proxy.proxy.errors import ConfigError

    try:
        host, port = read_address(path, env=env)
    except ConfigError as exc:
        raise RemoteError(f"{exc}\n--url or LSP_URL names the proxy without its configuration", 2) from None
    if port == 0:
        named = "server.port is 0, so that the proxy picks its port: name its address with --url or LSP_URL"
        raise RemoteError(f"{path or 'defaults'}: {named}", 2)
    host = _ANY.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise RemoteError(f"the answer of the proxy is incomplete: {_reason(exc)}", NOT_RUNNING) from exc


def _parsed(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as exc:
        raise RemoteError(f"{url} does not answer as a proxy does: that is no JSON") from exc


def _refused(response: http.client.HTTPResponse, url: str, *, has_key: bool) -> RemoteError:
    """The error for an answer that is none of success."""
    error, status = _error_in(_read(response)), response.status
    message = str(error.get("message") or "")
    if status == 401:
        wrong = "the API key of --key or LSP_API_KEY is not accepted" if has_key else None
        return RemoteError(wrong or "an API key is required: set LSP_API_KEY, or --key", DENIED, error)
    if status == 403 and error.get("code") == "insufficient_scope":
        return RemoteError(f"{message}; --key or LSP_API_KEY names another key", DENIED, error)
    if 300 <= status < 400:
        place = response.headers.get("Location", "nowhere")
        return RemoteError(f"{url} redirects to {place}, which is not followed: name the proxy itself with --url")
    nothing = f"{url} has answered with status {status}, and no reason; is it a llama-smart-proxy?"
    return RemoteError(message or nothing, FAILED, error)


def _error_in(body: bytes) -> Mapping[str, Any]:
    """The error in any dialect, with its `message`; empty if there is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": error}


def _reason(exc: Exception) -> str:
    return " ".join(str(getattr(exc, "strerror", None) or exc or type(exc).__name__).split())
