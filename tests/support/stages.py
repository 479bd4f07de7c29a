"""Proxies that many test files share, each started with the first test that wants it: over real models, over scripted
servers of both kinds, and over recorded answers of Ollama."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.fakes.ollama import MANNERS
from tests.support.e2e_support import SMOLLM2, Fakes, embedded, tiny
from tests.support.harness import Proxy, session_proxy
from tests.support.ollamas import FakeOllama, running_ollama

GOLDEN = Path(__file__).parents[1] / "golden" / "ollama"
RECORDED = "smollm2:135m"
"""The model that most of the transcripts are about."""
CHAT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\nCall functions as <tool_call>\\n"
    '{"name": ..., "arguments": ...}\\n</tool_call>\\n<tools>\' }}'
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role }}"
    "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' }}{{- call.function.name }}'
    "{{- '\", \"arguments\": ' }}{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Of models that call tools; SmolLM2's own one knows none. With two calls to look at, SmolLM2 makes a third one."""

_T = TypeVar("_T")


@contextmanager
def running(manager: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
    """What an async context manager gives, for a fixture that outlives every event loop."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        value = runner.run(manager.__aenter__())
        try:
            yield value
        finally:
            runner.run(manager.__aexit__(None, None, None))


@dataclass(frozen=True)
class Chain:
    """`local` runs the models `smollm2`, `tiny`, `embed` and `spare` on real llama.cpp; `distant` has `local` for its
    Ollama, and no model of its own."""

    local: Proxy
    distant: Proxy


@pytest.fixture(scope="session")
def chain(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(CHAT_TEMPLATE)
    models = {
        "smollm2": {**SMOLLM2, "args": ["-t", "1", "--chat-template-file", str(template)]},
        "tiny": tiny(tiny_models["tiny-a"]),
        "embed": tiny(tiny_models["tiny-b"], "--embeddings"),
        "spare": tiny(tiny_models["tiny-c"], resumable_streams=True),
    }
    with session_proxy(embedded(models, size=4, keep_alive=-1)) as local:
        upstream = {"host": f"127.0.0.1:{local.port}", "pull": "never"}
        with session_proxy({"backend": "ollama", "ollama": upstream}) as distant:
            yield Chain(local, distant)


@pytest.fixture(params=["llama.cpp", "ollama"])
def served(chain: Chain, request: pytest.FixtureRequest) -> Proxy:
    """The models of `chain`, directly and by way of an Ollama."""
    return chain.local if request.param == "llama.cpp" else chain.distant


@dataclass(frozen=True)
class Stage:
    """`proxy` has the model `local` on the fake llama-server, and `distant` on the fake Ollama."""

    proxy: Proxy
    local: Fakes
    distant: FakeOllama


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    fakes = Fakes(tmp_path_factory.mktemp("stage"))
    with running(running_ollama("distant")) as fake:
        config = fakes.config({"local": fakes.model(fields={"parallel": 64})}, keep_alive=-1)
        config |= {"ollama": {"host": f"127.0.0.1:{fake.port}", "pull": "never"}}
        with session_proxy(config) as proxy:
            yield Stage(proxy, fakes, fake)


@pytest.fixture
async def stage(scripted: Stage) -> AsyncIterator[Stage]:
    """Both scripted servers, with good manners at first."""
    yield scripted
    await scripted.distant.set(**MANNERS)


@pytest.fixture(scope="session")
def recorded() -> Iterator[Proxy]:
    """A proxy in front of an Ollama that answers with the transcripts of `tests/golden/ollama`."""
    with (
        running(running_ollama(golden=GOLDEN)) as fake,
        session_proxy({"backend": "ollama", "ollama": {"host": f"127.0.0.1:{fake.port}"}}) as proxy,
    ):
        yield proxy
