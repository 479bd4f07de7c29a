"""API keys with the official clients of the three APIs: what they send is read, and what they get they understand."""

from __future__ import annotations

from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.support.keyed import MESSAGES, USER, Keyed, keyed

WRONG = "wrong-key-0123456789"
LIMITED = [{"name": "user", "key": USER, "requests_per_minute": 2}]
CHAT: dict[str, Any] = {"model": "a1", "messages": MESSAGES}
MESSAGE: dict[str, Any] = {**CHAT, "max_tokens": 9}


def of_openai(proxy: Keyed, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{proxy.port}/v1", api_key=key, max_retries=0)


def of_anthropic(proxy: Keyed, form: str, key: str) -> anthropic.AsyncAnthropic:
    given: dict[str, Any] = {form: key}
    return anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{proxy.port}", max_retries=0, **given)


async def test_openais_client_raises_its_own_errors_and_reads_the_limits() -> None:
    async with keyed(LIMITED) as proxy, of_openai(proxy, USER) as client, of_openai(proxy, WRONG) as other:
        raw = await client.chat.completions.with_raw_response.create(**CHAT)
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**{**CHAT, "model": "no-such"})
        with pytest.raises(openai.RateLimitError) as reached:
            await client.responses.create(model="a1", input="x")
        assert reached.value.code == "rate_limit_exceeded" and int(reached.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.AuthenticationError) as refused:
            await other.models.list()
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("form", ["api_key", "auth_token"])
async def test_anthropics_client_raises_its_own_errors_with_both_forms_of_a_key(form: str) -> None:
    async with (
        keyed(LIMITED) as proxy,
        of_anthropic(proxy, form, USER) as client,
        of_anthropic(proxy, form, WRONG) as other,
    ):
        for _ in range(2):
            assert (await client.messages.create(**MESSAGE)).content[0].text == "Hi"
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(**MESSAGE)
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await other.messages.create(**MESSAGE)
        assert isinstance(refused.value.body, dict) and refused.value.body["error"]["type"] == "authentication_error"


async def test_ollamas_client_sends_a_key_by_its_headers_and_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    async with keyed(LIMITED) as proxy:
        host = f"http://127.0.0.1:{proxy.port}"
        async with ollama.AsyncClient(host, headers={"Authorization": f"Bearer {USER}"}) as client:
            assert (await client.chat("a1", MESSAGES)).message.content == "Hi"
        monkeypatch.setenv("OLLAMA_API_KEY", USER)
        async with ollama.AsyncClient(host) as client:
            assert (await client.list()).models
        monkeypatch.setenv("OLLAMA_API_KEY", WRONG)
        async with ollama.AsyncClient(host) as client:
            with pytest.raises(ollama.ResponseError) as refused:
                await client.chat("a1", MESSAGES)
        assert refused.value.status_code == 401
