"""Which models are helpers, and the room that they require."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.config.checks import cross_checks

SAFETENSORS = {"package": "p", "file": "model/model.safetensors"}
GGUF = {"path": "/m.gguf"}


def problems(**fields: Any) -> list[str]:
    return [problem.message for problem in cross_checks(Config.model_validate(fields), lambda loc: True)]


@pytest.mark.parametrize(
    ("model", "knowledge", "helps"),
    [
        (SAFETENSORS, {}, True),
        ({**GGUF, "args": ["--embeddings"]}, {}, True),
        ({**GGUF, "args": ["--embedding"]}, {}, True),
        ({**GGUF, "args": ["--reranking"]}, {}, True),
        (GGUF, {"embedding_model": "M"}, True),
        ({**GGUF, "aliases": ["short"]}, {"reranker": "short"}, True),
        (GGUF, {"embedding_model": "other"}, False),
        (GGUF, {}, False),
        ({**GGUF, "helper": True}, {}, True),
        ({**SAFETENSORS, "helper": False}, {"embedding_model": "m"}, False),
        ({"cmd": "serve --port ${PORT}"}, {"embedding_model": "m"}, True),
    ],
)
def test_models_for_embeddings_and_reranking_are_helpers_unless_their_setting_decides(
    model: dict[str, Any], knowledge: dict[str, Any], helps: bool
) -> None:
    config = Config.model_validate({"models": {"m": model}, "knowledge": knowledge})
    assert config.is_helper("m", config.models["m"]) is helps
    assert config.helpers == helps


def test_the_model_called_minilm_is_a_helper_by_its_name() -> None:
    config = Config.model_validate({"models": {"minilm": GGUF, "other": GGUF}})
    assert [config.is_helper(name, model) for name, model in config.models.items()] == [True, False]


@pytest.mark.parametrize(
    ("pool", "models", "found"),
    [
        ({"size": 2, "port_end": 11601}, {"a": GGUF}, []),
        ({"size": 2, "port_end": 11601}, {"a": GGUF, "e": SAFETENSORS}, ["2 ports (11600-11601) are too few for 3"]),
        ({"size": 2, "port_end": 11601, "helpers": 0}, {"a": GGUF, "e": SAFETENSORS}, []),
        ({"size": 1}, {"a": GGUF, "e": {**SAFETENSORS, "pinned": True}}, []),
        ({"size": 1, "helpers": 0}, {"a": GGUF, "e": {**SAFETENSORS, "pinned": True}}, ["1 pinned models take all 1"]),
        (
            {"helpers": 1},
            {"d": SAFETENSORS, "e": {**SAFETENSORS, "pinned": True}},
            ["1 pinned models take all 1 processes and leave no room"],
        ),
        ({"size": 1}, {"a": {**GGUF, "pinned": True}, "e": SAFETENSORS}, []),
    ],
)
def test_ports_and_pinned_models_are_counted_with_the_places_for_helpers(
    pool: dict[str, Any], models: dict[str, Any], found: list[str]
) -> None:
    messages = problems(server_pool=pool, models=models)
    assert len(messages) == len(found)
    assert all(message.startswith(start) for message, start in zip(messages, found, strict=True))
