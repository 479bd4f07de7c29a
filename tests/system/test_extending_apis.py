"""What a stranger adds as one file and one line of configuration: an API for clients, an observer, an agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import write_agent
from tests.support.e2e_support import Fakes, fakes
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes"]  # a fixture

TOY_API = '''
"""An API that has the model in its path, and says by the path whether to stream; one line a token."""

import json

from llama_smart_proxy import ChatRequest
from llama_smart_proxy.proxy.api.endpoints import Endpoint
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Dialect
from llama_smart_proxy.proxy.errors import BadRequest


def bind(body, params):
    return {**body, "model": params["model"], "stream": params["verb"] == "stream"}


def error(exc):
    return json.dumps({"toy_error": exc.message}).encode()


TOY = Dialect(
    name="toy",
    error_body=error,
    error_event=lambda exc: error(exc) + b"\\n",
    is_end=lambda lines: lines.rstrip().endswith(b"END"),
    is_error=lambda lines: b"toy_error" in lines,
    bind=bind,
)


class Writer:
    content_type = "text/plain"

    def chunk(self, chunk):
        texts = [choice["delta"].get("content") for choice in chunk.get("choices") or ()]
        return b"".join(f"token {json.dumps(text)}\\n".encode() for text in texts if text)

    def adopt(self, chunk):
        pass

    def end(self):
        return b"END\\n"

    def error(self, exc):
        return TOY.error_event(exc)

    def reply(self, completion):
        return json.dumps({"toy": completion["choices"][0]["message"]["content"]}).encode()


class ToyCodec(ClientCodec):
    dialect = TOY

    def decode(self, body):
        if not isinstance(body.get("ask"), str):
            raise BadRequest("ask must be a string")
        fields = {name: body[name] for name in ("model",)}
        return ChatRequest({**fields, "messages": [{"role": "user", "content": body["ask"]}]}, body["stream"])

    def user_text(self, body):
        return str(body.get("ask"))

    def encode(self, request):
        return {"ask": request.last_user_text, "model": request.model, "stream": request.stream}

    def writer(self, request, timing):
        return Writer()


def extend(registry):
    registry.endpoints["/toy/{model}/{verb:whole|stream}"] = Endpoint(TOY, api="toy", codec=ToyCodec())
'''
OBSERVER = '''
"""Writes down what became of each request."""

import json

LOG = @LOG@


def observe(record):
    with open(LOG, "a") as log:
        usage = record.usage or {}
        log.write(json.dumps({
            "id": record.request_id, "path": record.path, "model": record.model, "backend": record.backend,
            "agents": list(record.agents), "status": record.status, "completion": usage.get("completion_tokens"),
            "times": [record.arrived_s, record.resolved_s, record.sent_s, record.first_byte_s, record.last_byte_s,
                      record.ended_s],
        }) + "\\n")


def extend(registry):
    registry.observers.append(observe)
'''
LOUD = '''
class Loud(Agent):
    """Answers in capitals."""
    command = "loud"
    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        chunk.text = chunk.text.upper()
        return chunk
'''
CHAT = "/v1/chat/completions"
TOKENS = [f"t{number} " for number in range(8)]
"""What the fake answers if nothing else is asked for."""


def observed(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def config(fakes: Fakes, *modules: str) -> dict[str, Any]:
    write_agent(fakes.folder / "agents", "loud", LOUD)
    settings = fakes.config({"m": fakes.model()}) | {"agents_dirs": [str(fakes.folder / "agents")], "agents": ["loud"]}
    for number, source in enumerate(modules):
        (fakes.folder / f"added{number}.py").write_text(source)
    return settings | {"modules": [str(fakes.folder / f"added{number}.py") for number in range(len(modules))]}


async def post(proxy: Proxy, path: str, body: dict[str, Any]) -> raw_client.Answer:
    return await raw_client.post(proxy.port, path, body)


async def test_an_api_with_the_model_in_its_path_is_one_file(fakes: Fakes) -> None:
    async with running_proxy(config(fakes, TOY_API)) as proxy:
        whole = await post(proxy, "/toy/m/whole", {"ask": "hi"})
        assert (whole.status, whole.json()) == (200, {"toy": "".join(TOKENS)})
        stream = await post(proxy, "/toy/m/stream", {"ask": "hi"})
        assert stream.body.decode() == "".join(f'token "{token}"\n' for token in TOKENS) + "END\n"
        loud = await post(proxy, "/toy/m/stream/", {"ask": "/loud hi"})
        assert loud.body == stream.body.replace(b'"t', b'"T')
        for path, body, status in (("/toy/m/whole", {"ask": 3}, 400), ("/toy/other/whole", {"ask": "hi"}, 404)):
            refused = await post(proxy, path, body)
            assert refused.status == status and list(refused.json()) == ["toy_error"]
        assert (await post(proxy, "/toy/m/sing", {})).status == 404


@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("agent", [False, True], ids=["relayed", "through an agent"])
async def test_an_observer_of_requests_is_one_file(fakes: Fakes, path: str, stream: bool, agent: bool) -> None:
    log = fakes.folder / "observed.log"
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": "/loud hi" if agent else "hi"}]}
    async with running_proxy(config(fakes, OBSERVER.replace("@LOG@", repr(str(log))))) as proxy:
        assert (await post(proxy, path, body | {"max_tokens": 9})).status == 200
        await until(lambda: any(line["path"] == path for line in observed(log)), what="the record")
    record = next(line for line in observed(log) if line["path"] == path)
    assert (record["model"], record["backend"], record["status"]) == ("m", "llama.cpp", 200)
    assert record["agents"] == (["loud"] if agent else [])
    assert record["completion"] == len(TOKENS)
    times = [seconds for seconds in record["times"] if seconds]
    assert times == sorted(times) and len(times) >= 5


async def test_a_module_that_cannot_be_loaded_is_a_problem_of_the_configuration(fakes: Fakes, tmp_path: Path) -> None:
    settings = config(fakes, "raise RuntimeError('broken')", "x = 1")
    with pytest.raises(AssertionError) as caught:
        async with running_proxy(settings):
            pass
    assert "modules.0" in str(caught.value) and "RuntimeError: broken" in str(caught.value)
    assert "modules.1" in str(caught.value) and "no function extend" in str(caught.value)
