"""Values that JSON allows and programs trip over, in every field of every API: an answer or an error of the client's,
and never an internal one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.support import toxic
from tests.support.here import served_here
from tests.support.raw_client import connected, request
from tests.support.toxic import raw_upstream

USER = '[{"role":"user","content":"x"}]'
CHAT = '{"model":"m","messages":' + USER
PLACES = {
    "/v1/chat/completions": [
        '{"model":"m","messages":[{"role":"user","content":V}]}',
        '{"model":"m","messages":V}',
        *(CHAT + f',"{name}":V}}' for name in ("max_tokens", "n", "stream", "tools", "agents", "x", "logit_bias")),
        CHAT + ',"tools":[{"type":"function","function":{"name":"f","parameters":V}}]}',
    ],
    "/v1/messages": [
        *(f'{{"model":"m","max_tokens":5,"{name}":V,"messages":{USER}}}' for name in ("system", "tools", "metadata")),
        '{"model":"m","max_tokens":V,"messages":' + USER + "}",
        '{"model":"m","max_tokens":5,"messages":[{"role":"user","content":V}]}',
    ],
    "/v1/responses": [
        '{"model":"m","input":V}',
        *(f'{{"model":"m","input":"x","{name}":V}}' for name in ("metadata", "text", "reasoning", "max_output_tokens")),
    ],
    "/api/chat": [
        *(CHAT + f',"stream":false,"{name}":V}}' for name in ("keep_alive", "format", "think", "top_logprobs", "X")),
        CHAT + ',"stream":false,"options":{"num_ctx":V,"temperature":V,"seed":V,"num_predict":V,"stop":V}}',
    ],
    "/api/generate": ['{"model":"m","prompt":"x","stream":false,"context":V}'],
    "/api/embed": ['{"model":"m","input":V}', '{"model":"m","input":"x","dimensions":V,"keep_alive":V}'],
    "/v1/embeddings": ['{"model":"m","input":V}', '{"model":"m","input":"x","dimensions":V}'],
    "/api/show": ['{"model":V}', '{"model":"m","verbose":V}'],
    "/lora-adapters?model=m": ["V", "[V]"],
    "/models/load": ['{"model":V}'],
}
NUMBERS = ["9" * 30, "-" + "9" * 30, "9" * 5000, "1e400", "1e308", "-1e308", "1" + "0" * 30 + "e-5", "-0", "-1"]
NESTED = {
    f"{depth} {kind}": text
    for depth in (200, 251, 300, 900, 50_000)
    for kind, text in (("lists", "[" * depth + "]" * depth), ("objects", '{"a":' * depth + "1" + "}" * depth))
}
TEXTS = {"text": '"\\ud800"', "text of lists": json.dumps("[" * 900)}
ANSWER = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}],"data":[]}'
VALUES = {f"number {place}": number for place, number in enumerate(NUMBERS)} | NESTED | TEXTS


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with raw_upstream(toxic.plain(ANSWER)) as upstream:
        remotes = {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
        async with served_here({"remotes": remotes}) as (_, port):
            yield port


@pytest.mark.parametrize("path", PLACES)
async def test_no_value_is_an_internal_error(port: int, path: str) -> None:
    async with connected(port) as client:
        for place in PLACES[path]:
            for name, value in VALUES.items():
                await client.send(request("POST", path, place.replace("V", value).encode()))
                answer = await client.answer()
                shown = (place, name, answer.body[:300])
                assert answer.status != 500 and len(answer.body) < 200_000, shown
                assert answer.status < 500 or b"internal error" not in answer.body, shown
