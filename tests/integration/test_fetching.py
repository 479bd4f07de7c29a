"""The guarded client: which addresses it never connects to, and what it takes of a page."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc
import zlib

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.fetching import Fetcher, FetchError, Limits, Page
from tests.support.fetched import HAS_IPV6, HTML, LOCAL, PAGE, canaries, fetching
from tests.support.harness import until
from tests.support.toxic import Link, Request, Script, chunk, head, raw_upstream

LOOPBACKS = [
    *("127.0.0.1", "127.0.0.2", "127.255.255.254", "127.1", "127.0.1", "2130706433", "017700000001", "0177.0.0.1"),
    *("0x7f.1", "0x7f000001", "0x7f.0.0.1", "127.0.0.01", "127.000.000.001", "0", "0.0.0.0", "000.0.0.0", "127.0.0.1."),
    *("①②⑦.⓪.⓪.①", "127。0。0。1", "\uff11\uff12\uff17.0.0.1", "127.0.0.1。", "%31%32%37.0.0.1", "127%2e0%2e0%2e1"),
    *("localhost", "LOCALHOST", "localhost.", "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ", "rebound.example", "both.example", "private6.example"),
    *("[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]"),
    *("[2001:0:7f00:1::]", "[fec0::1]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00::1]", "[ff02::1]"),
    *("[::1%25lo]", "[100::1]", "[2001:db8::1]", "[5f00::1]", "[3fff::1]", "[v1.127.0.0.1]"),
    *("10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "169.254.169.254", "192.0.0.8"),
    *("198.18.0.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
]  # fmt: skip
URLS = [
    *(f"http://{host}:{{port}}/" for host in LOOPBACKS),
    *("https://127.0.0.1:{port}/", "https://[::1]:{port}/", "HTTP://127.0.0.1:{port}/"),
    *("http://user@127.0.0.1:{port}/", "http://user:word@127.0.0.1:{port}/", "http://@127.0.0.1:{port}/"),
    *("http://public.example@127.0.0.1:{port}/", "http://127.0.0.1:{port}@public.example/"),
    *("http://public.example\\@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@public.example/"),
    *("http://127.0.0.1:{port}#@public.example/", "http://127.0.0.1:{port}?@public.example/"),
    *("//127.0.0.1:{port}/", "127.0.0.1:{port}", "http:127.0.0.1:{port}", "http:/127.0.0.1:{port}/"),
    *("ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_GET", "dict://127.0.0.1:{port}/", "ws://127.0.0.1:{port}/"),
    *("file:///etc/passwd", "data:text/html,hello", "javascript:alert(1)", "unix:///run/x.sock", "about:blank", ""),
    *(" http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/\r\nHost: x", "http://127.0.0.1\t:{port}/"),
    *("http://127.0.0.1:{port}/" + "a" * 5000, "http://", "http://:{port}/", "http://[127.0.0.1]:{port}/"),
]  # fmt: skip


class Names(AbstractResolver):
    """A resolver that gives each name its next list of addresses, the last one again and again."""

    def __init__(self, **names: list[list[str]]) -> None:
        self._names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        answers = self._names.get(host.rstrip("."), [["127.0.0.1", "::1"]])
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": 0,
            }
            for address in found
        ]

    async def close(self) -> None:
        """Nothing is held."""


async def test_no_form_of_a_private_address_is_connected_to() -> None:
    assert len(URLS) >= 60
    names = Names(private6_example=[["::1"]], both_example=[["::ffff:127.0.0.1", "10.0.0.1", "fe80::1"]])
    async with canaries() as (port, connections), fetching(Fetcher(ports=None, resolver=names)) as fetcher:
        for url in URLS:
            with pytest.raises(FetchError) as caught:
                await fetcher.get(url.format(port=port))
            assert caught.value.refused, f"{url}: {caught.value}"
        assert connections == []


async def test_the_canaries_would_be_heard() -> None:
    async with canaries() as (port, connections):
        open_to = Fetcher(ports=None, resolver=Names(), allow_private=["0.0.0.0/0", "::/0"])
        async with fetching(open_to) as fetcher:
            for host in ("127.0.0.1", "127.0.0.9", "rebound.example", *["[::1]"] * HAS_IPV6):
                assert (await fetcher.get(f"http://{host}:{port}/")).data == b"ok"
    expected = {"127.0.0.1", "127.0.0.9", *["::1"] * HAS_IPV6}
    assert set(connections) == expected and len(connections) == len(expected) + 1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "rebound.example", "2130706433"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_does_not_lead_to_a_private_address(host: str, status: int) -> None:
    names = Names(site_example=[["127.0.0.2"]], rebound_example=[["127.0.0.1"]])
    async with canaries() as (port, connections):
        script = head(status, [("Location", f"http://{host}:{port}/"), ("Content-Length", "0")])
        async with raw_upstream(script, host="127.0.0.2") as site:
            public = Fetcher(ports=None, resolver=names, allow_private=["127.0.0.2/32"])  # as if it were public
            async with fetching(public) as fetcher:
                with pytest.raises(FetchError) as caught:
                    await fetcher.get(f"http://site.example:{site.port}/")
        assert caught.value.refused and len(site.requests) == 1 and connections == []


async def test_a_name_that_resolves_to_another_address_each_time_leads_nowhere_private() -> None:
    names = Names(site_example=[["127.0.0.2"], ["127.0.0.1"]])
    async with canaries() as (port, connections):
        script = head(302, [("Location", f"http://site.example:{port}/again"), ("Content-Length", "0")])
        async with raw_upstream(script, host="127.0.0.2") as site:
            public = Fetcher(ports=None, resolver=names, allow_private=["127.0.0.2/32"])
            async with fetching(public) as fetcher:
                with pytest.raises(FetchError, match="not a public one"):
                    await fetcher.get(f"http://site.example:{site.port}/")
        assert names.asked == ["site.example"] * 2 and connections == []


async def test_of_a_names_addresses_only_the_public_ones_are_connected_to() -> None:
    names = Names(site_example=[["::1", "127.0.0.1", "127.0.0.2"]])
    async with canaries() as (port, connections):
        public = Fetcher(ports=None, resolver=names, allow_private=["127.0.0.2/32"])
        async with fetching(public) as fetcher:
            assert (await fetcher.get(f"http://site.example:{port}/")).data == b"ok"
    assert connections == ["127.0.0.2"]


async def test_a_host_that_was_named_may_be_private_but_is_not_reached_from_a_public_one() -> None:
    names = Names(docs_lan=[["127.0.0.1"]], site_example=[["127.0.0.2"]])
    async with raw_upstream(PAGE) as docs:
        moved = head(302, [("Location", f"http://docs.lan:{docs.port}/"), ("Content-Length", "0")])
        async with raw_upstream(moved, host="127.0.0.2") as site:
            intranet = Fetcher(ports={site.port}, resolver=names, allow_private=["docs.lan", "127.0.0.2/32"])
            async with fetching(intranet) as fetcher:
                assert (await fetcher.get(f"http://docs.lan:{docs.port}/")).data == b"ok"
                with pytest.raises(FetchError) as caught:
                    await fetcher.get(f"http://site.example:{site.port}/")
        assert caught.value.refused and len(docs.requests) == 1


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://site.example/", "only URLs of http"),
        ("file:///etc/passwd", "only URLs of http"),
        ("http://user@127.0.0.2/", "user name"),
        ("http://127.0.0.2:25/", "port 25"),
        ("http://[", "not valid"),
        ("http://127.0.0.2\\@site.example/", "not valid"),
    ],
)
async def test_a_redirect_is_checked_as_the_first_url_was(location: str, message: str) -> None:
    moved = head(302, [("Location", location), ("Content-Length", "0")])
    async with raw_upstream(moved) as site, fetching(Fetcher(ports={site.port}, allow_private=LOCAL)) as fetcher:
        with pytest.raises(FetchError, match=message):
            await fetcher.get(f"http://127.0.0.1:{site.port}/")


@pytest.mark.parametrize(("times", "arrives"), [(3, True), (4, False)])
async def test_three_redirects_are_followed(times: int, arrives: bool) -> None:
    async def script(link: Link, request: Request) -> None:
        at = int(request.line.split()[1].rpartition("/")[2])
        moved = head(302, [("Location", f"../a/{at - 1}"), ("Set-Cookie", "a=b"), ("Content-Length", "0")])
        await link.send(moved if at else PAGE)

    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        fetch = fetcher.get(f"http://127.0.0.1:{site.port}/a/{times}")
        if arrives:
            assert (await fetch).url == f"http://127.0.0.1:{site.port}/a/0"
        else:
            with pytest.raises(FetchError, match="redirects more than 3 times"):
                await fetch
        assert len(site.requests) == 4
        assert {name for request in site.requests for name, _ in request.headers} == {
            *("host", "accept", "accept-encoding", "user-agent", "connection")
        }
        assert site.requests[0].header("user-agent") == f"llama-smart-proxy/{__version__}"


# -- limits ------------------------------------------------------------------------------------------------------------


async def send_forever(link: Link, request: Request) -> None:
    await link.send(head(200, [HTML, ("Transfer-Encoding", "chunked")]))
    while True:
        await link.send(chunk(b"x" * 2**16))


async def send_bomb(link: Link, request: Request) -> None:
    compressor, zeros = zlib.compressobj(wbits=16 + zlib.MAX_WBITS), bytes(2**20)
    data = b"".join(compressor.compress(zeros) for _ in range(40)) + compressor.flush()
    length = ("Content-Length", str(len(data)))
    await link.send(head(200, [HTML, ("Content-Encoding", "gzip"), length]) + data)


async def drip(link: Link, request: Request) -> None:
    await link.send(head(200, [HTML, ("Transfer-Encoding", "chunked")]))
    while True:
        await link.send(chunk(b"x"))
        await asyncio.sleep(0.02)  # a slow server


async def stay_silent(link: Link, request: Request) -> None:
    await link.gone()


def typed(*headers: tuple[str, str]) -> bytes:
    return head(200, [*headers, ("Content-Length", "2")]) + b"ok"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param(send_forever, "larger than 0.25 MiB", id="endless"),
        pytest.param(send_bomb, "larger than 0.25 MiB", id="bomb"),
        pytest.param(head(200, [HTML, ("Content-Length", "262145")]), "larger than 0.25 MiB", id="declared"),
        pytest.param(drip, "within 0.5 seconds", id="drip"),
        pytest.param(stay_silent, "within 0.5 seconds", id="silent"),
        pytest.param(typed(("Content-Type", "image/png")), "type image/png", id="type"),
        pytest.param(typed(), "type .none", id="no type"),
        pytest.param(typed(("Content-Type", "application/octet-stream")), "is not read", id="binary"),
        pytest.param(head(404, [HTML, ("Content-Length", "0")]), "answered 404", id="status"),
        pytest.param(head(302, [("Content-Length", "0")]), "answered 302", id="moved to nowhere"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", "valid answer", id="not HTTP"),
        pytest.param(head(200, [HTML, ("X", "y" * 100_000)]), "valid answer", id="header"),
        pytest.param(
            head(200, [HTML, ("Content-Encoding", "gzip"), ("Content-Length", "2")]) + b"no", "valid answer", id="gzip"
        ),
    ],
)
async def test_a_fetch_ends_at_its_limits(script: Script, message: str) -> None:
    limits = Limits(max_bytes=2**18, total_s=0.5 if "seconds" in message else 60)
    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        with pytest.raises(FetchError, match=message):
            await fetcher.get(f"http://127.0.0.1:{site.port}/", limits=limits)
        await site.links[0].gone()
        assert len(site.requests) == 1


async def test_a_bomb_is_decompressed_piece_by_piece() -> None:
    """The rest of it is not decompressed: that would take 64 MiB for what arrives in one read."""
    async with raw_upstream(send_bomb) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        tracemalloc.start()
        try:
            with pytest.raises(FetchError, match="larger than 1 MiB"):
                await fetcher.get(f"http://127.0.0.1:{site.port}/", limits=Limits(max_bytes=2**20))
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("value", ["text/html", "Text/HTML; charset=latin-1", "application/pdf", "text/markdown"])
async def test_a_page_has_the_type_and_charset_of_its_header(value: str) -> None:
    answer = typed(("Content-Type", value))
    async with raw_upstream(answer) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        page = await fetcher.get(f"http://127.0.0.1:{site.port}/x?y#z")
    charset = "latin-1" if "charset" in value else ""
    assert page == Page(f"http://127.0.0.1:{site.port}/x?y", value.lower().partition(";")[0], charset, b"ok")


@pytest.mark.parametrize(("value", "seconds"), [("7", 7), ("999999", 3600), ("x", None), ("-1", None)])
async def test_what_a_server_asks_for_is_passed_on(value: str, seconds: int | None) -> None:
    answer = head(429, [("Retry-After", value), ("Content-Length", "0")])
    async with raw_upstream(answer) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        with pytest.raises(FetchError) as caught:
            await fetcher.get(f"http://127.0.0.1:{site.port}/")
    assert (caught.value.status, caught.value.retry_after_s) == (429, seconds)


@pytest.mark.parametrize("script", [drip, stay_silent])
async def test_a_cancelled_fetch_leaves_no_connection_and_no_task(script: Script) -> None:
    tasks = asyncio.all_tasks()
    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        fetch = asyncio.ensure_future(fetcher.get(f"http://127.0.0.1:{site.port}/"))
        await until(lambda: site.requests)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        await site.links[0].gone()
        assert {task for task in asyncio.all_tasks() - tasks if "Link._serve" not in repr(task)} == set()
