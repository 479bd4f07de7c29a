"""`agents/README.md` keeps its word: every agent in it is loaded, and says what is written there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import llama_smart_proxy
from llama_smart_proxy.agents.loader import GROUP
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.middleware.side_calls import MAX_DEPTH
from tests.support import raw_client
from tests.support.agent_clients import WAYS
from tests.support.e2e_support import Fakes
from tests.support.harness import ROOT, Proxy, environment, session_proxy

FOLDER = ROOT / "agents"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
TALKS = re.findall(r"```\n> (.*?)\n< (.*?)\n```", TEXT)
CALLING = [
    (asked, answer)
    for asked, answer in TALKS
    if f"{asked[1:].split()[0]}.py" in FILES and "tools =" in FILES[f"{asked[1:].split()[0]}.py"]
]
"""Those in which the model calls a function, for which a model that repeats its input is no use."""
CURLS = re.findall(r"^\$ curl -s (.*?) \| jq -r '(.*?)'\n(.*?)\n(?=\$|```)", TEXT, re.DOTALL | re.MULTILINE)
CONFIGS = [yaml.safe_load(textwrap.dedent(block)) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]
ENABLED = [name.removesuffix(".py") for name in FILES if not name.startswith("test_")]


async def test_the_first_steps_lead_to_an_agent_that_runs(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    (tmp_path / "my-agents").mkdir()
    (tmp_path / "my-agents" / "polite.py").write_text(FILES["polite.py"])
    config = fakes.config({"qwen3": fakes.model(ECHO=1)}) | CONFIGS[0]
    with session_proxy(config | {"agents_dirs": [str(tmp_path / "my-agents")]}) as proxy:
        call, picked, printed = CURLS[0]
        assert await curl(proxy, call, picked) == printed


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """With every agent in the README, and its configuration; the model repeats what it is told."""
    fakes = Fakes(tmp_path_factory.mktemp("readme"))
    folder = fakes.folder / "my-agents"
    folder.mkdir()
    for name, source in FILES.items():
        if not name.startswith("test_"):
            (folder / name).write_text(source)
    enabling, virtual = {"agents": ENABLED}, CONFIGS[1]
    models = {"qwen3": fakes.model(fields={"parallel": 4}, ECHO=1), **virtual["models"]}
    with session_proxy(fakes.config(models, keep_alive=-1) | enabling | {"agents_dirs": [str(folder)]}) as proxy:
        yield proxy


async def test_every_agent_in_it_does_what_it_says_in_every_api(proxy: Proxy) -> None:
    assert len(TALKS) == len(ENABLED) == len(FILES) - 1 >= 8, "each has its talk"
    for way in WAYS:
        for asked, answer in (talk for talk in TALKS if talk not in CALLING):
            said = await way.ask(proxy, way.body(asked, model="qwen3"))
            assert (said.text, said.error) == (answer, None), (way, asked)


async def test_the_functions_in_it_are_called(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    ((asked, answer),) = CALLING
    name = asked[1:].split()[0]
    (tmp_path / f"{name}.py").write_text(FILES[f"{name}.py"])
    config = fakes.config(
        {"qwen3": fakes.model(fields={"parallel": 4}, IF=json.dumps([["Sunny in Paris, 1 day(s).", answer]]))}
    )
    with session_proxy(config | {"agents_dirs": [str(tmp_path)], "agents": [name]}) as proxy:
        for way in WAYS:
            if way.path != "/v1/completions":  # it has no tools
                body = way.steered(f"/{name}", model="qwen3", texts=[""], tool_call=["forecast", {"city": "Paris"}])
                said = await way.ask(proxy, body)
                assert (said.text, said.error) == (answer, None), way
                assert said.finish in ("stop", "end_turn"), way


async def test_every_agent_in_it_is_listed(proxy: Proxy) -> None:
    listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
    assert [*listed][:-1] == ENABLED
    assert all(item["status"] == "loaded" for item in listed.values())
    told = await WAYS[0].ask(proxy, WAYS[0].body("/help", model="qwen3"))
    assert "`/polite` Asks nicely." in told.text and "`mark=` What stands in place" in told.text


async def test_every_curl_in_it_prints_what_it_says(proxy: Proxy) -> None:
    assert len(CURLS) == TEXT.count("$ curl") >= 7
    for call, picked, printed in CURLS:
        assert await curl(proxy, call, picked) == printed, call


async def curl(proxy: Proxy, call: str, picked: str) -> str:
    """What `curl -s CALL | jq -r PICKED` would print."""
    url, *rest = shlex.split(call)
    options = [(flag, value) for flag, value in zip(rest[::2], rest[1::2], strict=True)]
    headers = [(name, value) for flag, text in options if flag == "-H" for name, value in [text.split(": ")]]
    path = url.removeprefix("localhost:11555")
    assert path != url, "the port that the proxy has by default"
    sent = [json.loads(value) for flag, value in options if flag == "-d"]
    whole = raw_client.request("POST" if sent else "GET", path, *sent, headers=headers, close=True)
    form = b"application/x-www-form-urlencoded"  # what curl says of all that it sends
    value: Any = (await raw_client.ask(proxy.port, whole.replace(b"application/json", form))).json()
    for step in re.findall(r"\w+", picked):
        value = value[int(step) if step.isdigit() else step]
    return str(value)


def test_the_test_in_it_passes(tmp_path: Path) -> None:
    for name in ("brief.py", "test_brief.py"):
        (tmp_path / name).write_text(FILES[name])
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_brief.py"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_limits_in_it_are_those_of_the_configuration() -> None:
    limits = Config().agent_limits
    minutes, calls = limits.side_call_s / 60, limits.side_calls
    words = " ".join(TEXT.split())
    assert f"hangs longer than `timeout_s` ({limits.timeout_s:g} s" in words
    assert limits.output_kib == 1024 and "over a MiB" in words
    assert (
        f"{calls}, {limits.side_calls_at_once} at a time, {limits.side_tokens:,} tokens, {minutes:g} minutes" in words
    )
    assert MAX_DEPTH == 3 and "stopped at the third" in words


def test_it_names_all_that_an_agent_can_import() -> None:
    assert [name for name in llama_smart_proxy.__all__ if not re.search(rf"\b{name}\b", TEXT)] == []


def test_what_it_names_is_there() -> None:
    (package,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert [*tomllib.loads(package)["project"]["entry-points"]] == [GROUP]
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links and all((FOLDER / link).is_file() for link in links)
    (context,) = (
        node
        for node in ast.parse((FOLDER / "base.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Context"
    )
    members = {node.name for node in context.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    line = TEXT.partition("- `ctx`: ")[2].partition("\n\n")[0]
    assert members == set(re.findall(r"`(\w+)`", line)), "all of the context, and nothing else"
