"""The examples for reverse proxies, with the real ones where they are installed."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e_support import CHAT, Fakes, Gate, body_of
from tests.support.harness import PATIENCE_S, ROOT, companions, environment, free_port, running_proxy, until
from tests.support.raw_client import connected, request

PAGE = (ROOT / "docs" / "reverse-proxy.md").read_text(encoding="utf-8")
NAME = "llm.example"
NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 64; }}
http {{
  access_log off;
  proxy_ignore_headers X-Accel-Buffering;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  {example}
}}
"""
"""One process: without a master, nginx keeps the user it was started as. It ignores our header against buffering, so
that the example has to be enough."""


def example(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def without_tls(text: str, port: int, upstream: int) -> str:
    """The example at other ports, and without the certificate, which is not here."""
    text, count = re.subn(r"listen 443 ssl;", f"listen 127.0.0.1:{port};", text)
    text, certificates = re.subn(r"ssl_certificate.*\n", "\n", text)
    text, passes = re.subn(r"http://127\.0\.0\.1:11555", f"http://127.0.0.1:{upstream}", text)
    assert (count, certificates, passes) == (1, 2, 1)
    assert all(f" {line};" in text for line in ("proxy_buffering off", "proxy_cache off", "gzip off"))
    return text


@contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[int]:
    """A real nginx with the example in front of the port; yields its own one, at which it will listen."""
    port, file = free_port(), folder / "nginx.conf"
    file.write_text(NGINX.format(folder=folder, example=without_tls(example("nginx"), port, upstream)))
    argv = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(file)]
    tested = subprocess.run([*argv, "-t"], capture_output=True, text=True, env=environment())
    assert tested.returncode == 0 and "warn" not in tested.stderr, tested.stderr
    process = subprocess.Popen(argv, env=environment())
    companions.add(process.pid)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


async def accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
async def test_tokens_pass_nginx_as_they_come_and_a_client_that_leaves_is_noticed(tmp_path: Path) -> None:
    fakes, gate = Fakes(tmp_path), Gate(tmp_path)
    config = fakes.config({"m": fakes.model()}) | {"server": {"allow_hosts": [NAME]}}
    body = body_of("m", stream=True, fake={"tokens": 5, "last_at": str(gate)})
    async with running_proxy(config) as proxy:
        with nginx(tmp_path, proxy.port) as port:
            await until(lambda: accepts(port), what="nginx")
            await check_streams(port, body, gate, fakes)


async def check_streams(port: int, body: dict[str, Any], gate: Gate, fakes: Fakes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async with connected(port) as client:
            await client.send(named(request("POST", CHAT, body)))
            first = await client.reader.readuntil(b"t1 ")
            assert first.startswith(b"HTTP/1.1 200 ")
            gate.open()  # only now comes the last token
            assert b"[DONE]" in first + await client.reader.readuntil(b"[DONE]")
        endless = body | {"fake": {"tokens": 5, "last_at": f"{gate} of another"}}
        async with connected(port) as client:
            await client.send(named(request("POST", CHAT, endless)))
            await client.reader.readuntil(b"t1 ")
        await until(lambda: fakes.events("closed"), what="the end of the generation")


def named(data: bytes) -> bytes:
    """The request with the name that clients know."""
    return re.sub(rb"\r\nHost: [^\r]*", b"\r\nHost: " + NAME.encode(), data, count=1)


def test_caddys_example_forwards_to_the_default_port_without_buffering() -> None:
    text = example("caddy")
    assert text.count("{") == text.count("}") and text.startswith(f"{NAME} {{")
    assert re.search(r"reverse_proxy 127\.0\.0\.1:11555 \{\n\s+flush_interval -1\n", text)
