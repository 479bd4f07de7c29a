"""The Hugging Face hub over HTTP: the files of a repository, and resumable downloads.

`huggingface_hub` provides the endpoint, the token, the proxies and the hub's errors. Its downloads restart after every
failure (2.4), so files are downloaded here with plain HTTP and byte ranges, also those in Xet storage.

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
"""Pauses in seconds between attempts without progress; after progress, the next attempt follows at once."""
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
"""Statuses after which a retry may succeed."""
MAX_REDIRECTS = 5
MAX_PIECE = 40 * 10**9
"""Maximum bytes per request: the hub's content network refuses answers of more than 50 GB."""

for _library in ("httpx2", "httpcore2"):  # they log all URLs, including signed ones
    logging.getLogger(_library).setLevel(logging.WARNING)


class InvalidResponse(Exception):
    """The server's response is invalid or contradicts what it announced, so that none of it can be used."""


class DownloadCancelled(Exception):
    """The download was cancelled."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in the hub's listing. `digest` is its SHA-256, or git's SHA-1 of a small file that is not in LFS."""

    repo: str
    commit: str
    name: str
    size: int
    digest: str


def manifest(repo: str) -> dict[str, RemoteFile]:
    """The GGUF files of a repository's newest commit, by name.

    Raises: what `huggingface_hub` and its HTTP client raise; `InvalidResponse`.
    """
    import huggingface_hub as hub

    try:
        info = hub.model_info(repo, files_metadata=True, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # from parsing the JSON, or its conversion
        raise InvalidResponse("its answer does not describe a repository") from error
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise InvalidResponse("it contains no commit")
    found = {}
    for sibling in info.siblings or ():
        name, size, digest = sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if name.lower().endswith(".gguf") and FILE.fullmatch(name):
            if not isinstance(size, int) or size < 0 or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise InvalidResponse(f"it does not contain size and digest of {name}")
            found[name] = RemoteFile(repo, info.sha, name, size, digest)
    return found


def fetch(file: RemoteFile, partial: Path, report: Callable[[int], None], cancelled: threading.Event) -> None:
    """Complete the file `partial` of earlier attempts; `report` gets its size in bytes.

    Failed connections are retried from the last byte, as long as there is progress.

    Raises: `InvalidResponse`, `DownloadCancelled`, `OSError` of the disk, and what the HTTP client raises.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    with partial.open("ab") as out:
        if out.tell() > file.size:
            _truncate(out, 0)
        best, failures = out.tell(), 0
        report(best)
        while out.tell() < file.size:
            try:
                _fetch_once(file, out, report, cancelled)
            except (httpx2.TransportError, HfHubHTTPError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT_STATUSES:
                    raise
                failures = 0 if out.tell() > best else failures + 1
                if failures > len(RETRY_S):
                    raise
                best = max(best, out.tell())
                if failures and cancelled.wait(RETRY_S[failures - 1]):
                    raise DownloadCancelled from error


def _fetch_once(file: RemoteFile, out: BinaryIO, report: Callable[[int], None], cancelled: threading.Event) -> None:
    """Send one request for the missing bytes, and append them."""
    start = out.tell()
    end = min(file.size, start + MAX_PIECE)
    with _request_range(file, start, end) as response:
        start, end = _covered(response, start, end, file.size)
        if start < out.tell():
            _truncate(out, start)
        for data in response.iter_raw():
            if cancelled.is_set():
                raise DownloadCancelled
            if out.tell() + len(data) > end:
                raise InvalidResponse(f"it sent more than the announced {file.size} bytes")
            out.write(data)
            report(out.tell())
    if out.tell() < end:
        raise _incomplete(response)


def _truncate(out: BinaryIO, size: int) -> None:
    out.truncate(size)
    out.seek(size)


def _incomplete(response: httpx2.Response) -> Exception:
    import httpx2

    return httpx2.RemoteProtocolError("the answer ended too soon", request=response.request)


@contextmanager
def _request_range(file: RemoteFile, start: int, end: int) -> Iterator[httpx2.Response]:
    """The answer, with its headers, to the request for the bytes from `start` up to `end`.

    Redirects are followed here, not by the HTTP client, which does not restrict them. The client itself drops the
    token on a redirect to another origin.
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
            _check_redirect(home, request.url)
        finally:
            response.close()
    raise InvalidResponse(f"it redirects more than {MAX_REDIRECTS} times")


def _covered(response: httpx2.Response, start: int, end: int, size: int) -> tuple[int, int]:
    """The range of the file in the body: the requested one, or all of it if the server does not support ranges.

    Raises: `InvalidResponse`.
    """
    if response.status_code == 206:
        content_range = response.headers.get("Content-Range", "")
        found = CONTENT_RANGE.fullmatch(content_range)
        if found is None or [int(number) for number in found.groups()] != [start, end - 1, size]:
            raise InvalidResponse(
                f"on a request for the bytes {start} to {end - 1} of {size}, it sent '{content_range}'"
            )
        return start, end
    length = response.headers.get("Content-Length")
    if response.status_code != 200 or (length is None and start) or length not in (None, str(size)):
        sent = f"{length or 'an unknown number of'} bytes with status {response.status_code}"
        raise InvalidResponse(f"it announced {size} bytes, and sends {sent}")
    return 0, size


# -- redirects -------------------------------------------------------------------------------------------------------

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
INTERNET, NETWORK, MACHINE, NOWHERE = range(4)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))
UNICAST = ipaddress.IPv6Network("2000::/3")


def _check_redirect(home: httpx2.URL, target: httpx2.URL) -> None:
    """Reject redirects of a hub on the internet to addresses of the private network or this machine.

    Raises: `InvalidResponse`.
    """
    if target.scheme not in ("http", "https") or (home.scheme == "https" and target.scheme == "http"):
        raise InvalidResponse(f"it redirects to {target.scheme}://{target.host}")
    if target.host != home.host and reach(target.host) > min(reach(home.host), MACHINE):
        raise InvalidResponse(f"it redirects to {target.host}, an address of a private network")


def reach(host: str) -> int:
    """The most local class of a host's addresses: `INTERNET`, `NETWORK` (private), `MACHINE` (this one), or `NOWHERE`
    (invalid for servers). A name that cannot be resolved here counts as `INTERNET`: a proxy may resolve it."""
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
