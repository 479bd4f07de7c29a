"""Which names in a `Host` header are the proxy's own, and which spellings of a name the configuration takes."""

from __future__ import annotations

import socket

import pytest

from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.hosts import Hosts, is_host

LOOPBACK = ["localhost", "LocalHost:11555", "localhost.", "app.localhost", "localhost.localdomain:80", "ip6-localhost"]
ADDRESSES = ["127.0.0.1", "127.0.0.1:11555", "192.168.1.5:80", "8.8.8.8", "127.1", "0x7f.1", "[::1]", "[fd00::1]:11555"]
SHORT = ["llama-smart-proxy:11555", "proxy", "gpu_box", "xn--bcher-kva", "PROXY:1"]
CONTAINERS = ["host.docker.internal:11555", "Host.Containers.Internal."]
FOREIGN = [
    "evil.example",
    "EVIL.example:11555",
    "evil.example.",
    "127.0.0.1.nip.io",
    "1.2.3.4.5",
    "1.2.3.4x",
    "localhost.evil.example",
    "evil-localhost.example",
    "notlocalhost.localdomain",
    "host.docker.internal.evil.example",
    "xn--80ak6aa92e.com",
    "evil.internal",
    "localhost..",
    "999.999.999.999",
]


def hosts(configured: object = ()) -> Hosts:
    return Hosts(Config.model_validate({"server": {"allow_hosts": configured}}).server.allow_hosts)


@pytest.mark.parametrize("host", LOOPBACK + ADDRESSES + SHORT + CONTAINERS)
def test_names_that_the_dns_cannot_give_away_are_served(host: str) -> None:
    hosts().check(host)


@pytest.mark.parametrize("host", FOREIGN)
def test_all_others_are_refused_however_often_they_come(host: str) -> None:
    served = hosts("chat.example")
    for _ in range(2):
        with pytest.raises(BadRequest, match=r"server\.allow_hosts") as refused:
            served.check(host)
        assert (refused.value.status, refused.value.code) == (403, "forbidden_host")


async def test_the_names_of_this_machine_are_served_once_they_are_known() -> None:
    served, name = hosts(), socket.gethostname().partition(".")[0]
    served.learn_own()
    for own in (name, name.upper(), f"{name}.local:11555", f"{name}.local."):
        served.check(own)
    assert not served.serve(f"{name}.evil.example")


@pytest.mark.parametrize(
    ("configured", "served", "foreign"),
    [
        ("chat.example", ["chat.example", "Chat.Example:443", "chat.example."], ["x.chat.example", "chat.example.x"]),
        (["Chat.Example."], ["chat.example"], []),
        ("a.example, b.example", ["a.example", "b.example"], ["c.example"]),
        ("*.chat.example", ["x.chat.example", "a.b.chat.example"], ["chat.example", "evilchat.example"]),
        ("b\u00fccher.example", ["xn--bcher-kva.example"], ["bucher.example"]),
        ("*", ["evil.example"], []),
    ],
)
def test_the_configured_names_are_served_too(configured: object, served: list[str], foreign: list[str]) -> None:
    own = hosts(configured)
    assert [host for host in served if not own.serve(host)] == []
    assert [host for host in foreign if own.serve(host)] == []


@pytest.mark.parametrize("wrong", ["https://chat.example", "chat.example:80", "a b", "", "a.*", "*.*"])
def test_what_is_no_name_is_a_problem_of_the_configuration(wrong: object) -> None:
    with pytest.raises(ValueError, match="allow_hosts"):
        Config.model_validate({"server": {"allow_hosts": [wrong]}})


def test_a_value_that_was_served_is_not_looked_at_again() -> None:
    served = hosts()
    for number in range(1000):
        served.check(f"n{number}.localhost")
    assert 0 < len(served._served) <= 256


@pytest.mark.parametrize("header", ["a:\uff11\uff11", "a:65536", "a:", "a b", "[::1", "\u0430.example", ""])
def test_what_is_no_host_is_none_with_digits_of_other_scripts_too(header: str) -> None:
    assert not is_host(header)
