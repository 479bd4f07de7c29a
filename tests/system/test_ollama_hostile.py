"""The Ollama API against bad luck and bad intent: dead servers, paths for names, flags for values, web pages."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import MESSAGES, Fakes, fakes
from tests.support.harness import Proxy, free_port, running_proxy
from tests.support.ollamas import black_hole, running_ollama
from tests.support.raw_client import Answer
from tests.support.stages import Stage

__all__ = ["fakes"]  # a fixture
ASKING = ["/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/messages"]
ABOUT = ["/api/show", "/api/pull", "/api/create", "/api/copy", "/api/push", "/models/load", "/models/unload"]
TRICKS = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    "a\x00b",
    "local\x00",
    "local\n--host 0.0.0.0",
    "local --host 0.0.0.0",
    "%2e%2e%2fetc%2fpasswd",
    "..\\..\\x",
    "$(id)",
    "hf.co/../../etc/passwd",
    "hf.co/a/b:../../x",
    "local/../local",
    "\u202elacol",
    "x" * 100_000,
]
FLAGS = ["--host", "-m"]
"""An Ollama may have models of these names."""
OWNERS = ["http://127.0.0.1:3000", "http://localhost", "https://[::1]:8443", "app://obsidian", "vscode-webview://x"]
STRANGERS = [
    *("https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example:11434"),
    "http://test",  # our own name in the network, which another site's may have become
]


async def ask(proxy: Proxy, path: str, body: dict[str, Any], method: str = "POST", **headers: str) -> Answer:
    data = None if method == "HEAD" else body
    request = raw_client.request(method, path, data, headers=headers.items(), close=True)
    return await raw_client.ask(proxy.port, request, method=method)


def body_of(model: object, **fields: Any) -> dict[str, Any]:
    """A body that is good for every endpoint."""
    own = {"model": model, "messages": MESSAGES, "prompt": "hi", "input": "hi", "stream": False, "max_tokens": 4}
    return own | {"source": model, "destination": "x", **fields}


# -- an Ollama that is not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuses", "silent", "dies", "hangs"])
async def test_lists_are_quick_and_partial_with_an_ollama_that(how: str, fakes: Fakes) -> None:
    with black_hole() as hole:
        async with running_ollama("far", hang=["/api/tags", "/api/ps"] if how == "hangs" else []) as fake:
            port = {"refuses": free_port(), "silent": hole}.get(how, fake.port)
            config = fakes.config({"near": fakes.model()})
            config["ollama"] = {"host": f"127.0.0.1:{port}", "connect_timeout_s": 1}
            async with running_proxy(config) as proxy:
                if how == "dies":
                    assert len((await raw_client.get(proxy.port, "/api/tags")).json()["models"]) == 2
                    await fake.kill()
                for _ in range(2):
                    paths = ("/v1/models", "/api/tags", "/api/ps")
                    answers = await asyncio.gather(*(raw_client.get(proxy.port, path) for path in paths))
                    assert [answer.status for answer in answers] == [200] * 3
                    assert all(b'"near"' in answer.body for answer in answers[:2])
                answer = await ask(proxy, "/api/chat", body_of("near"))
                assert answer.status == 200, "and the other backend answers as if nothing were"
                answer = await ask(proxy, f"/api/blobs/sha256:{'0' * 64}", {}, "HEAD")
                assert answer.status == (404 if how == "hangs" else 502)


# -- names that lead elsewhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*ASKING, *ABOUT])
async def test_a_name_that_is_no_name_is_refused_and_goes_nowhere(stage: Stage, path: str) -> None:
    asked = len(stage.distant.events("request", path)) + len(stage.distant.events("pull"))
    starts = len(stage.local.events("start"))
    for name in TRICKS + (FLAGS if path not in ("/api/pull", "/api/create", "/api/copy", "/api/push") else []):
        answer = await ask(stage.proxy, path, body_of(name))
        assert answer.status in (400, 404), (name[:50], answer.body[:200])
        assert len(answer.body) < 1000 and "passwd:" not in answer.body.decode()
    others: list[object] = [["local"], {"a": 1}, 7, True]
    for other in others:
        assert (await ask(stage.proxy, path, body_of(other))).status == 400
    assert len(stage.distant.events("request", path)) + len(stage.distant.events("pull")) == asked
    assert len(stage.local.events("start")) == starts


async def test_a_name_in_the_path_leads_nowhere(stage: Stage) -> None:
    for name in ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a%00b", "local/../../x"):
        answer = await raw_client.get(stage.proxy.port, f"/v1/models/{name}")
        assert answer.status in (400, 404) and b"root:" not in answer.body


async def test_a_folder_of_models_offers_files_and_opens_nothing_else(fakes: Fakes, tmp_path: Path) -> None:
    """A pipe would hold up whoever opens it, and a device has no end."""
    folder = tmp_path / "models"
    (folder / "folder.gguf").mkdir(parents=True)
    (folder / "good.gguf").write_bytes(b"GGUF")
    (folder / "device.gguf").symlink_to("/dev/zero")
    (folder / "dangling.gguf").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.gguf")
    config = fakes.config({})
    config["llama_cpp"]["models_dir"] = str(folder)
    async with running_proxy(config) as proxy:
        names = [item["name"] for item in (await raw_client.get(proxy.port, "/api/tags")).json()["models"]]
        assert "good" in names and "folder" not in names
        for name in ("device", "dangling", "pipe", "../models/good", str(folder / "good.gguf"), "good.gguf/."):
            shown = await ask(proxy, "/api/show", {"model": name})
            assert shown.status in (200, 400, 404)
        assert proxy.rss_bytes() < 300 * 2**20
        assert (await ask(proxy, "/api/show", {"model": "good"})).status == 200


# -- flags and fields in a command line --------------------------------------------------------------------------------


@pytest.fixture
async def template(stage: Stage) -> AsyncIterator[list[str]]:
    """The command line with which `local` is started, whatever clients say; the port may differ."""
    await ask(stage.proxy, "/models/unload", {"model": "local"})
    assert (await ask(stage.proxy, "/v1/chat/completions", body_of("local"))).status == 200
    yield without_port(stage.local.events("start")[-1]["argv"])
    await ask(stage.proxy, "/v1/chat/completions", body_of("local"))


def without_port(argv: list[str]) -> list[str]:
    place = argv.index("--port")
    return argv[:place] + argv[place + 2 :]


INJECTIONS: list[dict[str, Any]] = [
    {"options": {"num_ctx": 999_999, "num_gpu": 99, "num_thread": 64, "num_batch": 1, "use_mmap": False}},
    {"options": {"--host": "0.0.0.0", "main_gpu": 1, "args": ["--host", "0.0.0.0"], "lora": "/etc/passwd"}},
    {"keep_alive": "5m", "args": ["--host", "0.0.0.0"], "command": "sh", "env": {"LD_PRELOAD": "x"}, "path": "/x.gguf"},
    {"system": "--host 0.0.0.0", "template": "--host\n0.0.0.0", "alias": "--host", "port": 1, "host": "0.0.0.0"},
]


@pytest.mark.parametrize("fields", INJECTIONS, ids=["load-options", "flags", "fields", "texts"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions"])
async def test_nothing_that_a_client_says_gets_into_a_command_line(
    stage: Stage, template: list[str], path: str, fields: dict[str, Any]
) -> None:
    for load in (False, True):
        await ask(stage.proxy, "/models/unload", {"model": "local"})
        body = body_of("local", **fields) | ({"messages": [], "prompt": ""} if load else {})
        await ask(stage.proxy, path, body)
    for event in stage.local.events("start"):
        assert without_port(event["argv"]) == template


@pytest.mark.parametrize(
    "fields",
    [{"keep_alive": "--host 0.0.0.0"}, {"keep_alive": "5m\n--host"}, {"options": {"num_ctx": "9 --host 0.0.0.0"}}],
)
async def test_flags_in_place_of_numbers_are_refused(stage: Stage, fields: dict[str, Any]) -> None:
    for path in ("/api/chat", "/api/generate"):
        assert (await ask(stage.proxy, path, body_of("local", **fields))).status == 400


# -- pages of other sites ----------------------------------------------------------------------------------------------

ACTING: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/pull", {"model": "distant", "stream": False}),
    ("POST", "/api/copy", {"source": "distant", "destination": "distant"}),
    ("POST", "/api/create", {"model": "distant", "from": "distant", "stream": False}),
    ("POST", "/api/push", {"model": "distant", "stream": False}),
    ("DELETE", "/api/delete", {"model": "local"}),
    ("POST", "/models/load", {"model": "local"}),
    ("POST", "/models/unload", {"model": "local"}),
    *(("POST", path, body_of("distant")) for path in ("/api/chat", "/api/generate", "/v1/chat/completions")),
]


@pytest.mark.parametrize(("method", "path", "body"), ACTING, ids=[path for _, path, _ in ACTING])
async def test_pages_of_other_sites_cannot_do_anything(
    stage: Stage, method: str, path: str, body: dict[str, Any]
) -> None:
    """A browser sends their `Origin`, whatever the page would like."""
    seen = len(stage.distant.events("request"))
    for origin in STRANGERS:
        answer = await ask(stage.proxy, path, body, method, Origin=origin)
        assert answer.status == 403, origin
        assert isinstance(answer.json()["error"], str if path.startswith("/api/") else dict)
    asked = [event for event in stage.distant.events("request")[seen:] if event["method"] != "GET"]
    assert asked == []
    for owner in (None, *OWNERS):
        answer = await ask(stage.proxy, path, body, method, **({"Origin": owner} if owner else {}))
        assert answer.status == (400 if method == "DELETE" else 200), (owner, answer.body)
