"""llama-server's own endpoints, over real llama.cpp and over the fake that notes what it is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.middleware.chats import CHAT_ID_HEADERS
from tests.support import toxic
from tests.support.e2e_support import Fakes, Gate, body_of, fakes, gate, state
from tests.support.harness import Proxy, running_proxy, session_proxy, until
from tests.support.raw_client import Answer, ask, connected, get, post, request
from tests.support.speakers import SPEAKERS
from tests.support.stages import Chain, Stage
from tests.support.toxic import RawUpstream

__all__ = ["fakes", "gate"]  # fixtures
CHAT = "/v1/chat/completions"
DOCUMENTED = ("README.md", "docs/agents.md", "docs/clients.md", "agents/README.md")
CONVERSATION = ("X-Conversation-Id", "conv::org/repo:Q8_0")
CONV = "conv_id=conv%3A%3Aorg%2Frepo%3AQ8_0"


def documented_chat_ids() -> set[str]:
    root = Path(__file__).parents[2]
    texts = "".join((root / file).read_text() for file in DOCUMENTED)
    return {name for name in re.findall(r"X-[A-Za-z-]+-Id\b", texts) if name != "X-Request-Id"}


def sent(fakes: Fakes, path: str | None = None) -> list[dict[str, Any]]:
    """The requests that reached a server, apart from those with which the pool looks whether it is ready."""
    events = [event for event in fakes.events("request") if event["path"] not in ("/health", "/props")]
    return [event for event in events if path in (None, event["path"])]


# -- the header that makes llama-server's streams outlive their client -------------------------------------------------


def test_every_chat_id_header_of_the_documentation_is_known() -> None:
    assert set(CHAT_ID_HEADERS) <= documented_chat_ids() <= {*CHAT_ID_HEADERS, "X-OpenWebUI-User-Id"}


@pytest.mark.parametrize("header", CHAT_ID_HEADERS)
async def test_no_chat_id_makes_a_stream_outlive_its_client(stage: Stage, header: str) -> None:
    before = len(sent(stage.local))
    headers = [(header, "chat-1")]
    for speaker in SPEAKERS.values():
        for stream in (True, False):
            body = speaker.body("local", stream=stream)
            answer = await ask(stage.proxy.port, request("POST", speaker.path, body, headers=headers, close=True))
            assert answer.status == 200, answer.body
    for path in ("/v1/completions", "/api/generate", "/completion", "/infill"):
        body = {"model": "local", "prompt": "x", "input_prefix": "", "input_suffix": "", "stream": False}
        answer = await ask(stage.proxy.port, request("POST", path, body, headers=headers, close=True))
        assert answer.status == 200, answer.body
    new = sent(stage.local)[before:]
    assert len(new) >= 10
    assert not [event for event in new if "x-conversation-id" in event["headers"]]


# -- a proxy whose models are loaded on demand only --------------------------------------------------------------------


class Native:
    """A proxy with `autoload: false` on the fake llama-server, whose model `plain` is loaded."""

    def __init__(self, proxy: Proxy, fakes: Fakes) -> None:
        self.proxy = proxy
        self.fakes = fakes

    async def send(self, method: str, path: str, body: Any = None, *headers: tuple[str, str]) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return await ask(self.proxy.port, request(method, path, data, headers=headers, close=True))

    async def loaded(self, model: str) -> None:
        answer = await self.send("POST", f"/tokenize?autoload=true&model={model}", {"content": "x"})
        assert answer.status == 200, answer.body


@pytest.fixture(scope="module")
def served_natively(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Native]:
    fakes = Fakes(tmp_path_factory.mktemp("native"))
    models = {
        "plain": fakes.model(fields={"aliases": ["second", "first"], "args": ["--tags", "small, chat"]}),
        "cold": fakes.model(),
        "kept": fakes.model(fields={"resumable_streams": True}),
        "tooled": fakes.model(fields={"args": ["--tools", "all"]}),
    }
    with session_proxy(fakes.config(models, size=4, autoload=False, keep_alive=-1)) as proxy:
        yield Native(proxy, fakes)


@pytest.fixture
async def native(served_natively: Native) -> Native:
    await served_natively.loaded("plain")
    return served_natively


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, body_of("cold")),
        ("POST", "/api/chat", body_of("cold")),
        ("POST", "/v1/messages", body_of("cold", max_tokens=5)),
        ("POST", "/v1/embeddings", {"model": "cold", "input": "x"}),
        ("GET", "/props?model=cold", None),
        ("GET", "/metrics?model=cold", None),
        ("GET", "/slots?model=cold", None),
        ("POST", "/lora-adapters?model=cold", []),
    ],
)
async def test_without_autoload_a_request_loads_no_model(native: Native, method: str, path: str, body: Any) -> None:
    answer = await native.send(method, path, body)
    assert answer.status == 400
    assert b"is not loaded, and server_pool.autoload is false" in answer.body
    assert await state(native.proxy, "cold") == "unloaded"


async def test_a_request_decides_for_itself_whether_it_loads_its_model(native: Native) -> None:
    answer = await native.send("POST", f"{CHAT}?autoload=true", body_of("plain"))
    assert answer.status == 200
    for choice in ("false", "0"):
        answer = await native.send("GET", f"/props?model=cold&autoload={choice}")
        assert (answer.status, answer.error["message"]) == (400, "model 'cold' is not loaded")
    assert await state(native.proxy, "cold") == "unloaded"


async def is_loaded(native: Native, model: str) -> bool:
    return await state(native.proxy, model) == "loaded"


async def test_a_model_is_loaded_by_its_own_request_without_autoload(native: Native) -> None:
    await native.send("POST", "/models/load", {"model": "kept"})
    await until(lambda: is_loaded(native, "kept"), what="the model")
    assert (await native.send("POST", CHAT, body_of("kept"))).status == 200


async def test_all_names_and_tags_of_a_model_are_listed(native: Native) -> None:
    for path in ("/models", "/v1/models"):
        items = {item["id"]: item for item in (await get(native.proxy.port, path)).json()["data"]}
        assert (items["plain"]["aliases"], items["plain"]["tags"]) == (["plain", "second", "first"], ["chat", "small"])
        assert (items["cold"]["aliases"], items["cold"]["tags"]) == (["cold"], [])


async def test_props_without_a_model_are_those_of_a_router(native: Native) -> None:
    body = (await native.send("GET", "/props")).json()
    assert (body["role"], body["max_instances"], body["models_autoload"]) == ("router", 4, False)
    assert body["build_info"].startswith("b") and body["default_generation_settings"]["n_ctx"] == 0
    own = (await native.send("GET", "/props?model=first")).json()
    assert own["model_alias"] == "plain" and own["total_slots"] == 4 and "role" not in own


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/chat/completions/input_tokens", {"model": "plain", "messages": []}),
        ("POST", "/v1/chat/completions/input_tokens", {"model": "plain", "messages": []}),
        ("POST", "/v1/systemone", {"model": "plain"}),
        ("GET", "/metrics?model=plain", None),
        ("POST", "/lora-adapters?model=plain", [{"id": 0, "scale": 0.5}]),
        ("GET", "/lora-adapters?model=plain", None),
    ],
)
async def test_an_endpoint_of_llama_server_is_passed_on(native: Native, method: str, path: str, body: Any) -> None:
    answer = await native.send(method, path, body)
    assert (answer.status, answer.json()["path"]) == (200, path.partition("?")[0])
    assert answer.json()["echo"] == ("" if body is None else json.dumps(body, separators=(",", ":")))


@pytest.mark.parametrize("path", ["/messages", "/messages/count_tokens"])
async def test_anthropics_endpoints_are_served_without_their_version(native: Native, path: str) -> None:
    assert (await native.send("POST", path, body_of("plain", max_tokens=5))).status == 200
    assert sent(native.fakes, f"/v1{path}") and not sent(native.fakes, path)
    assert (await native.send("POST", path, body_of("none", max_tokens=5))).json()["type"] == "error"


async def test_health_is_also_found_below_v1(native: Native) -> None:
    assert (await native.send("GET", "/v1/health")).json()["status"] == "healthy"


@pytest.mark.parametrize("body", [b"[", b"", b'{"a":'])
async def test_adapters_that_are_not_json_are_refused(native: Native, body: bytes) -> None:
    assert (await native.send("POST", "/lora-adapters?model=plain", body)).error["code"] == "invalid_json"


# -- transcriptions ----------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes], end: bytes = b"--") -> bytes:
    lines = b"".join(b"--cut\r\n" + f"Content-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
                     for head, value in parts)  # fmt: skip
    return lines + b"--cut" + end + b"\r\n"


SOUND = bytes(range(256)) * 300 + b"\r\n--cu"
FORM = ("Content-Type", "multipart/form-data; boundary=cut")


async def transcribed(proxy: Proxy, data: bytes, content_type: str, path: str = "/v1/audio/transcriptions") -> Answer:
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: {content_type}\r\n"
    return await ask(proxy.port, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/audio/transcriptions"])
async def test_a_recording_reaches_the_models_server_byte_for_byte(native: Native, path: str) -> None:
    file = ('name="file"; filename="model.wav"', SOUND)
    answer = await transcribed(
        native.proxy, form(file, ('name="model"', b"FIRST"), ("name=language", b"de")), FORM[1], path
    )
    assert answer.status == 200
    event = sent(native.fakes, path)[-1]
    assert event["headers"]["content-type"] == FORM[1]
    expected = form(file, ('name="model"', b"plain"), ("name=language", b"de"))
    assert event["body"] == expected.decode("utf-8", "replace")
    assert int(event["headers"]["content-length"]) == len(expected)


@pytest.mark.parametrize(
    ("data", "content_type", "status"),
    [
        (form(('name="model"', b"none")), FORM[1], 404),
        (form(('name="file"', b"x")), FORM[1], 400),  # no model
        (form(('name="model"', b"plain"), end=b""), FORM[1], 400),
        (form(('name="model"', b"cold")), FORM[1], 400),
        (b'{"model":"plain"}', "application/json", 400),
        (b"", FORM[1], 400),
        (form(('name="model"', b"plain")), "multipart/form-data", 400),
    ],
)
async def test_a_form_that_cannot_be_passed_on_is_refused(
    native: Native, data: bytes, content_type: str, status: int
) -> None:
    answer = await transcribed(native.proxy, data, content_type)
    assert answer.status == status, answer.body
    assert answer.error["message"]


@pytest.mark.parametrize(
    ("last", "whole"),
    [
        (b'{"type":"transcript.text.done","text":"a"}', True),
        (b"[DONE]", True),
        (b'{"type":"transcript.text.delta"}', False),
    ],
)
async def test_a_streamed_transcription_of_a_remote_ends_as_its_server_ends_it(
    proxy: Proxy, upstream: RawUpstream, last: bytes, whole: bool
) -> None:
    events = b'data: {"type":"transcript.text.delta","delta":"a"}\n\ndata: ' + last + b"\n\n"
    headers = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    upstream.script = toxic.head(200, headers) + toxic.chunk(events) + toxic.LAST_CHUNK
    data = form(('name="model"', b"m"), ('name="file"; filename="a"', SOUND))
    answer = await transcribed(proxy, data, FORM[1])
    assert answer.body.startswith(events) and (answer.body == events) is whole
    assert upstream.requests[-1].body == data


# -- resumable streams -------------------------------------------------------------------------------------------------


async def test_only_a_model_with_resumable_streams_gets_the_conversation(native: Native) -> None:
    await native.loaded("kept")
    for model, expected in (("kept", CONVERSATION[1]), ("plain", None)):
        await native.send("POST", CHAT, body_of(model, stream=True), CONVERSATION)
        assert sent(native.fakes, CHAT)[-1]["headers"].get("x-conversation-id") == expected
    await native.send("POST", "/tokenize", {"model": "kept", "content": "x"}, CONVERSATION)
    assert "x-conversation-id" not in sent(native.fakes, "/tokenize")[-1]["headers"]


async def test_a_stream_is_only_looked_for_where_streams_are_kept(native: Native) -> None:
    await native.loaded("kept")
    before = len(sent(native.fakes))
    assert (await native.send("GET", f"/v1/stream?{CONV}&from=0")).json()["path"] == "/v1/stream"
    assert (await native.send("DELETE", f"/v1/stream?{CONV}")).status == 204
    assert (await native.send("POST", "/v1/streams/lookup", {"conversation_ids": ["a", 1, ""]})).json() == []
    assert [(event["method"], event["path"]) for event in sent(native.fakes)[before:]] == [
        ("GET", f"/v1/stream?{CONV}&from=0"),
        ("DELETE", f"/v1/stream?{CONV}"),
        ("POST", "/v1/streams/lookup"),
    ]
    assert (await native.send("GET", "/v1/stream")).status == 400
    assert (await native.send("GET", f"/v1/stream?{CONV}&model=plain")).status == 404


async def test_a_request_for_a_resumable_stream_waits_for_its_model_without_its_client(
    fakes: Fakes, gate: Gate
) -> None:
    kept = fakes.model(fields={"resumable_streams": True}, LOAD_UNTIL=gate)
    question = request("POST", CHAT, body_of("kept", stream=True), headers=[CONVERSATION])
    async with running_proxy(fakes.config({"kept": kept}, queue_limit=1)) as proxy:

        async def resumed() -> int:
            return (await get(proxy.port, f"/v1/stream?{CONV}&from=0")).status

        async def waits() -> bool:
            return await resumed() == 503

        assert await resumed() == 404
        async with connected(proxy.port) as client:
            await client.send(question)
            await until(waits, what="the request")
            assert (await ask(proxy.port, request("DELETE", f"/v1/stream?{CONV}", close=True))).status == 204
            stopped = await client.answer()
            assert (stopped.status, stopped.error["code"]) == (400, "request_cancelled")
        assert await resumed() == 404
        async with connected(proxy.port) as client:
            await client.send(question)
            await until(waits, what="the second request")
            client.leave()
        await until(lambda: " 499 " in proxy.log, what="the end of the client")
        assert await waits() and not sent(fakes, CHAT)
        another = request("POST", CHAT, body_of("kept"), headers=[(CONVERSATION[0], "another")], close=True)
        refused = await ask(proxy.port, another)
        assert (refused.status, refused.error["code"]) == (503, "overloaded"), "there may be no more of them"
        gate.open()
        await until(lambda: sent(fakes, CHAT), what="the request at the server")
        assert sent(fakes, CHAT)[0]["headers"]["x-conversation-id"] == CONVERSATION[1]
        assert await resumed() == 200


async def test_a_stream_of_real_llama_cpp_is_resumed_and_stopped(chain: Chain) -> None:
    port = chain.local.port
    body = body_of("spare", stream=True, max_tokens=12)
    answer = await ask(port, request("POST", CHAT, body, headers=[CONVERSATION], close=True))
    assert answer.status == 200
    replayed = await get(port, f"/v1/stream?{CONV}&from=0")
    assert (replayed.status, replayed.body) == (200, answer.body)
    assert (await get(port, f"/v1/stream?{CONV}&from=100")).body == answer.body[100:]
    [found] = (await post(port, "/v1/streams/lookup", {"conversation_ids": ["conv"]})).json()
    assert (found["conversation_id"], found["is_done"]) == (CONVERSATION[1], True)
    assert (await ask(port, request("DELETE", f"/v1/stream?{CONV}", close=True))).status == 204
    assert (await get(port, f"/v1/stream?{CONV}&from=0")).status == 404


async def test_real_llama_cpp_answers_what_is_passed_on(chain: Chain) -> None:
    port = chain.local.port
    chat = body_of("spare", max_tokens=5)
    for path in ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"):
        assert (await post(port, path, chat)).json()["input_tokens"] > 5
    assert (await post(port, "/messages", chat)).json()["type"] == "message"
    assert (await post(port, "/messages/count_tokens", chat)).json()["input_tokens"] > 5
    async with connected(port) as client:
        await client.send(request("GET", "/metrics?model=spare", close=True))
        metrics = b"".join([piece async for piece in client.reader])
    assert metrics.startswith(b"HTTP/1.1 200 ") and re.search(rb"\r\nProcess-Start-Time-Unix: \d+\r\n", metrics)
    assert (
        b"\r\nContent-Type: text/plain; version=0.0.4\r\n" in metrics and b"\nllamacpp:prompt_tokens_total " in metrics
    )
    adapters = await ask(port, request("POST", "/lora-adapters?model=spare", b"[]", close=True))
    assert (adapters.status, adapters.json()) == (200, {"success": True})
    assert (await get(port, "/props")).json()["role"] == "router"


# -- tools, which can run commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tools", "/mcp"])
async def test_tools_are_there_where_the_models_own_args_switch_them_on(native: Native, path: str) -> None:
    await native.loaded("tooled")
    for method, body in (("GET", None), ("POST", {"tool": "read_file", "params": {}})):
        for query in ("", "?model=tooled"):
            assert (await native.send(method, path + query, body)).json()["path"] == path
        refused = await native.send(method, f"{path}?model=plain", body)
        assert (refused.status, refused.error["code"]) == (403, "feature_disabled")


@pytest.mark.parametrize("path", ["/tools", "/mcp"])
@pytest.mark.parametrize(
    ("header", "status"),
    [
        (("Origin", "http://localhost:8080"), 200),
        (("Origin", "https://127.0.0.1"), 200),
        (("Origin", "https://evil.example"), 403),
        (("Origin", "http://localhost.evil.example"), 403),
        (("Origin", "null"), 403),
        (("Origin", "chrome-extension://abc"), 403),
        (("Sec-Fetch-Site", "cross-site"), 403),
    ],
)
async def test_tools_are_never_there_for_pages_of_other_machines(
    native: Native, path: str, header: tuple[str, str], status: int
) -> None:
    await native.loaded("tooled")
    for method, body in (("GET", None), ("POST", {"tool": "exec_shell_command"})):
        before = len(sent(native.fakes))
        assert (await native.send(method, path, body, header)).status == status, method
        assert len(sent(native.fakes)) - before == (status == 200)
