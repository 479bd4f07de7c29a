"""Which headers cross the proxy, seen at the far end of a real one."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy import __version__
from tests.support import toxic
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import Answer, ask, post, request
from tests.support.stages import Stage
from tests.support.toxic import RawUpstream, Request, own_proxy

CHAT = "/v1/chat/completions"
BODY = {"model": "m"}
CANARY = "canary-5f2d"

NEVER_UPSTREAM = [
    ("Connection", "X-Named, keep-alive, X-Named-Too"),
    ("X-Named", CANARY),
    ("X-Named-Too", CANARY),
    ("Keep-Alive", f"timeout=5, {CANARY}"),
    ("Proxy-Authorization", CANARY),
    ("Proxy-Authenticate", CANARY),
    ("Proxy-Connection", CANARY),
    ("TE", f"trailers, {CANARY}"),
    ("Trailer", CANARY),
    ("Authorization", f"Bearer {CANARY}"),
    ("X-Api-Key", CANARY),
    ("Cookie", f"session={CANARY}"),
    ("Cookie2", CANARY),
    ("Origin", f"app://{CANARY}"),
    ("Referer", f"http://{CANARY}"),
    ("Forwarded", f"for={CANARY}"),
    ("X-Real-IP", CANARY),
    ("X-Forwarded-For", CANARY),
    ("X-Forwarded-Host", CANARY),
    ("X-Forwarded-Proto", CANARY),
    ("X-Forwarded-Anything", CANARY),
    ("Accept-Encoding", f"gzip, {CANARY}"),
    ("Range", f"bytes=0-9, {CANARY}"),
    ("If-Range", CANARY),
    ("X-Conversation-Id", CANARY),
    ("Sec-Fetch-Site", CANARY),
    ("Access-Control-Request-Method", CANARY),
]
CREDENTIALS = [
    *(("Api-Key", "X-Goog-Api-Key", "X-Auth-Token", "X-Auth-Key", "Ocp-Apim-Subscription-Key", "X-LiteLLM-Api-Key")),
    *(("Apikey", "X_Api_Key", "X-Access-Token", "X-Amz-Security-Token", "Helicone-Auth", "X-Csrf-Token", "X-Password")),
    *(
        (
            "X-Client-Secret",
            "X-Session-Cookie",
            "X-Goog-IAP-JWT-Assertion",
            "Cf-Access-Jwt-Assertion",
            "X-Hub-Signature",
        )
    ),
]
ABOUT_THE_USER = [
    *(f"X-OpenWebUI-User-{name}" for name in ("Name", "Id", "Email", "Role")),
    *(f"X-Forwarded-{name}" for name in ("User", "Email", "Groups", "Preferred-Username")),
    *(("From", "Remote-User", "Remote-Name", "X-Remote-User", "X-Auth-Request-Email", "X-User-Id", "X-Username")),
    *(
        (
            "Tailscale-User-Login",
            "Cf-Connecting-Ip",
            "True-Client-Ip",
            "X-Client-IP",
            "X-Authentik-Name",
            "X-Original-URI",
        )
    ),
    *(("X-Goog-Authenticated-User-Email", "X-Ms-Client-Principal-Name", "X-Amzn-Oidc-Identity", "X-Userid")),
]
NEVER_UPSTREAM += [(name, CANARY) for name in (*CREDENTIALS, *ABOUT_THE_USER)]
NEVER_DOWNSTREAM = [
    ("Connection", "X-Named"),
    ("Connection", "X-Named-Too"),
    ("X-Named", CANARY),
    ("X-Named-Too", CANARY),
    ("Keep-Alive", f"timeout=5, max={CANARY}"),
    ("Proxy-Authenticate", CANARY),
    ("Proxy-Connection", CANARY),
    ("Trailer", CANARY),
    ("Set-Cookie", f"session={CANARY}"),
    ("Set-Cookie", f"more={CANARY}"),
    ("Set-Cookie2", CANARY),
    ("Alt-Svc", CANARY),
    ("Strict-Transport-Security", CANARY),
    ("WWW-Authenticate", CANARY),
    ("Server", CANARY),
    ("Access-Control-Allow-Origin", CANARY),
    ("Access-Control-Allow-Credentials", CANARY),
]
EXTRAS = [
    ("X-Request-Cost", "12"),
    ("OpenAI-Processing-Ms", "17"),
    ("X-Ratelimit-Remaining", "3"),
    ("X-Twice", "one"),
    ("X-Twice", "two"),
    ("Cache-Control", "no-store"),
    ("Vary", "X-Thing"),
]


async def ask_with(proxy: Proxy, upstream: RawUpstream, headers: list[tuple[str, str]]) -> Request:
    upstream.script = toxic.plain(b"{}")
    answer = await ask(proxy.port, request("POST", CHAT, BODY, headers=headers))
    assert answer.status == 200, answer
    return upstream.requests[-1]


@pytest.mark.parametrize("case", [str.title, str.upper, str.lower])
async def test_what_is_not_for_the_model_server_does_not_reach_it(
    proxy: Proxy, upstream: RawUpstream, case: type[str]
) -> None:
    for first in range(0, len(NEVER_UPSTREAM), 30):  # one request may not have more than 100
        some = [*NEVER_UPSTREAM[:3], *NEVER_UPSTREAM[first : first + 30]]
        seen = await ask_with(proxy, upstream, [(case(name), value) for name, value in some])
        assert CANARY.encode() not in upstream.received
    names = [name for name, _ in seen.headers]
    assert sorted(names) == ["accept-encoding", "content-length", "content-type", "host", "via"]
    assert seen.header("host") == f"127.0.0.1:{upstream.port}"
    assert seen.header("accept-encoding") == "identity"


async def test_every_connection_header_counts(proxy: Proxy, upstream: RawUpstream) -> None:
    headers = [("Connection", "keep-alive"), ("Connection", "X-Named"), ("X-Named", CANARY)]
    seen = await ask_with(proxy, upstream, headers)
    assert seen.header("x-named") is None


async def test_all_other_request_headers_reach_the_model_server(proxy: Proxy, upstream: RawUpstream) -> None:
    mine = [
        ("X-Session-Id", "abc"),
        ("X-OpenWebUI-Chat-Id", "chat"),
        ("Idempotency-Key", "1"),
        ("X-Max-Tokens", "1"),
        ("anthropic-version", "2023-06-01"),
        ("OpenAI-Organization", "org"),
        ("User-Agent", "tester/1"),
        ("Accept", "text/event-stream"),
        ("X-Twice", "one"),
        ("X-Twice", "two"),
        ("X-Empty", ""),
    ]
    seen = await ask_with(proxy, upstream, mine)
    for name, value in mine:
        assert (name.lower(), value) in seen.headers


QUERIES = (
    "key",
    "api_key",
    "api-key",
    "apiKey",
    "KEY",
    "access_token",
    "token",
    "client_secret",
    "%6bey",
    "auth",
    "sig",
)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/rerank", "/v1/embeddings", "/tokenize", "/slots/0"])
async def test_keys_in_a_query_reach_neither_the_model_server_nor_the_log(
    proxy: Proxy, upstream: RawUpstream, path: str
) -> None:
    upstream.script = toxic.plain(b"{}")
    keys = "&".join(f"{name}={CANARY}" for name in QUERIES)
    for query, kept in (
        (f"?{keys}&model=m&beta=true", "?model=m&beta=true"),
        (f"?a=1&{keys}", "?a=1"),
        (f"?{keys}", ""),
    ):
        assert (await post(proxy.port, path + query, BODY)).status == 200
        assert upstream.requests[-1].line == f"POST {path}{kept} HTTP/1.1"
    for unknown in (f"/v1/nothing?{keys}", f"{CHAT}?{keys}&model=none", f"/v1/models/none?{keys}"):
        answer = await ask(proxy.port, request("GET", unknown, close=True), method="GET")
        assert answer.status in (404, 405) and CANARY.encode() not in answer.body
    assert CANARY.encode() not in upstream.received
    assert CANARY not in proxy.log


async def test_a_remote_gets_the_headers_about_the_user_that_its_configuration_names() -> None:
    names = [*CREDENTIALS, *ABOUT_THE_USER, "Authorization", "Proxy-Authorization", "Cookie"]
    async with toxic.raw_upstream(toxic.plain(b"{}")) as upstream:
        remote = {
            "url": f"http://127.0.0.1:{upstream.port}",
            "models": ["m"],
            "api_key": "its-own",
            "forward_headers": ["X-OpenWebUI-User-*", "x-auth-token", "Remote-User"],
        }
        async with running_proxy({"remotes": {"up": remote}}) as proxy:
            for path in (CHAT, "/api/chat", "/v1/embeddings", "/props?model=m"):
                sent = [(name, "value") for name in names]
                method, body = (
                    ("GET", None)
                    if "?" in path
                    else ("POST", {**BODY, **EMBEDDED, "messages": ASKED["messages"], "stream": False})
                )
                await ask(proxy.port, request(method, path, body, headers=sent, close=True))
                seen = [
                    (name, value)
                    for name, value in upstream.requests[-1].headers
                    if value in ("value", "Bearer its-own")
                ]
                wanted = [
                    "x-openwebui-user-name",
                    "x-openwebui-user-id",
                    "x-openwebui-user-email",
                    "x-openwebui-user-role",
                ]
                wanted += ["x-auth-token", "remote-user"]
                assert sorted(seen) == sorted(
                    [("authorization", "Bearer its-own"), *((name, "value") for name in wanted)]
                )


async def test_servers_of_this_machine_and_ollamas_get_nothing_about_the_user(stage: Stage) -> None:
    sent = [(name, CANARY) for name in (*CREDENTIALS, *ABOUT_THE_USER, "Authorization", "Cookie")]
    for path, model in (
        *((CHAT, model) for model in ("local", "distant")),
        ("/api/chat", "local"),
        ("/api/chat", "distant"),
    ):
        body = {**ASKED, "model": model, "stream": False}
        answer = await ask(stage.proxy.port, request("POST", f"{path}?key={CANARY}", body, headers=sent, close=True))
        assert answer.status == 200
    received = [*stage.local.events("request"), *stage.distant.events("request")]
    assert received and CANARY not in str(received)
    assert CANARY not in stage.proxy.log


async def test_header_bytes_are_the_same_on_both_sides(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}", headers=[("X-Name", "Jos\u00e9 \U0001f600")])
    answer = await ask(proxy.port, request("POST", CHAT, BODY, headers=[("X-Name", "Jos\u00e9 \U0001f600")]))
    wanted = "Jos\u00e9 \U0001f600".encode()
    assert b"X-Name: " + wanted + b"\r\n" in upstream.received
    assert str(answer.header("x-name")).encode("latin-1") == wanted


async def test_latin_1_header_of_the_model_server_is_no_error(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}").replace(b"Content-Length", b"X-Name: Jos\xe9\r\nContent-Length")
    assert (await post(proxy.port, CHAT, BODY)).status == 200


async def answer_with(
    proxy: Proxy, upstream: RawUpstream, headers: list[tuple[str, str]], kind: str, path: str = CHAT
) -> Answer:
    if kind == "stream":
        start = toxic.head(200, [*headers, ("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
        upstream.script = start + toxic.chunk(toxic.DONE) + toxic.LAST_CHUNK
    else:
        body = b"x" * (2 * 2**20 if kind == "large" else 10)
        upstream.script = toxic.plain(body, headers=headers)
    answer = await post(proxy.port, path, BODY | {"stream": kind == "stream"})
    assert answer.status == 200
    return answer


@pytest.mark.parametrize("kind", ["plain", "stream", "large"])
async def test_what_is_not_for_the_client_does_not_reach_it(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    answer = await answer_with(proxy, upstream, NEVER_DOWNSTREAM, kind)
    assert CANARY not in str(answer.headers)
    assert "aiohttp" not in str(answer.headers)


@pytest.mark.parametrize("kind", ["plain", "stream", "large"])
async def test_unknown_response_headers_survive(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    answer = await answer_with(proxy, upstream, EXTRAS, kind)
    for name, value in EXTRAS:
        assert (name.lower(), value) in answer.headers


THEIRS = [("X-Request-Id", "theirs"), ("Request-Id", "theirs"), ("Server", "theirs"), ("Date", "theirs")]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize("kind", ["plain", "stream", "large"])
async def test_each_relayed_answer_has_one_request_id_and_one_of_each_framing_header(
    proxy: Proxy, upstream: RawUpstream, kind: str, path: str
) -> None:
    answer = await answer_with(proxy, upstream, THEIRS, kind, path)
    names = [name for name, _ in answer.headers]
    assert names.count("x-request-id") == names.count("date") == names.count("content-type") == 1
    assert names.count("content-length") + names.count("transfer-encoding") == names.count("server") == 1
    assert names.count("request-id") == (path == "/v1/messages")
    assert "theirs" not in dict(answer.headers).values()


ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
EMBEDDED = {"input": "hi"}
ANSWERS: list[tuple[str, str, dict[str, Any] | bytes | None, int]] = [
    *(("POST", path, {**ASKED, "model": model, "stream": stream}, 200)
      for path in (CHAT, "/v1/messages", "/api/chat") for model in ("local", "distant") for stream in (False, True)),
    *(("POST", path, {**EMBEDDED, "model": "distant"}, 200) for path in ("/v1/embeddings", "/api/embed")),
    ("POST", "/v1/messages/count_tokens", {**ASKED, "model": "distant"}, 200),
    *(("GET", path, None, 200) for path in ("/", "/health", "/plugins", "/v1/models", "/v1/models/local", "/api/tags")),
    *(("GET", path, None, 200) for path in ("/api/version", "/api/ps", "/models")),
    *(("HEAD", path, None, 200) for path in ("/", "/models/sse", "/api/tags")),
    ("POST", "/api/show", {"model": "distant"}, 200),
    ("POST", "/api/show", {"model": "local"}, 200),
    *(("POST", path, {**ASKED, "model": "none"}, 404) for path in (CHAT, "/v1/messages", "/api/chat", "/nothing")),
    *(("POST", "/v1/responses", {**EMBEDDED, "model": "local", "stream": stream}, 200) for stream in (False, True)),
    *(("POST", path, b"{", 400) for path in (CHAT, "/v1/messages", "/api/chat", "/models/load")),
    *(("GET", path, None, 405) for path in (CHAT, "/v1/messages", "/api/chat")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
async def test_every_answer_names_the_request_by_the_clients_id_and_the_server_as_ours(
    stage: Stage, method: str, path: str, body: dict[str, Any] | bytes | None, status: int
) -> None:
    sent = request(method, path, body, headers=[("X-Request-Id", "mine-1")], close=True)
    answer = await ask(stage.proxy.port, sent, method=method)
    assert answer.status == status, answer
    ours = [(name, value) for name, value in answer.headers if name in ("x-request-id", "request-id", "server")]
    named = [("request-id", "mine-1")] if path.startswith("/v1/messages") else []
    assert sorted(ours) == [*named, ("server", f"llama-smart-proxy/{__version__}"), ("x-request-id", "mine-1")]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/local", "/v1/models/none", "/v1/models?limit=x"])
async def test_a_list_of_models_for_anthropics_clients_names_the_request_as_anthropic_does(
    stage: Stage, path: str
) -> None:
    asking = [("Anthropic-Version", "2023-06-01"), ("X-Request-Id", "mine-2")]
    answer = await ask(stage.proxy.port, request("GET", path, headers=asking, close=True), method="GET")
    assert [value for name, value in answer.headers if name.endswith("request-id")] == ["mine-2"] * 2


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0c8f9f6e-5b6e-4bb0-9d4d-2f1c6f6a3c11", True),
        ("req_011CSHoEeqs5C35K2UUqR7Fy", True),
        ("Root=1-67891233-abcdef012345678912345678", True),
        ("a.b:c/d+e=f@g|h~i", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a,b", False),
        ('"quoted"', False),
        ("<script>", False),
        ("a\tb", False),
        ("\u00fc", False),
        ("\u202e", False),
    ],
)
async def test_the_clients_own_id_is_kept_if_it_is_a_sane_one(proxy: Proxy, given: str, kept: bool) -> None:
    asking = request("GET", "/health", headers=[("X-Request-Id", given)], close=True)
    answer = await ask(proxy.port, asking, method="GET")
    again = await ask(proxy.port, asking, method="GET")
    named = answer.header("x-request-id")
    assert named and (named == given) == kept == (named == again.header("x-request-id"))
    await until(lambda: f"ms {named}\n" in proxy.log, what="the access line")


async def test_the_way_a_request_came_is_told_on_so_that_circles_are_noticed() -> None:
    async with own_proxy() as (proxy, upstream):
        seen = await ask_with(proxy, upstream, [("Via", "1.1 somebody")])
        ours, theirs = [value for name, value in seen.headers if name == "via"]
        assert theirs == "1.1 somebody" and ours.startswith("1.1 llama-smart-proxy-")
        again = await ask(proxy.port, request("POST", CHAT, BODY, headers=[("Via", f"1.1 other, {ours}")]))
        assert (again.status, again.error["code"]) == (508, "loop_detected")
        assert len(upstream.requests) == 1
