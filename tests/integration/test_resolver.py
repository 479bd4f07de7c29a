"""Look-ups of names: shared, remembered for a short time, and all addresses of a name tried."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http import connection, resolver
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.resolver import Resolver, is_address
from llama_smart_proxy.proxy.errors import UpstreamFailed
from tests.support.harness import free_port, until
from tests.support.toxic import plain, raw_upstream

GET = UpstreamRequest("GET", "/x")


class Dns:
    """Stands in for the machine's resolver: `names` are the addresses of each name; others do not exist. No look-up is
    answered while `gate` is not set."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def getaddrinfo(self, host: str, port: Any, *_: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        self.gate.wait()
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [self._info(address) for address in self.names[host]]

    @staticmethod
    def _info(address: str) -> tuple[Any, ...]:
        family, place = (socket.AF_INET6, (address, 0, 0, 0)) if ":" in address else (socket.AF_INET, (address, 0))
        return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", place


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> Dns:
    found = Dns()
    monkeypatch.setattr(socket, "getaddrinfo", found.getaddrinfo)
    monkeypatch.setattr(connection, "resolver", Resolver())
    return found


async def test_all_who_wait_for_a_name_share_one_look_up_and_its_answer_is_remembered(dns: Dns) -> None:
    names = Resolver()
    dns.names = {"gpu-box": ["10.0.0.1"], "other": ["10.0.0.2"]}
    dns.gate.clear()
    waiting = [asyncio.ensure_future(names.addresses("GPU-box", port)) for port in range(20)]
    await until(lambda: dns.asked)
    waiting[0].cancel()
    other = asyncio.ensure_future(names.addresses("other", 1))
    await until(lambda: len(dns.asked) == 2)
    dns.gate.set()
    found = await asyncio.gather(*waiting[1:], other)
    assert [info[0][4] for info in found] == [*(("10.0.0.1", port) for port in range(1, 20)), ("10.0.0.2", 1)]
    await names.addresses("gpu-box", 1)
    assert dns.asked == ["gpu-box", "other"]


async def test_that_a_name_does_not_exist_is_remembered_for_a_shorter_time(
    dns: Dns, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Resolver()
    for _ in range(3):
        with pytest.raises(socket.gaierror, match="not known"):
            await names.addresses("nowhere", 1)
    assert dns.asked == ["nowhere"]
    monkeypatch.setattr(resolver, "FAILED_S", 0.0)
    with pytest.raises(socket.gaierror):
        await names.addresses("gpu-box", 1)
    dns.names["gpu-box"] = ["10.0.0.1"]
    for _ in range(3):
        assert len(await names.addresses("gpu-box", 1)) == 1
    assert dns.asked == ["nowhere", "gpu-box", "gpu-box"]


async def test_addresses_and_localhost_are_not_looked_up(dns: Dns) -> None:
    async with raw_upstream(plain(b"{}")) as upstream:
        for host in ("127.0.0.1", "localhost", "LocalHost", "app.localhost"):
            pool = ConnectionPool(Endpoint(host, upstream.port))
            assert await pool.fetch(GET, timeout_s=30) == (200, b"{}")
            pool.close("the test is over")
    assert dns.asked == []
    assert [is_address(text) for text in ("::1", "fe80::1%eth0", "10.0.0.1", "gpu-box")] == [True, True, True, False]


@pytest.mark.parametrize("addresses", [["::1", "127.0.0.1"], ["127.0.0.2", "127.0.0.3", "127.0.0.1"]])
async def test_all_addresses_of_a_name_are_tried(dns: Dns, addresses: list[str]) -> None:
    dns.names["gpu-box"] = addresses
    async with raw_upstream(plain(b"{}")) as upstream:
        pool = ConnectionPool(Endpoint("gpu-box", upstream.port))
        assert await pool.fetch(GET, timeout_s=30) == (200, b"{}")
        pool.close("the test is over")


async def test_a_name_is_looked_up_anew_if_none_of_its_addresses_can_be_reached(dns: Dns) -> None:
    dns.names["gpu-box"] = ["127.0.0.2"]
    async with raw_upstream(plain(b"{}")) as upstream:
        pool = ConnectionPool(Endpoint("gpu-box", upstream.port))
        with pytest.raises(UpstreamFailed, match="cannot connect to http://gpu-box:"):
            await pool.fetch(GET, timeout_s=30)
        dns.names["gpu-box"] = ["127.0.0.1"]
        assert await pool.fetch(GET, timeout_s=30) == (200, b"{}")
        pool.close("the test is over")


@pytest.mark.parametrize("host", ["nowhere.example", "a" * 64 + ".example", "a..example", "\u0378.example"])
async def test_a_name_without_addresses_is_a_failed_connection(dns: Dns, host: str) -> None:
    pool = ConnectionPool(Endpoint(host, free_port()))
    with pytest.raises(UpstreamFailed, match="cannot connect to") as failed:
        await pool.fetch(GET, timeout_s=30)
    assert (failed.value.status, failed.value.code) == (502, connection.UNREACHABLE)
