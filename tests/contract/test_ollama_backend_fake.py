"""The fake Ollama is one in the eyes of Ollama's own client, and plays transcripts as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import raw_client
from tests.support.ollamas import running_ollama

ollama = pytest.importorskip("ollama")
HI = [{"role": "user", "content": "hi"}]


async def test_the_official_client_takes_it_for_an_ollama() -> None:
    async with (
        running_ollama("m", thinking="hm", tool_call=["f", {"x": 1}]) as fake,
        ollama.AsyncClient(host=fake.url) as client,
    ):
        assert [model.model for model in (await client.list()).models] == ["m:latest"]
        whole = await client.chat("m", HI)
        assert (whole.message.content, whole.message.thinking, whole.done_reason) == ("t0 t1 t2 t3 ", "hm", "stop")
        assert whole.message.tool_calls[0].function.arguments == {"x": 1}
        assert whole.eval_count == 4 and whole.total_duration > 0
        parts = [part async for part in await client.chat("m", HI, stream=True)]
        assert "".join(part.message.content for part in parts) == whole.message.content
        assert [part.done for part in parts] == [False] * 5 + [True]
        assert (await client.generate("m", "hi")).response == whole.message.content
        assert (await client.embed("m", ["a", "b"])).embeddings == [[0.6, 0.8], [0.6, 0.8]]
        assert [model.context_length for model in (await client.ps()).models] == [4096]
        assert (await client.show("m")).modelinfo["general.architecture"] == "llama"


async def test_the_official_client_can_change_its_models() -> None:
    async with running_ollama("m", registry=["n"]) as fake, ollama.AsyncClient(host=fake.url) as client:
        statuses = [part.status async for part in await client.pull("n", stream=True)]
        assert (statuses[0], statuses[-1]) == ("pulling manifest", "success")
        await client.copy("n", "o")
        await client.delete("m")
        assert [model.model for model in (await client.list()).models] == ["n:latest", "o:latest"]
        for failing in (client.pull("gone"), client.chat("m", HI), client.delete("m")):
            with pytest.raises(ollama.ResponseError, match=r"does not exist|model 'm' not found"):
                await failing
        await client.generate("n", "hi")
        await client.generate("n", "", keep_alive=0)
        assert (await client.ps()).models == []
        assert [event["event"] for event in fake.events("load") + fake.events("unload")] == ["load", "unload"]


async def test_a_transcript_is_played_for_the_request_it_was_written_for(tmp_path: Path) -> None:
    def golden(name: str, body: dict[str, object], response: dict[str, object]) -> None:
        request = {"method": "POST", "path": "/api/chat", "body": {"model": "g", **body}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "request": request, "response": response}))

    lines = ['{"message":{"content":"\\u2028"},"done":false}', {"done": True}]
    golden("plain", {}, {"status": 200, "headers": {"Content-Type": "application/x-ndjson"}, "lines": lines})
    golden("seeded", {"options": {"seed": 1}}, {"status": 418, "body": {"error": "teapot"}})
    async with running_ollama("m", golden=tmp_path) as fake:
        streamed = await raw_client.post(fake.port, "/api/chat", {"model": "g", "options": {"num_ctx": 1}})
        assert streamed.body == b'{"message":{"content":"\\u2028"},"done":false}\n{"done":true}\n'
        assert streamed.header("content-type") == "application/x-ndjson"
        refused = await raw_client.post(fake.port, "/api/chat", {"model": "g", "options": {"seed": 1, "num_ctx": 1}})
        assert (refused.status, refused.json()) == (418, {"error": "teapot"})
        assert (await raw_client.post(fake.port, "/api/chat", {"model": "m", "messages": HI})).status == 200
        names = [item["name"] for item in (await raw_client.get(fake.port, "/api/tags")).json()["models"]]
        assert names == ["m:latest", "g:latest"]


async def test_every_transcript_of_ours_is_played() -> None:
    golden = Path(__file__).parents[1] / "golden" / "ollama"
    files = sorted(golden.glob("*.json"))
    assert len(files) > 20
    async with running_ollama(golden=golden) as fake:
        for file in files:
            written = json.loads(file.read_text(encoding="utf-8"))
            request, response = written["request"], written["response"]
            data = raw_client.request(request["method"], request["path"], request.get("body"), close=True)
            answer = await raw_client.ask(fake.port, data, method=request["method"])
            played = [json.loads(line) for line in answer.body.splitlines()] if "lines" in response else answer.json()
            assert (answer.status, played) == (response["status"], response.get("lines", response.get("body"))), file
