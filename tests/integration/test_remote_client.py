"""The client of the commands, against servers that answer in every way."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.cli import remote
from llama_smart_proxy.proxy.cli.remote import Remote
from tests.support.harness import free_port
from tests.support.toxic import Link, RawUpstream, Request, cut_short, raw_upstream


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def ran(command: Callable[[Remote], int] | None = None, *, url: str | None = None, key: str | None = None) -> int:
    """The exit status of a command, by default one that asks for /running."""

    def ask(proxy: Remote) -> int:
        proxy.ask("GET", "/running", timeout_s=5)
        return 0

    return await asyncio.to_thread(remote.run, argparse.Namespace(url=url, key=key), None, command or ask)


def at(server: RawUpstream) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("wire", "status", "text"),
    [
        (answer("200 OK", b"{}"), 0, ""),
        (answer("404 Not Found", b'{"error": {"message": "no such model"}}'), 1, "no such model"),
        (answer("400 Bad Request", b'{"error": "of Ollama"}'), 1, "of Ollama"),
        (answer("500 X", b"<html>"), 1, "is it a llama-smart-proxy?"),
        (answer("401 X", b'{"error": {"message": "no key"}}'), 4, "an API key is required: set LSP_API_KEY, or --key"),
        (
            answer("403 X", b'{"error": {"message": "admin only", "code": "insufficient_scope"}}'),
            4,
            "admin only; --key or LSP_API_KEY names another key",
        ),
        (answer("403 X", b'{"error": {"message": "this host is not allowed"}}'), 1, "this host is not allowed"),
        (answer("302 X", b"", "Location: http://127.0.0.1:1/"), 1, "redirects to http://127.0.0.1:1/, which is not"),
        (answer("200 OK", b"nonsense"), 1, "is no JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", 3, "is incomplete"),
        (b"SSH-2.0-OpenSSH\r\n", 3, "does not answer as a proxy does"),
        (b"", 3, "no proxy is running at"),
    ],
)
async def test_every_answer_is_an_exit_status_and_one_sentence(
    capsys: pytest.CaptureFixture[str], wire: bytes, status: int, text: str
) -> None:
    async with raw_upstream(cut_short(wire, "close")) as server:
        assert await ran(url=at(server)) == status
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == (1 if status else 0)


async def test_a_proxy_that_does_not_answer_is_waited_for_no_longer_than_it_may_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ask(proxy: Remote) -> int:
        proxy.ask("GET", "/running", timeout_s=0.05)
        return 0

    async with raw_upstream() as silent:
        assert await ran(ask, url=at(silent)) == 3
    assert "has not answered within 0.05 s" in capsys.readouterr().err


async def test_where_no_proxy_runs_the_command_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert await ran(url=f"http://127.0.0.1:{free_port()}") == 3
    assert "`llama-smart-proxy serve` starts it; --url or LSP_URL" in capsys.readouterr().err


async def test_the_key_of_the_command_line_is_preferred_and_is_never_sent_where_a_redirect_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LSP_API_KEY", "of-the-environment")
    async with raw_upstream(cut_short(answer("200 OK", b"{}"), "close")) as other:
        redirect = answer("307 X", b"", f"Location: {at(other)}/")
        async with raw_upstream(cut_short(redirect, "close")) as server:
            monkeypatch.setenv("LSP_URL", at(server))
            assert await ran() == 1 and await ran(key="given") == 1
            sent = [link.requests[0].header("authorization") for link in server.links]
            assert sent == ["Bearer of-the-environment", "Bearer given"]
            assert other.links == []


async def test_lines_are_there_as_soon_as_they_are_sent() -> None:
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def script(link: Link, request: Request) -> None:
        await link.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\none\nt\xc3\r\n")
        await seen.wait()
        await link.send(b"3\r\n\xa4o\n\r\n0\r\n\r\n")

    def follow(proxy: Remote) -> int:
        found = []
        for line in proxy.lines(remote.at("logs", "a/b", lines=3)):
            found.append(line)
            loop.call_soon_threadsafe(seen.set)
        assert found == ["one", "täo"]
        return 0

    async with raw_upstream(script) as server:
        assert await ran(follow, url=at(server)) == 0
        assert server.links[0].requests[0].line == "GET /logs/a%2Fb?lines=3 HTTP/1.1"


@pytest.mark.parametrize(
    ("config", "env", "url"),
    [
        (None, {}, "http://127.0.0.1:11555"),
        ("server: {host: 0.0.0.0, port: 8080}", {}, "http://127.0.0.1:8080"),
        ("server: {host: '::', port: 8080}", {}, "http://[::1]:8080"),
        ("server: {port: 8080}\nmodels: {m: {nonsense: 1}}", {}, "http://127.0.0.1:8080"),
        ("server: {port: 8080}", {"LSP_SERVER__PORT": "8081"}, "http://127.0.0.1:8081"),
        ("server: {port: '${P}'}", {"P": "8082"}, "http://127.0.0.1:8082"),
        ("server:", {}, "http://127.0.0.1:11555"),
    ],
)
def test_the_proxy_is_where_serve_listens(tmp_path: Path, config: str | None, env: dict[str, str], url: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(config or "")
    assert remote.configured_url(file if config is not None else None, env) == url


@pytest.mark.parametrize("config", ["server: 3", "server: {port: many}", "server: [", "3"])
def test_an_address_that_the_configuration_does_not_have_is_its_problem(tmp_path: Path, config: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(config)
    with pytest.raises(remote.RemoteError, match=rf"{file}: .*\n--url or LSP_URL"):
        remote.configured_url(file, {})


def test_a_port_that_the_proxy_picks_itself_has_to_be_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server: {port: 0}")
    with pytest.raises(remote.RemoteError, match="--url or LSP_URL"):
        remote.configured_url(file, {})


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a:b", "http://user:pass@a", "http://a?x=1"])
def test_what_is_no_address_is_a_wrong_command_line(url: str) -> None:
    with pytest.raises(remote.RemoteError) as caught:
        Remote(url)
    assert caught.value.status == 2


@pytest.mark.parametrize("key", ["a\r\nX: y", "a b", "ä"])
def test_a_key_cannot_add_headers(key: str) -> None:
    with pytest.raises(remote.RemoteError, match="LSP_API_KEY"):
        Remote("http://127.0.0.1", key)


def test_the_client_starts_without_the_server() -> None:
    code = (
        "import sys, llama_smart_proxy.proxy.cli.remote as r; r.Remote('127.0.0.1:1'); print('aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout == "False\n"
