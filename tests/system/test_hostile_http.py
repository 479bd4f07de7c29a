"""Heads and framings that two parsers could read differently. Each is refused, and no byte goes further."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re

import pytest

from tests.support import toxic
from tests.support.harness import Proxy, until
from tests.support.here import served_here
from tests.support.raw_client import RawClient, connected, request
from tests.support.toxic import RawUpstream, raw_upstream

CHAT = "/v1/chat/completions"
CANARY = "canary7c1e"
BODY = json.dumps({"model": "m", "user": CANARY}).encode()
SIZE = len(BODY)
REFUSALS = {400, 403, 404, 405, 408, 411, 413, 414, 415, 417, 421, 422, 426, 431, 501, 505}
SMUGGLED = f"GET /{CANARY} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def post(
    *lines: str | bytes, body: bytes = BODY, start: str | bytes = f"POST {CHAT} HTTP/1.1", host: bool = True
) -> bytes:
    """A request of these header lines as they are."""
    whole = [start, *(["Host: test"] if host else []), *lines, "", ""]
    return b"\r\n".join(line.encode("utf-8") if isinstance(line, str) else line for line in whole) + body


def sized(*lines: str | bytes, start: str | bytes = f"POST {CHAT} HTTP/1.1", host: bool = True) -> bytes:
    """The same with a right Content-Length."""
    return post(f"Content-Length: {SIZE}", *lines, start=start, host=host)


def chunked(wire: bytes, coding: str | bytes = "Transfer-Encoding: chunked") -> bytes:
    return post(coding, body=wire)


SETTINGS = "HTTP2-Settings: AAMAAABkAAQAAP__"
OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", SETTINGS)
"""What Java's HttpClient and `curl --http2` send."""
CHUNK = toxic.chunk(BODY)
CHUNKED = CHUNK + toxic.LAST_CHUNK

MALFORMED: dict[str, bytes] = {
    # two framings
    "length and chunks": post(f"Content-Length: {SIZE}", "Transfer-Encoding: chunked", body=CHUNKED),
    "chunks and length": post("Transfer-Encoding: chunked", f"Content-Length: {SIZE}", body=CHUNKED),
    "CL.TE smuggling": post("Content-Length: 6", "Transfer-Encoding: chunked", body=b"0\r\n\r\n" + SMUGGLED),
    "TE.CL smuggling": post("Transfer-Encoding: chunked", "Content-Length: 4", body=CHUNKED + SMUGGLED),
    "two lengths that differ": post(f"Content-Length: {SIZE}", "Content-Length: 0") + SMUGGLED,
    "two equal lengths": post(f"Content-Length: {SIZE}", f"Content-Length: {SIZE}"),
    # lengths that are none
    "length +n": post(f"Content-Length: +{SIZE}"),
    "length 0x": post(f"Content-Length: {SIZE:#x}"),
    "length list": post(f"Content-Length: {SIZE}, {SIZE}"),
    "length negative": post("Content-Length: -1"),
    "length empty": post("Content-Length:"),
    "length with a space inside": post(f"Content-Length: {SIZE // 10} {SIZE % 10}"),
    "length with an underscore": post(f"Content-Length: {SIZE // 10}_{SIZE % 10}"),
    "length with a fraction": post(f"Content-Length: {SIZE}.0"),
    "length with an exponent": post("Content-Length: 4e1"),
    "length of 30 digits": post("Content-Length: " + "9" * 30),
    "length 2^64 + n": post(f"Content-Length: {2**64 + SIZE}"),
    "length in other digits": post("Content-Length: \u0664\u0662"),
    "length with a NUL": post(b"Content-Length: %d\0" % SIZE),
    # transfer codings
    "gzip, chunked": chunked(CHUNKED, "Transfer-Encoding: gzip, chunked"),
    "chunked, gzip": chunked(CHUNKED, "Transfer-Encoding: chunked, gzip"),
    "chunked twice": chunked(CHUNKED, "Transfer-Encoding: chunked, chunked"),
    "chunked in two headers": post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=CHUNKED),
    "chunked and identity": post("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=CHUNKED),
    "identity": post("Transfer-Encoding: identity", f"Content-Length: {SIZE}"),
    "xchunked": chunked(CHUNKED, "Transfer-Encoding: xchunked"),
    "chunked with a vertical tab": chunked(CHUNKED, b"Transfer-Encoding: \x0bchunked"),
    "chunked with a form feed": chunked(CHUNKED, b"Transfer-Encoding: chunked\x0c"),
    "chunked in quotes": chunked(CHUNKED, 'Transfer-Encoding: "chunked"'),
    "chunked with a parameter": chunked(CHUNKED, "Transfer-Encoding: chunked;a=b"),
    "coding empty": chunked(CHUNKED, "Transfer-Encoding:"),
    "coding with a comma": chunked(CHUNKED, "Transfer-Encoding: ,chunked"),
    "coding name before a space": chunked(CHUNKED, "Transfer-Encoding : chunked"),
    "coding name before a tab": chunked(CHUNKED, "Transfer-Encoding\t: chunked"),
    "coding name behind a space": chunked(CHUNKED, " Transfer-Encoding: chunked"),
    "coding folded": chunked(CHUNKED, "Transfer-Encoding:\r\n chunked"),
    "tabs around the coding": chunked(CHUNKED, "Transfer-Encoding: \t chunked \t"),
    "chunks in HTTP/1.0": post("Transfer-Encoding: chunked", body=CHUNKED, start=f"POST {CHAT} HTTP/1.0"),
    # chunks
    "chunk size 0x": chunked(b"0x%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size +": chunked(b"+%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size -": chunked(b"-1\r\n%b\r\n0\r\n\r\n" % BODY),
    "chunk size behind a space": chunked(b" %x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size with an underscore": chunked(b"%x_\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size empty": chunked(b"\r\n%b\r\n0\r\n\r\n" % BODY),
    "chunk size not hexadecimal": chunked(b"zz\r\n%b\r\n0\r\n\r\n" % BODY),
    "chunk size of 17 digits": chunked(b"1%016x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size alone before LF": chunked(b"%x\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk too long": chunked(b"%x\r\n%bX\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk without its CRLF": chunked(b"%x\r\n%b0\r\n\r\n" % (SIZE, BODY)),
    "chunk ended by LF": chunked(b"%x\r\n%b\n0\r\n\r\n" % (SIZE, BODY)),
    "trailer that frames": chunked(CHUNK + b"0\r\nContent-Length: 5\r\n\r\n"),
    "chunk extension with CR": chunked(b"%x;a\rb\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk extension with LF": chunked(b"%x;a\nb\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk extension with NUL": chunked(b"%x;a\0b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    # line ends
    "bare LF everywhere": sized().replace(b"\r\n", b"\n"),
    "bare LF in a header": sized("X-A: 1\nX-B: 2"),
    "bare CR in a header": sized("X-A: 1\rX-B: 2"),
    "bare CR as line end": sized().replace(b"\r\n", b"\r"),
    "CR CR LF": sized("X-A: 1\r"),
    "folded header": sized("X-A: 1\r\n 2"),
    "folded header by tab": sized("X-A: 1\r\n\t2"),
    "head begins with a space": b" " + sized(),
    "first header begins with a space": post(" X-A: 1", f"Content-Length: {SIZE}", host=False),
    # header names and values
    "space before the colon": sized(f"X-A : {CANARY}"),
    "tab before the colon": sized(f"X-A\t: {CANARY}"),
    "space in a name": sized(f"X A: {CANARY}"),
    "empty name": sized(f": {CANARY}"),
    "no colon": sized(CANARY),
    "NUL in a name": sized(b"X-A\0: " + CANARY.encode()),
    "NUL in a value": sized(b"Authorization: Bearer " + CANARY.encode() + b"\0"),
    "control character in a value": sized(b"X-A: " + CANARY.encode() + b"\x01"),
    "DEL in a value": sized(b"X-A: " + CANARY.encode() + b"\x7f"),
    "separator in a name": sized(f"X(A): {CANARY}"),
    "at sign in a name": sized(f"X@A: {CANARY}"),
    "quote in a name": sized(f'X"A: {CANARY}'),
    "not ASCII in a name": sized(f"X-\u00c4: {CANARY}"),
    "raw bytes in a name": sized(b"X-\xff: " + CANARY.encode()),
    # Host
    "no Host": sized(host=False),
    "two Hosts": sized("Host: other"),
    "two equal Hosts": sized("Host: test"),
    "Host empty": sized("Host:", host=False),
    "Host with user": sized(f"Host: {CANARY}@test", host=False),
    "Host with path": sized(f"Host: test/{CANARY}", host=False),
    "Host with query": sized(f"Host: test?{CANARY}", host=False),
    "Host with fragment": sized(f"Host: test#{CANARY}", host=False),
    "Host with a space": sized(f"Host: test {CANARY}", host=False),
    "Host with a comma": sized("Host: test, other", host=False),
    "Host with a backslash": sized("Host: test\\other", host=False),
    "Host port too large": sized("Host: test:99999", host=False),
    "Host port no number": sized("Host: test:http", host=False),
    "Host port negative": sized("Host: test:-1", host=False),
    "Host port empty brackets": sized("Host: []:80", host=False),
    "Host not ASCII": sized("Host: t\u00e9st", host=False),
    # request line
    "HTTP/0.9": f"GET {CHAT}\r\n\r\n".encode(),
    "HTTP/1.2": sized(start=f"POST {CHAT} HTTP/1.2"),
    "HTTP/2.0": sized(start=f"POST {CHAT} HTTP/2.0"),
    "HTTP/1.10": sized(start=f"POST {CHAT} HTTP/1.10"),
    "HTTP/01.1": sized(start=f"POST {CHAT} HTTP/01.1"),
    "HTTP/1": sized(start=f"POST {CHAT} HTTP/1"),
    "HTTP/1,1": sized(start=f"POST {CHAT} HTTP/1,1"),
    "http/1.1": sized(start=f"POST {CHAT} http/1.1"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version behind a space": sized(start=f"POST {CHAT} "),
    "something behind the version": sized(start=f"POST {CHAT} HTTP/1.1 {CANARY}"),
    "tab for space": sized(start=f"POST\t{CHAT}\tHTTP/1.1"),
    "space in the path": sized(start=f"POST {CHAT} {CANARY} HTTP/1.1"),
    "NUL in the path": sized(start=f"POST {CHAT}\0{CANARY} HTTP/1.1"),
    "raw bytes in the path": sized(start=f"POST {CHAT}".encode() + b"\xff HTTP/1.1"),
    "invalid percent": sized(start=f"POST {CHAT}%zz HTTP/1.1"),
    "percent of bad UTF-8": sized(start=f"POST {CHAT}%ff%fe HTTP/1.1"),
    "percent of NUL": sized(start=f"POST {CHAT}%00 HTTP/1.1"),
    "method in lower case": sized(start=f"post {CHAT} HTTP/1.1"),
    "method unknown": sized(start=f"{CANARY.upper()} {CHAT} HTTP/1.1"),
    "method with a colon": sized(start=f"PO:ST {CHAT} HTTP/1.1"),
    "method empty": sized(start=f" {CHAT} HTTP/1.1"),
    "TRACE": post(f"X-A: {CANARY}", start=f"TRACE {CHAT} HTTP/1.1", body=b""),
    "CONNECT": post(start=f"CONNECT {CANARY}:80 HTTP/1.1", body=b""),
    "CONNECT to a path": post(start=f"CONNECT {CHAT} HTTP/1.1", body=b""),
    "absolute form, another host": sized(start=f"POST http://{CANARY}{CHAT} HTTP/1.1"),
    "absolute form, same host": sized(start=f"POST http://test{CHAT} HTTP/1.1"),
    "authority form": sized(start=f"POST {CANARY}:80 HTTP/1.1"),
    "asterisk": sized(start="POST * HTTP/1.1"),
    "asterisk of OPTIONS": post(start="OPTIONS * HTTP/1.1", body=b""),
    "path without a slash": sized(start=f"POST {CHAT[1:]} HTTP/1.1"),
    "path of 17 KB": sized(start=f"POST {CHAT}?{CANARY * 1700} HTTP/1.1"),
    # other
    "upgrade": sized("Connection: Upgrade", "Upgrade: websocket"),
    "upgrade in two headers": sized("Connection: keep-alive", "Connection: Upgrade", "Upgrade: websocket"),
    "upgrade to a web socket or h2c": sized("Connection: upgrade", "Upgrade: h2c, websocket"),
    "upgrade to a web socket in another header": sized("Connection: upgrade", "Upgrade: h2c", "Upgrade: WebSocket"),
    "upgrade to something unknown": sized("Connection: upgrade", "Upgrade: spdy/3"),
    "upgrade to something like h2c": sized("Connection: upgrade", "Upgrade: h2cx"),
    "upgrade to h2c and back": sized("Connection: upgrade", "Upgrade: h2c;q=1"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + CANARY.encode() * 20,
    "garbage": b"\x00\xff" + CANARY.encode() + b"\r\n\r\n",
    "a line of nothing but colons": b"::::\r\n\r\n",
    "compressed body": sized("Content-Encoding: gzip"),
}
assert len(MALFORMED) >= 90


async def verdict(client: RawClient) -> bytes:
    """What the proxy says before it closes the connection.

    Where it rightly waits for the rest of a chunk that never comes, the client ends the wait.
    """
    waiting = asyncio.create_task(client.closed_by_peer())
    if not (await asyncio.wait({waiting}, timeout=1.0))[0]:
        client.half_close()
    return await waiting


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_parsers_disagree_on_is_refused_and_goes_no_further(
    proxy: Proxy, upstream: RawUpstream, name: str
) -> None:
    upstream.script = toxic.plain(b'{"reached":"upstream"}')
    logged = len(proxy.log)
    async with connected(proxy.port) as client:
        await client.send(MALFORMED[name])
        said = await verdict(client)
    assert upstream.received == b"", "reached the model server"
    assert said.count(b"HTTP/1.1 ") <= 1, "more than one answer"
    if said:  # a connection may also just be closed
        assert int(said.split(b" ", 2)[1]) in REFUSALS, said
        assert CANARY.encode() not in said.lower(), "repeats the input"
        body = json.loads(said.partition(b"\r\n\r\n")[2]) if not MALFORMED[name].startswith(b"HEAD") else {}
        assert body["error"]["message"]
    assert "Traceback" not in proxy.log[logged:]
    assert "unhandled" not in proxy.log[logged:]


ODD_BUT_VALID: dict[str, bytes] = {
    "empty line first": b"\r\n" + sized(),
    "no space behind the colon": sized("X-A:1"),
    "spaces around a value": sized("X-A: \t 1 \t "),
    "tab inside a value": sized("X-A: 1\t2"),
    "names in any case": sized().replace(b"Content-Length", b"cOnTeNt-LeNgTh"),
    "leading zeros in the length": post(f"Content-Length: 000{SIZE}"),
    "coding in capitals": chunked(CHUNKED, "Transfer-Encoding: CHUNKED"),
    "leading zeros in the chunk size": chunked(b"000%x\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "chunk size in capitals": chunked((b"%X\r\n%b\r\n0\r\n\r\n") % (SIZE, BODY)),
    "chunk extension": chunked(b"%x;a=b\r\n%b\r\n0\r\n\r\n" % (SIZE, BODY)),
    "one chunk a byte": chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
    "chunk extension of 1 MB": chunked(b"%x;%b\r\n%b\r\n0\r\n\r\n" % (SIZE, b"a" * 10**6, BODY)),
    "two spaces": sized(start=f"POST  {CHAT} HTTP/1.1"),
    "unknown expectation": sized("Expect: surprise"),
    "trailers": chunked(CHUNK + b"0\r\nX-Trailer: 1\r\n\r\n"),
    "trailer that routes": chunked(CHUNK + b"0\r\nHost: other\r\n\r\n"),
    "expectation of 100": sized("Expect: 100-continue"),
    **{
        f"offer of {offer}, {connection}": sized(f"Connection: {connection}", f"Upgrade: {offer}", SETTINGS)
        for offer in ("h2c", "H2C", "h2c, HTTP/2.0", "h2,h2c", "h2c-14", ", h2c ,", "TLS/1.2", "")
        for connection in ("Upgrade, HTTP2-Settings", "keep-alive, upgrade")
    },
    "offer in two headers": sized("Connection: Upgrade", "Connection: HTTP2-Settings", "Upgrade: h2c", SETTINGS),
    "offer with a chunked body": post(*OFFER, "Transfer-Encoding: chunked", body=CHUNKED),
    "offer with an expectation": sized(*OFFER, "Expect: 100-continue"),
    "offer in HTTP/1.0": sized(*OFFER, start=f"POST {CHAT} HTTP/1.0"),
    "web socket that is not asked for": sized("Upgrade: websocket"),
    "header of 16 KiB": sized("Cookie: s=" + "x" * (16 * 1024 - len("Cookies="))),
    "target of 16 KiB": sized(start=f"POST {CHAT}?{'x' * (16 * 1024 - len(CHAT) - 1)} HTTP/1.1"),
    "IPv6 Host": sized("Host: [::1]:80", host=False),
    "Host without port": sized("Host: localhost", host=False),
    "HTTP/1.0 without Host": sized(start=f"POST {CHAT} HTTP/1.0", host=False),
    "any content type": sized("Content-Type: text/plain"),
    "no content type": sized(),
    "not ASCII in a value": sized("X-A: \u00e9"),
}


@pytest.mark.parametrize("name", ODD_BUT_VALID)
async def test_odd_but_valid_is_served_in_the_proxys_own_words(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    upstream.script = toxic.plain(b'{"reached":"upstream"}')
    async with connected(proxy.port) as client:
        await client.send(ODD_BUT_VALID[name])
        answer = await client.answer()
        if answer.status == 100:
            answer = await client.answer()
    assert (answer.status, answer.body) == (200, b'{"reached":"upstream"}')
    (seen,) = upstream.requests
    assert re.fullmatch(rf"POST {CHAT}(\?x+)? HTTP/1.1", seen.line)
    assert json.loads(seen.body) == json.loads(BODY)
    names = [name for name, _ in seen.headers]
    assert names.count("content-length") == names.count("host") == names.count("content-type") == 1
    assert not {"transfer-encoding", "expect", "x-trailer", "upgrade", "http2-settings"} & set(names)
    assert seen.header("content-type") == "application/json" and seen.header("host") == f"127.0.0.1:{upstream.port}"


NEXT = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"
OFFERED: dict[str, bytes] = {
    "without a body": post(*OFFER, start="GET /health HTTP/1.1", body=b""),
    "with a length": sized(*OFFER),
    "with a length, and line ends in the body": post(
        *OFFER, f"Content-Length: {SIZE + 8}", body=BODY[:1] + b"\r\n\r\n" + BODY[1:] + b"\r\n\r\n"
    ),
    "with chunks": post(*OFFER, "Transfer-Encoding: chunked", body=CHUNKED),
    "with trailers": post(*OFFER, "Transfer-Encoding: chunked", body=CHUNK + b"0\r\nX-Trailer: 1\r\n\r\n"),
}
LARGE = json.dumps({"model": "m", "prompt": "GET / HTTP/1.1 and POST Upgrade" * 30_000}).encode()
"""More than aiohttp takes at a time, with words in it that look like requests."""


@pytest.mark.parametrize("name", OFFERED)
async def test_the_connection_of_an_offer_stays_usable_also_for_what_was_sent_behind_it(
    proxy: Proxy, upstream: RawUpstream, name: str
) -> None:
    upstream.script = toxic.plain(b"{}")
    large = post(*OFFER, f"Content-Length: {len(LARGE)}", body=LARGE)
    many = (OFFERED[name] + NEXT) * 40  # more than aiohttp holds
    several = ((OFFERED[name], 1), (OFFERED[name] + NEXT, 2), (NEXT + OFFERED[name] * 2 + NEXT, 4))
    for wires in (several, ((large + NEXT, 2), (NEXT, 1)), ((many, 80),)):
        async with connected(proxy.port) as client:
            for wire, answers in wires:
                await client.send(wire)
                assert [(await client.answer()).status for _ in range(answers)] == [200] * answers
    assert json.loads(LARGE) in [json.loads(seen.body) for seen in upstream.requests]


@pytest.mark.parametrize("behind", [OFFERED["without a body"], NEXT], ids=["offers", "no offers"])
async def test_more_requests_than_aiohttp_holds_are_answered_behind_an_upload_under_way(behind: bytes) -> None:
    """In this process, as the proxy is to read them in one segment."""
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        remotes = {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
        async with served_here({"remotes": remotes}) as (front, port), connected(port) as client, asyncio.timeout(20):
            await until(lambda: bool(front.clients))
            (proxys_side,) = front.clients
            upload = sized()
            proxys_side.data_received(upload[:-1])
            await until(lambda: not front.quiet.is_set())
            proxys_side.data_received(upload[-1:] + behind * 80)
            assert [(await client.answer()).status for _ in range(81)] == [200] * 81


@pytest.mark.parametrize("step", [1, 7, 64, 150])
@pytest.mark.parametrize("name", OFFERED)
async def test_an_offer_and_what_is_behind_it_are_answered_in_small_segments(name: str, step: int) -> None:
    """In this process, as the proxy is to read each segment by itself."""
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        remotes = {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
        async with served_here({"remotes": remotes}) as (front, port), connected(port) as client:
            await until(lambda: bool(front.clients))
            (proxys_side,) = front.clients
            wire = OFFERED[name] + NEXT + OFFERED[name] + NEXT
            for at in range(0, len(wire), step):
                proxys_side.data_received(wire[at : at + step])
            assert [(await client.answer()).status for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("step", [1, 7])
async def test_the_verdict_is_the_same_in_small_segments(proxy: Proxy, upstream: RawUpstream, step: int) -> None:
    upstream.script = toxic.plain(b"{}")
    for name in (
        "CL.TE smuggling",
        "two lengths that differ",
        "NUL in a value",
        "coding name before a tab",
        "Host empty",
    ):
        raw = MALFORMED[name]
        async with connected(proxy.port) as client:
            with contextlib.suppress(ConnectionError):  # the verdict need not wait for the last byte
                for at in range(0, len(raw), step):
                    await client.send(raw[at : at + step])
            said = await verdict(client)
        assert not said or int(said.split(b" ", 2)[1]) in REFUSALS
        assert CANARY.encode() not in said.lower()
    assert upstream.received == b""


async def test_refusal_is_an_error_in_our_words_with_a_request_id_or_none(proxy: Proxy) -> None:
    async with connected(proxy.port) as client:
        await client.send(b"garbage\r\n\r\n")
        answer = await client.answer()
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error" and answer.error["code"]
    assert "aiohttp" not in str(answer.headers)


async def test_log_lines_cannot_be_forged(proxy: Proxy) -> None:
    word = "forged3b9d"

    def lines() -> list[str]:
        return [line for line in proxy.log.splitlines() if word in line]

    async with connected(proxy.port) as client:
        await client.send(request("GET", f"/x%0d%0a2026-01-01%20ERROR%20{word}%1b[31m", close=True))
        assert (await client.answer()).status == 404
    await until(lambda: any(" 404 " in line for line in lines()), what="the access line")
    assert all("proxy.access" in line and "\x1b" not in line for line in lines())
