"""Paths whose parts are not what the endpoint documents: each is refused in the client's API, and goes no further."""

from __future__ import annotations

import pytest

from tests.support.harness import Proxy
from tests.support.raw_client import ask, request
from tests.support.toxic import RawUpstream, plain

OTHERS = {
    **{"superscript": "%C2%B2", "full width": "%EF%BC%91", "Arabic": "%D9%A1", "circled": "%E2%91%A0", "raw": "\u00b2"},
    **{
        "negative": "-1",
        "signed": "+1",
        "a fraction": "1.0",
        "hexadecimal": "0x1",
        "underscored": "1_0",
        "a word": "one",
    },
    **{"NUL": "%00", "NUL behind": "1%00", "line break": "1%0a", "header": "1%0d%0aX-Y:%20z", "space": "1%20"},
    **{"parent": "%2e%2e", "plain parent": "..", "way out": "..%2f..%2fprops", "backslash": "..%5cprops"},
    **{"bidi": "%E2%80%AE", "surrogate": "%ed%a0%80", "no UTF-8": "%ff%fe", "invalid percent": "%zz"},
    **{"long": "9" * 600, "very long": "9" * 12_000, "dots": "." * 600},
}
PATHS = {
    "/slots/{}": "message",
    "/v1/models/{}": "message",
    "/api/blobs/sha256:{}": "",
    "/v1/responses/{}": "message",
    "/v1/responses/{}/cancel": "message",
    "/v1/messages/{}": "message",
    "/api/{}": "",
    "/{}": "message",
}


@pytest.mark.parametrize("name", OTHERS)
async def test_a_part_of_a_path_that_is_not_as_documented_is_refused(
    proxy: Proxy, upstream: RawUpstream, name: str
) -> None:
    upstream.script = plain(b'{"reached":"upstream"}')
    for path, field in PATHS.items():
        for method in ("GET", "POST", "DELETE", "HEAD"):
            body = {"model": "m"} if method == "POST" else None
            sent = request(method, path.format(OTHERS[name]), body, close=True)
            answer = await ask(proxy.port, sent, method=method)
            assert answer.status in (400, 404, 405), (method, path, answer)
            if method != "HEAD":
                error = answer.json()["error"]
                assert error[field] if field else isinstance(error, str), (method, path, answer)
    assert upstream.received == b""
    assert "unhandled" not in proxy.log


async def test_the_number_of_a_slot_is_passed_on(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = plain(b"{}")
    for number in ("0", "17", "17/", "1%37"):
        assert (await ask(proxy.port, request("POST", f"/slots/{number}", {"model": "m"}, close=True))).status == 200
        assert upstream.requests[-1].line == f"POST /slots/{'17' if number != '0' else '0'} HTTP/1.1"
