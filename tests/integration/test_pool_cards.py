"""What clients of the Ollama API get about a model of the pool, whether it is loaded or not."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.llamacpp.model import LlamaCppModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.dialects.ollama.models import ps_item, show, tags_item
from tests.support.gguf_fixture import write_small_gguf
from tests.support.pools import FakeModel, Fakes, ask, open_pool


async def test_a_model_of_the_pool_is_described_in_every_answer(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    write_small_gguf(fakes.gguf)
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(ctx=2048, parallel=2)
        spawned = _spawned(pool, model)
        about = await spawned.info()
        assert tags_item(about)["details"]["context_length"] == 4096
        answer = show(about, requested_name="M", user_agent="GitHubCopilotChat/1")
        assert answer["parameters"].split() == ["num_ctx", "1024"]
        assert answer["model_info"]["general.basename"] == "M"
        assert await spawned.residence() is None
        await ask(pool, "m", model)
        residence = await spawned.residence()
        assert residence is not None
        running = ps_item(about, residence)
        assert running["context_length"] == 1024 and running["size"] > 2048
        assert datetime.fromisoformat(running["expires_at"]) > datetime.now(UTC)
        unset = _spawned(pool, fakes.model(parallel=2))
        residence = await unset.residence()
        assert residence is not None and residence.context_length == 2048


def _spawned(pool: Pool, model: FakeModel) -> LlamaCppModel:
    return LlamaCppModel(pool, model.at("m"), model, Headers())
