"""The cards of models in `/v1/models`: what Open WebUI merges into what its users see."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_smart_proxy.backends.base import ModelInfo
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.backends.weights.models_dir import ModelFile, ModelsDir
from llama_smart_proxy.proxy.config import Config, ModelConfig, OllamaConfig
from llama_smart_proxy.proxy.dialects.cards import HELP, Cards, Shown, card
from tests.support.gguf_fixture import write_small_gguf as write
from tests.support.harness import until


def of_file(*able: str, **fields: Any) -> ModelInfo:
    """What is known of a GGUF file."""
    metadata = {"general.architecture": "a", "general.file_type": 15, "a.context_length": 40960}
    known: dict[str, Any] = {
        "size_bytes": 4_700_000_000,
        "parameters": 7_600_000_000,
        "format": "gguf",
        "metadata": metadata,
    }
    return ModelInfo("m", capabilities=able, **(known | fields))


def of_ollama(**item: Any) -> ModelInfo:
    return ModelInfo("m", native={"ollama": {"name": "m", **item}})


def of_remote(**item: Any) -> ModelInfo:
    return ModelInfo("m", native={"openai": {"id": "m", **item}})


def called(name: object) -> ModelInfo:
    return ModelInfo("m", metadata={"general.name": name})


def names(models: list[Shown]) -> list[str]:
    return [fields["name"] for fields in Cards().of(models)]


def meta(info: ModelInfo, **shown: Any) -> dict[str, Any]:
    found = card(Shown("m", info, **shown))
    assert found.keys() == {"meta"}
    assert None not in found["meta"].values(), "Open WebUI takes null for a value"
    return dict(found["meta"])


@pytest.mark.parametrize(
    ("info", "shown", "description"),
    [
        (of_file("completion"), {}, "7.6B · Q4_K_M · 4.7 GB · context 40,960"),
        (of_file("completion", num_ctx=8192), {}, "7.6B · Q4_K_M · 4.7 GB · context 8,192"),
        (of_file("completion"), {"place": "this machine"}, "7.6B · Q4_K_M · 4.7 GB · context 40,960 · on this machine"),
        (ModelInfo("m"), {"place": "vllm", "agents": ["think", "redact"]}, "on vllm · agents: think, redact"),
        (ModelInfo("m", size_bytes=93_000_000, format="gguf"), {}, "93 MB"),
        (ModelInfo("m", description="For poems."), {"agents": ["think"]}, "For poems."),
        (
            of_ollama(size=270_898_672, details={"parameter_size": "134.52M", "quantization_level": "F16"}),
            {"place": "ollama"},
            "134.52M · F16 · 271 MB · on ollama",
        ),
        (of_ollama(size="big", details=None), {}, ""),
        (of_ollama(details={"parameter_size": 7, "context_length": True}), {}, ""),
        (of_remote(max_model_len=32768), {"place": "vllm"}, "context 32,768 · on vllm"),
        (of_remote(meta={"n_ctx_train": 4096}), {}, "context 4,096"),
        (of_remote(description="A\nmodel\x00 of\u202e theirs", context_length=1), {}, "A model of theirs"),
        (of_remote(description=["no text"], meta="no mapping", context_length=-1), {}, ""),
    ],
)
def test_the_description_has_size_quantisation_context_place_and_agents_as_far_as_they_are_known(
    info: ModelInfo, shown: dict[str, Any], description: str
) -> None:
    assert meta(info, **shown)["description"] == description


@pytest.mark.parametrize(
    ("info", "capabilities"),
    [
        (of_file("completion", "tools"), {"usage": True, "vision": False}),
        (of_file("completion", "vision"), {"usage": True, "vision": True}),
        (ModelInfo("m"), {"usage": True}),
        (of_ollama(capabilities=["completion"]), {"usage": True, "vision": False}),
        (of_ollama(capabilities=["completion", "vision", 7]), {"usage": True, "vision": True}),
        (of_ollama(details={}), {"usage": True}),
        (of_remote(architecture={"input_modalities": ["text", "image"]}), {"usage": True, "vision": True}),
        (of_remote(architecture={"input_modalities": ["text"]}), {"usage": True, "vision": False}),
        (of_remote(architecture="text->text"), {"usage": True}),
    ],
)
def test_vision_is_denied_only_where_that_is_known(info: ModelInfo, capabilities: dict[str, bool]) -> None:
    assert meta(info)["capabilities"] == capabilities


@pytest.mark.parametrize(
    ("info", "hidden"),
    [
        (of_file("embedding"), True),
        (of_file("completion"), False),
        (of_file("embedding", hidden=False), False),
        (of_file("completion", hidden=True), True),
        (ModelInfo("m"), False),
        (of_ollama(capabilities=["embedding"]), True),
        (of_ollama(details={"families": ["nomic-bert"]}), True),
        (of_ollama(details={"families": ["llama", "clip"]}), False),
        (of_ollama(details={"families": None}), False),
    ],
)
def test_models_that_generate_no_text_are_hidden_unless_the_operator_decides(info: ModelInfo, hidden: bool) -> None:
    found = meta(info, helps=True)
    assert found.get("hidden", False) is hidden
    assert ("suggestion_prompts" in found) is not hidden


def test_the_models_own_suggestions_come_before_help() -> None:
    own = ModelInfo("m", suggestions=("Write a poem, please",))
    assert meta(own, helps=True)["suggestion_prompts"] == [{"content": "Write a poem, please"}, HELP]
    assert "suggestion_prompts" not in meta(ModelInfo("m")), "or it would replace Open WebUI's own"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (called("Qwen3 0.6B"), "Qwen3 0.6B"),
        (of_file(title="Mine", metadata={"general.name": "Qwen3 0.6B"}), "Mine"),
        (called("  Qwen3\n 0.6B\x00\u202e "), "Qwen3 0.6B"),
        (called(""), "m"),
        (called("\u200b\x07"), "m"),
        (called(["Qwen3"]), "m"),
        (called("x" * 1_000_000), "x" * 99 + "\N{HORIZONTAL ELLIPSIS}"),
        (called("a\udcff"), "a"),
        (of_remote(name="GPT 9"), "GPT 9"),
        (of_remote(name=None), "m"),
        (of_ollama(), "m"),
        (ModelInfo("m"), "m"),
    ],
)
def test_a_model_is_called_as_its_file_or_its_server_says_if_that_is_a_name(info: ModelInfo, name: str) -> None:
    assert names([Shown("m", info)]) == [name]


def test_models_of_the_same_name_are_told_apart_by_their_ids() -> None:
    models = [Shown("q4", called("Qwen3")), Shown("q8", called("qwen3")), Shown("team", of_file(title="team"))]
    assert names(models) == ["q4 (Qwen3)", "q8 (qwen3)", "team"]
    assert names([Shown("a", called("b")), Shown("b", ModelInfo("b"))]) == ["a (b)", "b"]


def test_a_list_composes_only_what_is_another_one_than_in_the_last() -> None:
    cards, info = Cards(), of_file("completion")
    [first, other] = cards.of([Shown("m", info), Shown("n", info)])
    assert cards.of([Shown("m", info)])[0]["info"] is first["info"]
    [changed] = cards.of([Shown("m", info, agents=["think"])])
    assert changed["info"]["meta"]["description"].endswith("agents: think")
    [again] = cards.of([Shown("n", info)])
    assert again == other and again["info"] is not other["info"], "it was not in the last one"


# -- where they come from ----------------------------------------------------------------------------------------------


async def test_a_card_comes_from_memory_and_is_looked_up_in_the_background(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda writer: writer.add_name("First"))
    headers, model = Headers(), ModelConfig(path=path, ctx=2048, description="Mine", hidden=True)
    assert headers.card("m", model) == ModelInfo("m", num_ctx=2048, description="Mine", hidden=True)
    await until(lambda: headers.card("m", model).capabilities == ("completion",), what="the header")
    known = headers.card("m", model)
    assert (known.metadata["general.name"], known.description, known.hidden) == ("First", "Mine", True)
    path.unlink()
    assert [headers.card("m", model) for _ in range(3)] == [known] * 3, "no file is opened for a list"
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_card_of_another_file_of_models_dir_replaces_the_one_in_memory(tmp_path: Path) -> None:
    def found() -> ModelFile:
        folder = ModelsDir.of(Config.model_validate({"llama_cpp": {"models_dir": tmp_path}}))
        assert folder is not None
        return next(iter(folder.look().models.values()))

    headers, model = Headers(), ModelConfig(path=tmp_path / "m.gguf")
    write(tmp_path / "m.gguf")
    first = found()
    await until(lambda: headers.card("m", model, first).digest, what="the header")
    write(tmp_path / "m.gguf", lambda writer: writer.add_name("Another"))
    other = found()
    await until(lambda: "general.name" in headers.card("m", model, other).metadata, what="the header of the other")


async def test_a_broken_file_has_a_card_of_what_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    headers, model = Headers(), ModelConfig(path=path, suggestions=["Why?"])
    await headers.info("m", model)
    assert headers.card("m", model) == ModelInfo("m", suggestions=("Why?",))


async def test_the_configuration_of_an_ollama_model_is_on_its_card() -> None:
    configured = {"llama3.2": ModelConfig(ctx=8192, description="Mine", backend="ollama")}
    hosts = Hosts(OllamaConfig(host=["127.0.0.1:9"]), Downloads(), configured)
    for name in ("llama3.2", "llama3.2:latest"):
        assert hosts.card(name) == ModelInfo(name, num_ctx=8192, description="Mine")
    assert hosts.card("other") == ModelInfo("other")
    await hosts.close()


def test_a_quantisation_that_is_not_known_is_left_out() -> None:
    odd = of_file("completion", metadata={"general.file_type": int(gguf.LlamaFileType.GUESSED) * 8})
    assert meta(odd)["description"] == "7.6B · 4.7 GB"
