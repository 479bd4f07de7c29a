"""Agents over servers of every kind: the same edits wherever the tokens come from, and untouched bytes stay so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS, write_agent
from tests.support.e2e_support import SMOLLM2, Fakes, embedded, needs_llama_cpp
from tests.support.harness import Proxy, running_proxy, session_proxy
from tests.support.ollamas import running_ollama
from tests.support.stages import GOLDEN, running
from tests.system.test_agents_e2e import IDENTITY, IDENTITY_BY_CHUNK, SHOUT

STREAMED = [
    file.stem
    for file in sorted(GOLDEN.glob("*.json"))
    if file.stem.startswith(("chat", "generate")) and "lines" in json.loads(file.read_text())["response"]
]


def agents_in(folder: Path) -> dict[str, Any]:
    """The configuration with the agents that these tests call."""
    for name, source in (("same", IDENTITY), ("each", IDENTITY_BY_CHUNK), ("shout", SHOUT)):
        write_agent(folder / "agents", name, source)
    return {"agents_dirs": [str(folder / "agents")], "agents": ["same", "each", "shout"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """In front of an Ollama that answers with transcripts."""
    with running(running_ollama(golden=GOLDEN)) as fake:
        config = {"backend": "ollama", "ollama": {"host": f"127.0.0.1:{fake.port}"}}
        with session_proxy(config | agents_in(tmp_path_factory.mktemp("recorded"))) as proxy:
            yield proxy


@pytest.mark.parametrize("name", STREAMED)
async def test_identity_agents_pass_an_ollamas_stream_byte_for_byte(recorded: Proxy, name: str) -> None:
    asked = json.loads((GOLDEN / f"{name}.json").read_text())["request"]
    bodies = []
    for agents in ("off", "same", "same,each"):
        data = raw_client.request("POST", asked["path"], asked["body"], headers=[("X-Agents", agents)], close=True)
        async with raw_client.connected(recorded.port) as client:
            await client.send(data)
            _, status, _ = await client.head()
            assert status == 200
            pieces = []
            try:
                while piece := await client.chunk():
                    pieces.append(piece)
            except (raw_client.BrokenAnswer, ConnectionError):
                assert name == "chat-error-midway"
            body = b"".join(pieces)
            if name == "chat-error-midway":  # where the proxy writes the error, chat UIs can show it
                *before, last = body.splitlines()
                body = b"".join(before) + json.loads(last)["error"].encode()
            bodies.append(body)
    assert bodies[0] == bodies[1] == bodies[2] != b""


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The model `local` on the fake llama-server, `distant` on the fake Ollama, `remote` by way of another proxy."""
    folder = tmp_path_factory.mktemp("everywhere")
    fakes = Fakes(folder)
    local = {"local": fakes.model(fields={"parallel": 8}, ANSWER="so it is"), "remote": fakes.model(ANSWER="so it is")}
    with running(running_ollama("distant", answer="so it is")) as fake, session_proxy(fakes.config(local)) as behind:
        config = fakes.config({"local": local["local"]}, keep_alive=-1)
        config |= {"ollama": {"host": f"127.0.0.1:{fake.port}", "pull": "never"}}
        config |= {"remotes": {"r": {"url": behind.url, "models": ["remote"]}}}
        with session_proxy(config | agents_in(folder)) as proxy:
            yield proxy


@pytest.mark.parametrize("model", ["local", "distant", "remote"])
async def test_the_same_edits_over_every_backend(everywhere: Proxy, model: str) -> None:
    for way in WAYS:
        said = await way.ask(everywhere, way.body("/shout hi", model=model))
        assert (said.text, said.error) == ("SO IT IS", None), way
        assert said.finish in ("stop", "end_turn"), way
        said = await way.ask(everywhere, way.body("/same /each hi", model=model))
        assert (said.text, said.error) == ("so it is", None), way


@pytest.mark.parametrize("model", ["local", "distant", "remote"])
async def test_an_identity_agents_whole_answer_says_what_the_relays_says(everywhere: Proxy, model: str) -> None:
    never_the_same = {"id", "created", "created_at", "completed_at", "timings"}
    for way in WAYS:
        if way.stream:
            continue
        answers = []
        for agents in ("off", "same"):
            headers = [("X-Agents", agents)]
            answer = await raw_client.post(everywhere.port, way.path, way.body("hi", model=model), headers=headers)
            value = answer.json()
            for item in value.get("output", ()):  # of /v1/responses
                del item["id"]
            answers.append({k: v for k, v in value.items() if k not in never_the_same and not k.endswith("_duration")})
        relayed, passed = answers
        assert passed == relayed, way


@needs_llama_cpp
async def test_official_clients_over_real_llama_cpp(tmp_path: Path) -> None:
    config = embedded({"m": SMOLLM2, "loud": {"model": "m", "agents": ["shout"]}})
    async with running_proxy(config | agents_in(tmp_path)) as proxy:
        plain = openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="-")
        messages: list[Any] = [{"role": "user", "content": "Say hello."}]
        async with plain:
            texts = []
            for model in ("m", "loud"):
                stream = await plain.chat.completions.create(
                    model=model, messages=messages, stream=True, max_tokens=8, temperature=0
                )
                texts.append("".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]))
            listed = [model.id async for model in plain.models.list()]
        assert texts[0] != texts[0].upper() and texts[1] == texts[1].upper() != "" and "loud" in listed
        async with ollama.AsyncClient(host=proxy.url, verify=False) as client:
            answer = await client.chat(model="loud", messages=messages, options={"num_predict": 8, "temperature": 0})
        assert answer.message.content == texts[1]
