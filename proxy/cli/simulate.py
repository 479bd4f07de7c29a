"""`llama-smart-proxy simulate`: tests an installation with the configured models."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

from llama_smart_proxy.proxy.config import Config, load_config

START_S = 20.0
ANSWER_S = 900.0
"""A first answer may include a download and a slow load."""
MESSAGES = [{"role": "user", "content": "Say hello in five words."}]


def run(path: Path | None) -> int:
    """Start the proxy with the configuration at `path`, on a free port and with a pool of size 1, so that a second
    model causes a swap. Returns 0 if every step passed, else 1. Raises: ConfigError."""
    config = load_config(path, env=os.environ, overrides={})
    return asyncio.run(_until_signal(_simulate(config, path)))


Ask = Callable[[aiohttp.ClientSession, str], Awaitable[str]]
"""Sends a request to a model; returns what to print."""


class StepFailed(Exception):
    """A step did not return the expected result."""


def _expect(ok: object, message: str) -> None:
    if not ok:
        raise StepFailed(message)


async def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    """The result of `work`. SIGTERM and SIGHUP cancel it, as Ctrl-C does, so that the proxy ends with it."""
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def cancel(number: signal.Signals) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, cancel, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not received:
            raise
        return 128 + received[0]


async def _simulate(config: Config, path: Path | None) -> int:
    port = _free_port()
    command = [sys.executable, "-P", "-m", "llama_smart_proxy", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--log-level", "warning", "--log-format", "text", *(["--config", str(path)] if path else [])]
    key = secrets.token_urlsafe(32)  # in place of those of its clients, which may be known by their hashes alone
    keys = json.dumps([{"name": "simulate", "key": key, "scopes": ["admin"]}])
    env = os.environ | {"LSP_SERVER_POOL__SIZE": "1", "LSP_SERVER__API_KEYS": keys}
    process = await asyncio.create_subprocess_exec(*command, env=env)
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(url, timeout=timeout, headers=headers) as session:
            return await _steps(session, config, process)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


async def _steps(session: aiohttp.ClientSession, config: Config, process: asyncio.subprocess.Process) -> int:
    chats, embedder = _models(config)
    verdicts: list[str] = []

    async def step(name: str, work: Callable[[], Awaitable[str]]) -> bool:
        started = time.monotonic()
        try:
            detail, verdict = await work(), "pass"
        except (aiohttp.ClientError, TimeoutError, StepFailed, KeyError, ValueError) as exc:
            detail, verdict = f"{type(exc).__name__}: {exc}", "FAIL"
        verdicts.append(verdict)
        _print(name, verdict, f"{time.monotonic() - started:7.2f} s  {detail[:160]}")
        return verdict == "pass"

    if await step("proxy starts", lambda: _ready(session, process)):
        await step("model list", lambda: _list(session))
        if chats:
            await step("chat", lambda: _chat(session, chats[0]))
            await step("chat, streamed", lambda: _stream(session, chats[0]))
        if embedder:
            await step("embedding", lambda: _embed(session, embedder))
            if chats and config.helpers and config.is_helper(embedder, config.models[embedder]):
                await step("helper beside it", lambda: _both(session, chats[0], embedder))
            elif chats:
                await step("model swap", lambda: _swap(session, chats[0], embedder, _embed))
        if chats[1:]:
            await step("model swap", lambda: _swap(session, chats[0], chats[1], _chat))
        await step("health", lambda: _healthy(session))
    for name in [*([] if chats else ["chat"]), *([] if embedder else ["embedding"])]:
        _print(name, "skip", f"{'':9}  no such model is configured")
    return 0 if set(verdicts) == {"pass"} else 1


def _models(config: Config) -> tuple[list[str], str | None]:
    """The chat models, and the embedding model if one is configured."""
    chats, embedder = [], None
    for name, model in config.models.items():
        if model.embeds:
            embedder = embedder or name
        else:
            chats.append(name)
    return chats, embedder


async def _ready(session: aiohttp.ClientSession, process: asyncio.subprocess.Process) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        _expect(process.returncode is None, f"the proxy exited with status {process.returncode}")
        try:
            async with session.get("/health") as response:
                return str((await response.json())["version"])
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.05)
    raise TimeoutError(f"not listening after {START_S:g} s")


async def _json(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as response:
        answer: dict[str, Any] = await response.json()
        _expect(response.status == 200, f"{response.status} {answer}")
        return answer


async def _list(session: aiohttp.ClientSession) -> str:
    async with session.get("/v1/models") as response:
        names = [item["id"] for item in (await response.json())["data"]]
    _expect(names, "no model is offered")
    return ", ".join(names)


async def _chat(session: aiohttp.ClientSession, model: str) -> str:
    answer = await _json(session, "/v1/chat/completions", {"model": model, "messages": MESSAGES, "max_tokens": 16})
    text = answer["choices"][0]["message"]["content"]
    _expect(text, "the answer is empty")
    return f"{model}: {text!r}"


async def _stream(session: aiohttp.ClientSession, model: str) -> str:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 16, "stream": True}
    events = []
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise StepFailed(f"{response.status} {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
    _expect(events and events[-1] == b"[DONE]", "the stream did not end with [DONE]")
    for event in events:
        _expect(not event.startswith(b'{"error"'), event.decode())
    return f"{model}: {len(events) - 1} events, then [DONE]"


async def _embed(session: aiohttp.ClientSession, model: str) -> str:
    answer = await _json(session, "/v1/embeddings", {"model": model, "input": "hello"})
    return f"{model}: {len(answer['data'][0]['embedding'])} dimensions"


async def _both(session: aiohttp.ClientSession, chat: str, helper: str) -> str:
    """Request a model and a helper, check that neither has replaced the other."""
    await _chat(session, chat)
    await _embed(session, helper)
    await _chat(session, chat)
    held = await _loaded(session)
    _expect(held >= {chat, helper}, f"{chat} and {helper} were requested, but {', '.join(held) or 'nothing'} is loaded")
    return f"{chat} beside {helper}"


async def _swap(session: aiohttp.ClientSession, first: str, second: str, ask: Ask) -> str:
    """Request a second model by `ask`, check that it has replaced the first one, and request the first again."""
    for model, other, request in ((second, first, ask), (first, second, _chat)):
        await request(session, model)
        held = await _loaded(session)
        message = f"{model} was requested, but {', '.join(held) or 'nothing'} is loaded"
        _expect(model in held and other not in held, message)
    return f"{first} -> {second} -> {first}"


async def _loaded(session: aiohttp.ClientSession) -> set[str]:
    async with session.get("/health") as response:
        return {item["model"] for item in (await response.json())["instances"]}


async def _healthy(session: aiohttp.ClientSession) -> str:
    async with session.get("/health") as response:
        health = await response.json()
    message = "; ".join([health["status"], *(f"{item['where']}: {item['message']}" for item in health["problems"])])
    _expect(response.status == 200 and health["status"] == "healthy", message)
    return ", ".join(f"{item['model']} {item['state']}" for item in health["instances"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _print(name: str, verdict: str, detail: str) -> None:
    """A line at once, also for a reader at the other end of a pipe."""
    print(f"{name:<16} {verdict:<5} {detail}", flush=True)
