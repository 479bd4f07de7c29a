"""What has the form of a secret, or is one, does not reach the log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.config.secrets import secrets_of
from llama_smart_proxy.proxy.log import redaction
from llama_smart_proxy.proxy.log.redaction import SECRET, SHORTEST, hide, redacted

S = "c4nary-5f2d"


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    redaction._known.clear()
    yield
    redaction._known.clear()


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {S}",
        f"authorization: bearer  {S}",
        f"Authorization: Bearer\0{S}",
        f"Authorization: {S}",
        f"Authorization: Token {S}",
        f'Authorization: Digest username="x", response="{S}"',
        f"{{'Authorization': 'ApiKey {S}', 'Accept': '*/*'}}",
        f"Proxy-Authorization: Basic {S}=",
        f"[(b'authorization', b'Bearer {S}')]",
        f"x-api-key: {S}",
        f"{{'X-Api-Key': '{S}'}}",
        f'{{"api_key": "{S}"}}',
        f"Config(api_key='{S}', models=[])",
        f"OPENAI_API_KEY={S}",
        f"HF_TOKEN={S}",
        f"password = {S}",
        f"Cookie: theme=dark; session={S}",
        f"set-cookie: session={S}; HttpOnly",
        f"GET /v1/models?key={S} failed",
        f"http://host/x?a=1&api_key={S}&b=2",
        f"http://host/x?access_token={S}#top",
        f"http://user:{S}@host/path",
        f"cannot connect to https://{S}@host",
        f"postgres://u:{S}@h:5432/d",
        f"sk-{S}",
        f"sk-ant-api03-{S}",
        f"key hf_{S.replace('-', '')}a is invalid",
        f"lsp-{S}",
        f"ghp_{S}",
        f"eyJhbGciOiJIUzI1NiJ9.{S.replace('-', '_')}.{S.replace('-', '_')}",
        f"Incorrect API key provided: sk-{S}.",
    ],
)
def test_what_looks_like_a_secret_is_blanked(text: str) -> None:
    assert S not in redacted(text) and "c4nary" not in redacted(text) and SECRET in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "m: starting -> ready after 1.234 s: pid 1234, port 11600, 2 slots",
        "max_tokens: 5, prompt_tokens=7",
        "unexpected token: x",
        "the bearer of news",
        "listening on http://127.0.0.1:11555",
        "monkey=1, keyboard: qwerty",
        "models run in: /usr/bin/llama-server --host 127.0.0.1",
        "send to a@b.example",
        "task-based risk-averse disk-space-12345",
        "GET /v1/models?model=sk",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


def test_what_stands_behind_a_quoted_header_stays() -> None:
    text = "{'Authorization': 'ApiKey c4nary', 'Accept': 'text/html'}"
    assert redacted(text) == f"{{'Authorization': '{SECRET}', 'Accept': 'text/html'}}"


def test_a_known_secret_is_blanked_wherever_it_is_also_as_it_is_in_a_url() -> None:
    hide(["hunter two/+", "short"])
    assert redacted("x(hunter two/+) hunter%20two%2F%2B") == f"x({SECRET}) {SECRET}"
    assert redacted("short") == "short" and len("short") < SHORTEST
    hide(["ollama"])  # a common one for servers that require a key and check none
    assert redacted("models of ollama") == "models of ollama"


def test_the_secrets_of_a_configuration_are_known(tmp_path: Path) -> None:
    (tmp_path / "HF").write_text("of-the-service-manager\n")
    config = Config.model_validate(
        {
            "remotes": {"r": {"url": "http://h/v1", "api_key": "of-a-remote"}},
            "models": {
                "m": {
                    "path": "x.gguf",
                    "env": {"SOME_TOKEN": "in-the-environment", "OTHER": "plain-value"},
                    "args": [
                        "--api-key-file",
                        "a-file-name",
                        "--hf-token",
                        "of-an-argument",
                        "--grp-secret=with-equals",
                    ],
                }
            },
            "sections": {"mine": {"password": "of-a-module", "url": "postgres://who:in-the-url@h/d"}},
        }
    )
    found = set(secrets_of(config, {"OPENAI_API_KEY": "of-the-process", "CREDENTIALS_DIRECTORY": str(tmp_path)}))
    assert found >= {
        "in-the-url", "of-a-remote", "in-the-environment", "of-an-argument", "with-equals",
        "of-a-module", "of-the-process", "of-the-service-manager\n",
    }  # fmt: skip
    assert not found & {"plain-value", "a-file-name", "x.gguf"}
