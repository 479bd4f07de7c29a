"""Secrets, and what is in chats, stay out of the log, of errors, of status pages, and of children."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import orjson
import pytest

from tests.support import raw_client, toxic
from tests.support.e2e_support import Fakes, fakes
from tests.support.harness import ROOT, Proxy, environment, running_proxy, until
from tests.support.toxic import RawUpstream

__all__ = ["fakes"]  # fixtures
C = "c4nary"
"""In all of them, and in nothing else."""
PROMPT = f"my {C}-prompt is here"
RAISES = """
from llama_smart_proxy import Agent
class Raises(Agent):
    command = "raises"
    async def on_request(self, request, ctx):
        import sys
        raise ValueError(request.last_user_text) from RuntimeError(repr(request.body))
"""
PATHS = ("/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses", "/v1/embeddings", "/nothing")
KEY = f"{C}-key-of-a-client"
PAGES = ("/metrics", "/health", "/plugins", "/api/ps", "/v1/models", "/props", "/models", "/running", "/logs/local")
Headers = list[tuple[str, str]]
HEADERS = [
    [("Authorization", f"Bearer {C}-bearer-1")],
    [("Authorization", f"Basic {C}LWJhc2lj")],
    [("Authorization", f"{C}-without-scheme")],
    [("X-Api-Key", f"{C}-x-api-key")],
    [("Cookie", f"session={C}-cookie")],
    [("Proxy-Authorization", f"Bearer {C}-proxy-auth")],
    [("Authorization", f"Bearer {C}-one"), ("Authorization", f"Bearer {C}-two")],
]
MALFORMED = [
    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {C}\0-nul\r\n\r\n",
    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization\t: {C}-space\r\n\r\n",
    f"GET /v1/models HTTP/9.9\r\nHost: x\r\nX-Api-Key: {C}\r\n\r\n",
    f"{C} nonsense\r\nAuthorization: Bearer {C}\r\n\r\n",
    f"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: {C}\r\n\r\n",
]


async def provoke(proxy: Proxy, upstream: RawUpstream, key: Headers) -> list[bytes]:
    """Send secrets in every place, make everything fail, and return what clients got."""
    got = []
    quoting = {"error": {"message": f"cannot parse {PROMPT}", "type": "invalid_request_error"}}
    broken = toxic.stream(toxic.token("x"), toxic.event(quoting))
    for script in (toxic.plain(orjson.dumps(quoting), 400), broken, toxic.cut_short(toxic.stream(), "reset")):
        upstream.script = script
        for path in PATHS:
            for model, text in (("m", PROMPT), ("m", f"/raises {PROMPT}"), ("local", f"/raises {PROMPT}")):
                body = {"model": model, "messages": [{"role": "user", "content": text}], "input": text, "stream": True}
                with suppress(raw_client.BrokenAnswer):  # as Ollama's clients are told
                    answer = await raw_client.post(proxy.port, path, {**body, "max_tokens": 9}, headers=key)
                    got.append(answer.body.replace(f"cannot parse {PROMPT}".encode(), b""))  # the server's own words
    for headers in HEADERS:
        for path in ("/v1/models", "/nothing", "/metrics", f"/v1/models?api_key={C}-query&key={C}&token={C}"):
            got.append((await raw_client.ask(proxy.port, raw_client.request("GET", path, headers=headers))).body)
        unknown = raw_client.request("POST", PATHS[0], {"model": "none"}, headers=headers)
        got.append((await raw_client.ask(proxy.port, unknown)).body)
    for text in MALFORMED:
        got.append((await raw_client.ask(proxy.port, text.encode())).body)
    return got


def configuration(fakes: Fakes, upstream: RawUpstream) -> dict[str, object]:
    (fakes.folder / "raises.py").write_text(RAISES)
    remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"], "api_key": f"{C}-provider-key"}
    dead = {"url": "http://127.0.0.1:9/v1", "api_key": f"{C}-dead"}
    local = fakes.model(fields={"env": {"FAKE_LOG": str(fakes.log)}})
    return fakes.config({"local": local}) | {
        "remotes": {"up": remote, "dead": dead},
        "agents_dirs": [str(fakes.folder)],
        "agents": ["raises"],
    }


@pytest.mark.parametrize(("level", "keyed"), [("info", False), ("debug", True)])
async def test_no_secret_and_no_prompt_is_in_the_log_in_errors_on_status_pages_or_in_children(
    fakes: Fakes, level: str, keyed: bool
) -> None:
    key: Headers = [("Authorization", f"Bearer {KEY}")] if keyed else []
    keys = [{"name": "ops", "key": KEY, "scopes": ["admin"]}] if keyed else []
    async with toxic.raw_upstream() as upstream:
        config = configuration(fakes, upstream) | {"log_level": level, "server": {"api_keys": keys}}
        env = {"HF_TOKEN": f"hf_{C}hubtoken", "OPENAI_API_KEY": f"{C}-of-the-process", "LSP_LOG_FORMAT": "logfmt"}
        async with running_proxy(config, env=env, clean_log=False) as proxy:
            body = {"model": "local", "messages": [{"role": "user", "content": "hi"}]}
            assert (await raw_client.post(proxy.port, PATHS[0], body, headers=key)).status == 200
            got = await provoke(proxy, upstream, key)
            for path in PAGES:
                page = await raw_client.ask(proxy.port, raw_client.request("GET", path, headers=key), method="GET")
                assert page.status == 200, path
                got.append(page.body)
            children = [f"{child.cmdline()} {child.environ()}" for child in proxy.children()]
            assert children and not [child for child in children if C in child]
            assert not keyed or 'key="ops"' in got[-len(PAGES)].decode()  # its name is what metrics and logs have
        assert not [body for body in got if C.encode() in body]
        assert "agent raises failed" in proxy.log and "RuntimeError" in proxy.log and "on_request" in proxy.log
        assert [line for line in proxy.log.splitlines() if C in line] == []


async def test_with_log_content_the_log_has_prompts_and_answers_but_no_secrets(fakes: Fakes) -> None:
    async with toxic.raw_upstream() as upstream:
        config = configuration(fakes, upstream) | {"log_content": True}
        async with running_proxy(config, clean_log=False) as proxy:
            upstream.script = toxic.stream(toxic.token("an ans"), toxic.token("wer"), toxic.DONE)
            text = f"{PROMPT} x_api_key: {C}-key"
            for path in ("/v1/chat/completions", "/api/chat", "/v1/messages"):
                body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 9}
                sent = raw_client.request("POST", path, body, headers=[("X-Request-Id", f"id:{path}")])
                await raw_client.ask(proxy.port, sent)
                asked = f"proxy.log.content: id:{path} "
                await until(lambda asked=asked: asked in proxy.log, what="the line of the chat")  # type: ignore[misc]
                line = next(line for line in proxy.log.splitlines() if asked in line)
                assert PROMPT in line and "] -> an answer" in line and f"{C}-key" not in line
            await raw_client.post(
                proxy.port, PATHS[0], {"model": "m", "messages": [{"role": "user", "content": f"/raises {PROMPT}"}]}
            )
            await until(lambda: f"ValueError: {PROMPT}" in proxy.log, what="what the agent raised")


def test_check_shows_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    remote = {"url": f"http://u:{C}-url@127.0.0.1:9", "api_key": f"{C}-key", "modelz": f"{C}-field"}
    file.write_text(orjson.dumps({"remotes": {"r": remote}, "server": {"port": f"{C}-port"}}).decode())
    argv = [sys.executable, "-m", "llama_smart_proxy", "check", "--config", str(file)]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and C not in done.stdout + done.stderr
