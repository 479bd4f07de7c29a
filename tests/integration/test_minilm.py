"""The model minilm, as a fresh machine has it: its vectors are those of the original weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llama_smart_proxy.backends.llamacpp.launcher import pool_model
from llama_smart_proxy.backends.pool.spawned import SpawnedModel
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.dialects.embeddings import EmbeddingRequest
from llama_smart_proxy.proxy.stream.embeddings import embed
from tests.support.harness import ROOT
from tests.support.minilm import MINILM, Reference, needs_minilm, source
from tests.support.pools import Fakes, open_pool

pytestmark = needs_minilm
LINES = (ROOT / "tests" / "golden" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
"""Accents, many scripts, code, numbers, emoji, and what looks like a token. Not Hangul and Devanagari, which llama.cpp
(b11434) does not decompose as BERT's tokenizer does: the model was not trained for either."""
WORDS = "the of a to file server memory how why does not value type error key list index question answer".split()  # noqa: SIM905
_chance = np.random.default_rng(7)
TEXTS = [*map(json.loads, LINES), *(" ".join(_chance.choice(WORDS, count)) for count in range(2, 102 - len(LINES)))]


@pytest.mark.parametrize(("variant", "least"), [("Q8_0", 0.999), pytest.param("F16", 0.99999, marks=pytest.mark.full)])
async def test_its_vectors_are_those_of_the_original_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, least: float
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(TEXTS) == 100
    model = ModelConfig.model_validate({**MINILM, "variant": variant})
    async with open_pool(Fakes(tmp_path).config(size=1)) as pool:
        spawned = SpawnedModel(pool, pool_model("minilm", model, "embedded"), kind="llama.cpp")
        found = np.array((await embed(spawned, EmbeddingRequest(TEXTS))).vectors, np.float32)
    cosines = (found / np.linalg.norm(found, axis=1, keepdims=True) * Reference(source()).vectors(TEXTS)).sum(axis=1)
    worst = [(float(cosines[at]), TEXTS[at]) for at in cosines.argsort()[:2]]
    assert worst[1][0] >= least and worst[0][0] >= 0.998, worst  # with Q8_0, the Thai word has 0.9987
