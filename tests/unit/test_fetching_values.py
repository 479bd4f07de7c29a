"""Which addresses are public, which URLs are fetched, and what a cache keeps."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama_smart_proxy.proxy.config.knowledge import KnowledgeConfig
from llama_smart_proxy.proxy.fetching.cache import TimedCache
from llama_smart_proxy.proxy.fetching.fetcher import following
from llama_smart_proxy.proxy.fetching.guard import DENIED, Guard, Private, Refused, is_public, parsed
from tests.support.laws import law

PUBLIC = ["1.1.1.1", "9.9.9.9", "100.63.255.255", "100.128.0.0", "172.15.255.255", "172.32.0.1", "192.0.1.0"]
PUBLIC += ["11.0.0.0", "126.255.255.255", "128.0.0.1", "169.253.0.1", "223.255.255.255", "198.17.0.1", "198.20.0.1"]
PUBLIC += ["2606:4700:4700::1111", "2a00::1", "2001:4860:4860::8888", "2001:200::1", "2003::1", "2620:fe::fe"]
PRIVATE = ["0.0.0.0", "10.0.0.0", "100.64.0.0", "100.127.255.255", "127.0.0.1", "169.254.169.254", "172.16.0.0"]
PRIVATE += ["172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255"]
PRIVATE += ["198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"]
PRIVATE += ["::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8"]
PRIVATE += [
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "100:0:0:1::1",
    "2001::1",
    "2001:0:7f00:1::",
]
PRIVATE += ["2001:1::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::"]
PRIVATE += ["3fff::1", "3fff:fff::1", "5f00::1", "fc00::1", "fd00::1", "fe80::1", "fe80::1%eth0", "febf::1", "fec0::1"]
PRIVATE += ["2001:0:7f00:1::", "ff02::1", "ff0e::1", "2a00::1%1", "127.1", "0x7f.1", "localhost", ""]


@pytest.mark.parametrize(("address", "public"), [*((a, True) for a in PUBLIC), *((a, False) for a in PRIVATE)])
def test_an_address_is_public_or_not(address: str, public: bool) -> None:
    assert is_public(address) is public


@law(8000)
@given(st.one_of(st.ip_addresses(), *(st.ip_addresses(network=str(network)) for network in DENIED)))
def test_no_address_is_public_that_python_knows_as_private(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    known = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    known |= address.is_reserved or address.is_unspecified or not address.is_global
    if isinstance(address, ipaddress.IPv6Address):
        known |= address.is_site_local or None is not (address.ipv4_mapped or address.sixtofour or address.teredo)
    assert not (known and is_public(str(address)))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://example.com", "http://example.com"),
        ("HTTPS://Example.COM:8443/A?b#c", "https://example.com:8443/A?b"),
        ("http://example.com:80/a/../b", "http://example.com/b"),
        ("http://bücher.example/ü", "http://xn--bcher-kva.example/%C3%BC"),
        ("http://xn--bcher-kva.example/", "http://xn--bcher-kva.example/"),
        ("http://faß.example/", "http://xn--fa-hia.example/"),
        ("http://a_b.example./", "http://a_b.example./"),
        ("http://1.2.3.4/", "http://1.2.3.4/"),
        ("http://[2606:4700::1]/", "http://[2606:4700::1]/"),
        ("http://example.com/@a:b", "http://example.com/@a:b"),
        ("http://example.com/?q=http://a@b", "http://example.com/?q=http://a@b"),
    ],
)
def test_urls_are_normalised(text: str, url: str) -> None:
    assert str(parsed(text)) == url


@pytest.mark.parametrize(
    "text",
    [
        *("http://1.2.3/", "http://1/", "http://1.2.3.4./", "http://0x1.2.3.4/", "http://1.2.3.0x4/", "http://a.1/"),
        *("http://-a.example/", "http://a-.example/", "http://a..example/", "http://.example/", "http://a b/"),
        *("http://" + "a" * 64 + ".example/", "http://" + "a." * 130 + "example/", "http://exam%70le.com/"),
        *("http://example.com:0/", "http://example.com:65536/", "http://example.com:x/", "http://example.com:-1/"),
        *("http://a@example.com/", "http://:@example.com/", "http://@example.com/", "http://example.com\\@b/"),
        *(
            "http://[::1",
            "http://::1/",
            "http://[a]/",
            "http://[::1%25lo]/",
            "http://\u3000/",
            "http://\u202e.example/",
        ),
        *("http:example.com", "http:///example.com", "//example.com/", "example.com", "mailto:a@example.com"),
    ],
)
def test_odd_urls_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        parsed(text)


@law(4000)
@given(st.text(max_size=40) | st.text("htp:/@\\[]%.#?0127.x ", max_size=40).map("http://".__add__))
def test_any_text_is_a_url_that_stays_the_same_or_is_refused(text: str) -> None:
    try:
        url = parsed(text)
    except Refused:
        return
    assert url.scheme in ("http", "https") and url.raw_host and url.user is None
    assert parsed(str(url)) == url


@pytest.mark.parametrize(
    ("base", "location", "url"),
    [
        ("https://a.example/b/c", "d", "https://a.example/b/d"),
        ("https://a.example/b", "//c.example/", "https://c.example/"),
        ("http://a.example/b", "https://a.example/b#x", "https://a.example/b"),
        ("https://a.example/", "http://a.example/", None),
        ("https://a.example/", "ftp://a.example/", None),
        ("https://a.example/", "http://[", None),
    ],
)
def test_a_redirect_leads_to_a_url_but_not_from_https_to_http(base: str, location: str, url: str | None) -> None:
    if url is None:
        with pytest.raises(Refused):
            following(parsed(base), location)
    else:
        assert str(following(parsed(base), location)) == url


def test_exceptions_are_hosts_and_networks() -> None:
    private = Private(["Docs.LAN", "bücher.lan", "192.168.7.1", "::1", "10.1.0.0/16", "fd00::/8"])
    for named in (
        "http://docs.lan:3000/",
        "http://docs.lan./",
        "http://xn--bcher-kva.lan/",
        "http://192.168.7.1/",
        "http://[::1]/",
    ):
        assert private.names_host(parsed(named))
    for other in ("http://xdocs.lan/", "http://docs.lan.example/", "http://10.1.2.3/", "http://192.168.7.2/"):
        assert not private.names_host(parsed(other))
    guard = Guard(private.networks)
    assert guard.permits("10.1.2.3") and guard.permits("fd12::1") and guard.permits("1.1.1.1")
    assert not guard.permits("10.2.0.1") and not guard.permits("192.168.7.1") and not guard.permits("::1")


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "",
            "*",
            "*.lan",
            "http://docs.lan",
            "docs.lan:3000",
            "docs.lan/",
            "a b",
            "127.1",
            "10.1.2.3/16",
            "10.0.0.0/33",
        ),
        *("a?b", "a#b", "a@b", "a\\b", "[::1]", "::1%lo", "::g", "x" * 254),
    ],
)
def test_what_is_neither_a_host_nor_a_network_is_no_exception(entry: str) -> None:
    with pytest.raises(ValueError):
        Private([entry])
    with pytest.raises(ValidationError, match=r"must be a host such as docs\.lan, or a network such as 10\.1\.0\.0/16"):
        KnowledgeConfig(allow_private=[entry])


@law(4000)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 60), st.floats(0, 5)), max_size=40))
def test_a_cache_is_bounded_and_forgets_in_time(puts: list[tuple[str, int, float]]) -> None:
    now_s = 0.0
    cache: TimedCache[int] = TimedCache(10.0, 100, clock=lambda: now_s)
    kept: dict[str, tuple[float, int]] = {}
    for number, (key, size, pause_s) in enumerate(puts):
        cache.put(key, number, size)
        kept[key] = now_s, number
        assert cache.bytes <= 100 and (cache.get(key) == number)
        now_s += pause_s
        for other, (put_s, value) in kept.items():
            assert cache.get(other) in ({None} if now_s >= put_s + 10 else {None, value})


def test_what_was_used_longest_ago_is_forgotten_first_and_what_is_too_large_is_not_kept() -> None:
    cache: TimedCache[str] = TimedCache(10.0, 100)
    for key in "abc":
        cache.put(key, key, 33)
    cache.get("a")
    cache.put("d", "d", 33)
    cache.put("e", "e", 101)
    assert [cache.get(key) for key in "abcde"] == ["a", None, "c", "d", None] and len(cache) == 3
    cache.put("a", "new", 101)
    assert cache.get("a") is None and cache.bytes == 66
