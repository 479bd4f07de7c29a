"""Models with `cmd`, as clients and operators meet them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.fakes import plain_server
from tests.support.harness import PATIENCE_S, logged, ports, running_proxy, until
from tests.support.raw_client import ask, get, post, request
from tests.support.speakers import SPEAKERS

SERVE = f"{shlex.join([sys.executable, '-S', plain_server.__file__])} serve --port ${{PORT}}"


async def test_a_model_with_a_command_is_used_like_any_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    plain = {
        "cmd": f"{SERVE} --name '${{MODEL_ID}}'",
        "env": {"PLAIN_LOG": str(log)},
        "served_name": "org/big",
        "aliases": ["also"],
        "title": "A plain one",
        "filters": {"set": {"min_p": 0.5}},
        "preload": True,
    }
    config = {
        "models": {"plain": plain, "cold": {"model": "plain", "filters": {"set": {"temperature": 0}}}},
        "server_pool": {"size": 1, **ports()},
    }
    async with running_proxy(config) as proxy:
        await until(lambda: _loaded(proxy.port), PATIENCE_S, what="the model loaded at start")
        for name in ("plain", "also", "cold"):
            for speaker in SPEAKERS.values():
                for stream in (True, False):  # its server streams nothing, whatever it is asked
                    outcome = await speaker.ask(proxy.port, speaker.body(name, stream=stream))
                    assert (outcome.status, outcome.text, outcome.error) == (200, "plain got org/big", None)
                    sent = [event for event in logged(log) if event["event"] == "post"][-1]
                    assert (sent["path"], sent["body"]["min_p"]) == ("/v1/chat/completions", 0.5)
                    assert sent["body"].get("temperature") == (0 if name == "cold" else None)
        listed = (await get(proxy.port, "/v1/models")).json()["data"]
        assert [(item["id"], item["owned_by"]) for item in listed] == [
            ("plain", "command"),
            ("cold", "llama-smart-proxy"),
        ]
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nplain\r\n--b--\r\n'
        asked = request("POST", "/v1/audio/transcriptions", form, close=True)
        kind = b"multipart/form-data; boundary=b"
        assert (await ask(proxy.port, asked.replace(b"application/json", kind, 1))).status == 200
        assert "\r\n\r\norg/big\r\n" in [event for event in logged(log) if event["event"] == "post"][-1]["body"]["form"]
        for path in ("/tokenize", "/infill"):
            assert (await post(proxy.port, path, {"model": "plain", "content": "a"})).status == 501
        assert (await post(proxy.port, "/models/unload", {"model": "plain"})).status == 200
        assert proxy.children() == []


async def _loaded(port: int) -> bool:
    [plain, *_] = (await get(port, "/v1/models")).json()["data"]
    return bool(plain["status"]["value"] == "loaded")
