"""The Hugging Face hub over HTTP: what a repository holds, and the bytes of its files, from where a try before ended.

`huggingface_hub` finds the endpoint, the token and the proxies and knows the hub's errors; what it has for fetching a
file begins anew after every failure (2.4), so that is done here: plain HTTP with byte ranges, also for files that it
would fetch from Xet storage.

Everything here blocks on the network: call it in a thread.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import httpx2

FILE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][^\x00-\x1f\x7f\\/]*(?:/[A-Za-z0-9_][^\x00-\x1f\x7f\\/]*)*")
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
COMMIT = re.compile(r"[0-9a-f]{40}")
CONTENT_RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<size>\d+)")
RETRY_S = (1.0, 2.0, 4.0, 8.0)
"""Pauses between tries that bring nothing new; one that did is followed by the next at once."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that may be others in a moment."""
MAX_REDIRECTS = 5
MAX_PIECE = 40 * 10**9
"""Bytes asked for at a time: the hub's content network refuses answers of more than 50 GB."""

for _library in ("httpx2", "httpcore2"):  # they log every address, also those that carry a signature
    logging.getLogger(_library).setLevel(logging.WARNING)


class Lie(Exception):
    """The server sent something other than what it had announced, so that nothing of it can be used."""


class Stopped(Exception):
    """Whoever began this does not want it any more."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub announces it. `digest` is its SHA-256, or git's SHA-1 of a small file that is not in LFS."""

    repo: str
    commit: str
    name: str
    size: int
    digest: str


def manifest(repo: str) -> dict[str, RemoteFile]:
    """The GGUF files of a repository's newest commit, by name.

    Raises: what `huggingface_hub` and its HTTP client raise; `Lie` when the answer makes no sense.
    """
    import huggingface_hub as hub

    try:
        info = hub.model_info(repo, files_metadata=True, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of JSON, or of what is made of it
        raise Lie("its answer does not describe a repository") from error
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise Lie("it names no commit")
    found = {}
    for sibling in info.siblings or ():
        name, size, digest = sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if name.lower().endswith(".gguf") and FILE.fullmatch(name):
            if not isinstance(size, int) or size < 0 or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise Lie(f"it does not tell size and digest of {name}")
            found[name] = RemoteFile(repo, info.sha, name, size, digest)
    return found


def fetch(file: RemoteFile, partial: Path, tell: Callable[[int], None], stopped: threading.Event) -> None:
    """Complete `partial`, which holds what earlier tries brought; `tell` gets the number of bytes that are there.

    Connections that break off are made again where they broke off, for as long as that brings anything.

    Raises: `Lie`, `Stopped`, `OSError` of the disk, and what the HTTP client raises.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    with partial.open("ab") as out:
        if out.tell() > file.size:
            _cut(out, 0)
        best, failures = out.tell(), 0
        tell(best)
        while out.tell() < file.size:
            try:
                _fetch_once(file, out, tell, stopped)
            except (httpx2.TransportError, HfHubHTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in PASSING:
                    raise
                failures = 0 if out.tell() > best else failures + 1
                if failures > len(RETRY_S):
                    raise
                best = max(best, out.tell())
                if failures and stopped.wait(RETRY_S[failures - 1]):
                    raise Stopped from error


def _fetch_once(file: RemoteFile, out: BinaryIO, tell: Callable[[int], None], stopped: threading.Event) -> None:
    """Ask once for what is missing and add what comes."""
    start = out.tell()
    end = min(file.size, start + MAX_PIECE)
    with _asked(file, start, end) as response:
        start, end = _covered(response, start, end, file.size)
        if start < out.tell():
            _cut(out, start)
        for data in response.iter_raw():
            if stopped.is_set():
                raise Stopped
            if out.tell() + len(data) > end:
                raise Lie(f"it sent more than the {file.size} bytes it had announced")
            out.write(data)
            tell(out.tell())
    if out.tell() < end:
        raise _cut_short(response)


def _cut(out: BinaryIO, size: int) -> None:
    out.truncate(size)
    out.seek(size)


def _cut_short(response: httpx2.Response) -> Exception:
    import httpx2

    return httpx2.RemoteProtocolError("the answer ended too soon", request=response.request)


@contextmanager
def _asked(file: RemoteFile, start: int, end: int) -> Iterator[httpx2.Response]:
    """The answer, with its headers, to the request for the bytes from `start` up to `end`.

    Redirects are followed here, not by the HTTP client, which would go anywhere. It drops the token on a way to
    another origin by itself.
    """
    import huggingface_hub as hub

    headers = {"Accept-Encoding": "identity", "User-Agent": f"llama-smart-proxy; hf_hub/{hub.__version__}"}
    if not hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := hub.get_token()):
        headers["Authorization"] = f"Bearer {token}"
    if start or end < file.size:
        headers["Range"] = f"bytes={start}-{end - 1}"
    session = hub.get_session()
    url = hub.hf_hub_url(file.repo, file.name, revision=file.commit)
    request = session.build_request("GET", url, headers=headers, timeout=hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
    home = request.url
    for _ in range(MAX_REDIRECTS + 1):
        response = session.send(request, stream=True, follow_redirects=False)
        try:
            if response.next_request is None:
                hub.hf_raise_for_status(response)
                yield response
                return
            request = response.next_request
            _check_way(home, request.url)
        finally:
            response.close()
    raise Lie(f"it redirects more than {MAX_REDIRECTS} times")


def _covered(response: httpx2.Response, start: int, end: int, size: int) -> tuple[int, int]:
    """Which bytes of the file the body holds: those asked for, or all of them if the server knows no ranges.

    Raises: `Lie` before anything of the body is taken for the file.
    """
    if response.status_code == 206:
        told = response.headers.get("Content-Range", "")
        found = CONTENT_RANGE.fullmatch(told)
        if found is None or [int(number) for number in found.groups()] != [start, end - 1, size]:
            raise Lie(f"asked for the bytes {start} to {end - 1} of {size}, it sent '{told}'")
        return start, end
    length = response.headers.get("Content-Length")
    if response.status_code != 200 or (length is None and start) or length not in (None, str(size)):
        sent = f"{length or 'an unknown number of'} bytes with status {response.status_code}"
        raise Lie(f"it had announced {size} bytes, and sends {sent}")
    return 0, size


# -- where redirects may lead ------------------------------------------------------------------------------------------

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
INTERNET, NETWORK, MACHINE, NOWHERE = range(4)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))
UNICAST = ipaddress.IPv6Network("2000::/3")


def _check_way(home: httpx2.URL, target: httpx2.URL) -> None:
    """Refuse a redirect to what only we may reach: a hub on the internet has no business in our network or machine.

    Raises: `Lie`.
    """
    if target.scheme not in ("http", "https") or (home.scheme == "https" and target.scheme == "http"):
        raise Lie(f"it redirects to {target.scheme}://{target.host}")
    if target.host != home.host and reach(target.host) > min(reach(home.host), MACHINE):
        raise Lie(f"it redirects to {target.host}, an address of a private network")


def reach(host: str) -> int:
    """How far away the addresses of a host are, going by the nearest: `INTERNET`, `NETWORK`, `MACHINE` (this one), or
    `NOWHERE` for those that no server may have. A name that cannot be resolved here is left to whoever can."""
    try:
        infos: list[Any] = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return INTERNET
    return max(_reach(ipaddress.ip_address(info[4][0].partition("%")[0])) for info in infos)


def _reach(address: Address) -> int:
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return _reach(ipaddress.IPv4Address(address.packed[-4:]))
        if address.ipv4_mapped is not None:
            return _reach(address.ipv4_mapped)
        if any(address in network for network in TUNNELS):
            return NOWHERE
    if address.is_loopback:
        return MACHINE
    if address.is_multicast or address.is_link_local or address.is_unspecified:
        return NOWHERE
    public = address.is_global and (isinstance(address, ipaddress.IPv4Address) or address in UNICAST)
    return INTERNET if public else NETWORK
