"""Forms of a path that get round no scope, and fields that choose no server (A8, P11)."""

from __future__ import annotations

from typing import Any

from tests.support.keyed import ADMIN, CHAT, FEW, MESSAGES, USER, keyed
from tests.support.raw_client import request
from tests.support.toxic import plain, raw_upstream

PULL = '{"model": "qwen3:0.6b", "stream": false}'
TRICKS = r"""
/api/pull /api/pull/ /api/pull?key=x /api/pull#x /api/pull;x=1 /API/PULL /api/Pull //api/pull /api//pull /api/pull//
/./api/pull /api/./pull /api/x/../pull /health/../api/pull /..//api/pull /api/%70ull /%61pi/pull /api%2fpull
/api/pull%2f /api/pull%00 /api/%2e/pull /health%2f..%2fapi/pull /health;/../api/pull /%2e%2e/api/pull /api/pull%20
/api/pull%0d%0a /api\pull /api/pu%6c%6C * http://localhost/api/pull http://localhost:80/health?/api/pull
/health?/api/pull /api/%ef%bd%90ull
"""


async def test_no_form_of_a_path_gets_round_the_scope_of_its_route() -> None:
    rewriting = [("x-api-key", USER), ("X-Original-URL", "/health"), ("X-Rewrite-URL", "/")]
    async with keyed() as proxy:
        for path in TRICKS.split():
            for headers in ([], [("x-api-key", USER)], rewriting):
                for method in ("POST", "GET", "PUT"):
                    async with proxy.connected() as client:
                        await client.send(request(method, path, PULL.encode(), headers=headers, close=True))
                        status = (await client.answer(method=method)).status
                    assert status in (400, 401, 403, 404, 405) or (method, path) == ("GET", "/health?/api/pull"), path
                    assert headers == [] or status != 401, path
        assert proxy.sent("/api/pull") == []
        await proxy.ask("POST", "/api/pull/", {"model": "qwen3:0.6b", "stream": False}, key=ADMIN)
        assert proxy.sent("/api/pull")


async def test_a_query_names_no_other_model_to_a_server() -> None:
    async with keyed() as proxy:
        for query in ("?model=a1&model=b1", "?model=b1", "?%6dodel=b1", "?model=b1&model=a1&model=b1"):
            assert (
                await proxy.ask("POST", f"{CHAT}{query}", {"model": "a1", "messages": MESSAGES}, key=FEW)
            ).status == 200
            assert "b1" not in proxy.sent(CHAT)[-1].line


async def test_a_body_chooses_no_server() -> None:
    """A8: neither with a field of a client's library nor with an address of an image."""
    async with raw_upstream(plain(b"{}")) as canary, keyed() as proxy:
        url = f"http://127.0.0.1:{canary.port}/v1"
        picture = [{"type": "image_url", "image_url": {"url": f"{url}/picture.png"}}, {"type": "text", "text": "What?"}]
        source = {"type": "image", "source": {"type": "url", "url": f"{url}/picture.png"}}
        fields: dict[str, Any] = {
            "api_base": url,
            "base_url": url,
            "url": url,
            "host": url,
            "api_key": "x",
            "endpoint": url,
        }
        for model in ("a1", "big"):
            for path, content in ((CHAT, picture), ("/v1/messages", [source]), ("/api/chat", f"{url}/picture.png")):
                messages = [{"role": "user", "content": content}]
                body = {"model": model, "max_tokens": 5, "stream": False, **fields, "messages": messages}
                headers = [("X-Forwarded-Host", f"127.0.0.1:{canary.port}"), ("HF_ENDPOINT", url), ("Referer", url)]
                await proxy.ask("POST", path, body, key=USER, more=headers)
        body = {"model": f"{url}/model", "messages": MESSAGES}
        assert (await proxy.ask("POST", CHAT, body, key=USER)).status in (400, 404)
        assert canary.links == [] and proxy.sent(CHAT)
