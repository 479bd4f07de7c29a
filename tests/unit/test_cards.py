"""What clients of the Ollama API are told of a model in a GGUF file, and of one of which only the name is known."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama_smart_proxy.backends.base import ModelInfo, Residence
from llama_smart_proxy.backends.llamacpp.headers import Headers, capabilities
from llama_smart_proxy.backends.weights.gguf import GgufInfo
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.dialects.ollama.models import QUANTIZATIONS, details, ps_item, show, tags_item
from tests.support.gguf_fixture import write_small_gguf as write

CONTINUE = re.compile(r'^(\S+)\s+((?:".*")|\S+)$')
"""How Continue takes a line of `parameters` apart."""
DETAILS = {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
SHOW = {
    *("license", "modelfile", "parameters", "template", "system", "details", "messages", "model_info", "capabilities"),
    "modified_at",
}


def info(parameters: int = 0, *, infill: bool = False, **metadata: object) -> GgufInfo:
    """What a reader finds in the file of a model of the made-up architecture `arch`; `__` in a key stands for a dot."""
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return GgufInfo(3, {"general.architecture": "arch", **keys}, 1, parameters, 1000, infill)


def card(about: GgufInfo, name: str = "m", num_ctx: int = 0) -> ModelInfo:
    able = capabilities(about, ())
    return ModelInfo(
        name, "0" * 64, 1.7e9, about.size_bytes, about.parameters, "gguf", able, about.metadata, num_ctx=num_ctx
    )


def with_template(template: str) -> GgufInfo:
    return info(tokenizer__chat_template=template)


def nulls(value: Any) -> bool:
    return value is None or any(nulls(inner) for inner in (value.values() if isinstance(value, dict) else ()))


# -- details and capabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "written"),
    [
        (134_515_008, "134.52M"),
        (7_615_616_512, "7.6B"),
        (70_000_000_000, "70B"),
        (1_000_000, "1M"),
        (512_300, "512K"),
        (512, "512"),
        (0, ""),
    ],
)
def test_sizes_are_written_as_ollama_writes_them(count: int, written: str) -> None:
    assert details(card(info(count)))["parameter_size"] == written


def test_quantisations_have_the_names_of_llama_cpp() -> None:
    names = QUANTIZATIONS.split()
    for kind in gguf.LlamaFileType:
        if kind is not gguf.LlamaFileType.GUESSED:
            name = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").removesuffix("_MOE")
            assert names[kind] == name
            assert details(card(info(general__file_type=int(kind) + 1024)))["quantization_level"] == name


@pytest.mark.parametrize("file_type", [None, "Q4_0", -1, 999, 2**32 - 1, 1.5])
def test_an_unheard_of_quantisation_is_unknown(file_type: object) -> None:
    assert details(card(info(general__file_type=file_type)))["quantization_level"] == "unknown"


def test_details_tell_lengths_only_if_the_file_does() -> None:
    assert details(card(info())).keys() == DETAILS
    full = details(card(info(arch__context_length=8192, arch__embedding_length=576)))
    assert (full["context_length"], full["embedding_length"]) == (8192, 576)
    assert (full["format"], full["family"], full["families"]) == ("gguf", "arch", ["arch"])


@pytest.mark.parametrize(
    ("about", "args", "expected"),
    [
        (info(), (), "completion"),
        (with_template("{{ messages }} Document your reasoning process"), (), "completion"),
        (with_template("{% if tools %}{{ tools }}{% endif %}"), (), "completion tools"),
        (with_template("{% for tool_call in message.tool_calls %}"), (), "completion tools"),
        (
            info(tokenizer__chat_template="plain", tokenizer__chat_template__tool_use="{{ tools }}"),
            (),
            "completion tools",
        ),
        (with_template("<think>{{ x }}</think>"), (), "completion thinking"),
        (with_template("{% if enable_thinking %}"), (), "completion thinking"),
        (with_template("{{ reasoning_effort }}"), (), "completion thinking"),
        (with_template("[THINK]"), (), "completion thinking"),
        (info(infill=True), (), "completion insert"),
        (info(), ("--mmproj", "p.gguf"), "completion vision"),
        (info(), ("-mm", "p.gguf"), "completion vision"),
        (info(arch__pooling_type=1, tokenizer__chat_template="{{ tools }}"), (), "embedding"),
        (info(other__pooling_type=1), (), "completion"),
        (with_template("{{ x }}"), ("--chat-template", "{{ tools }} <think>"), "completion tools thinking"),
        (with_template("{{ tools }}"), ("--chat-template", "{{ x }}"), "completion"),
        (with_template("{{ tools }}"), ("--chat-template", "chatml"), "completion tools"),
        (with_template("{{ tools }}"), ("--chat-template-file", "/no/such/file"), "completion tools"),
        (with_template("{{ tools }}"), ("--embeddings",), "embedding"),
        (info(), ("--embedding",), "embedding"),
        (info(), ("--reranking",), "embedding"),
    ],
)
def test_capabilities_follow_from_the_file_and_the_arguments(
    about: GgufInfo, args: tuple[str, ...], expected: str
) -> None:
    assert " ".join(capabilities(about, args)) == expected


# -- items -------------------------------------------------------------------------------------------------------------


def test_an_item_of_tags_has_every_key_that_clients_read() -> None:
    item = tags_item(card(info(512, general__file_type=0), "m:latest"))
    assert item["name"] == item["model"] == "m:latest"
    assert datetime.fromisoformat(item["modified_at"]) == datetime.fromtimestamp(1.7e9, UTC)
    assert item["size"] == 1000 and item["digest"] == "0" * 64
    assert item["capabilities"] == ["completion"] and item["details"].keys() >= DETAILS


def test_a_model_without_a_file_has_the_same_keys_and_no_null() -> None:
    whole, bare = tags_item(card(info())), tags_item(ModelInfo("m"))
    assert bare.keys() == whole.keys() and bare["details"].keys() == whole["details"].keys()
    assert bare["size"] == 0 and bare["details"]["format"] == "" and not nulls(bare)
    assert re.fullmatch(r"[0-9a-f]{64}", bare["digest"])
    assert bare["digest"] != tags_item(ModelInfo("n"))["digest"]
    datetime.fromisoformat(bare["modified_at"])
    assert show(ModelInfo("m")).keys() == SHOW and not nulls(show(ModelInfo("m")))
    assert show(ModelInfo("m"))["model_info"]["general.basename"] == "m"
    running = ps_item(ModelInfo("m"), Residence(math.inf))
    assert running.keys() == ps_item(card(info()), Residence(0)).keys()
    assert not nulls(running)


@pytest.mark.parametrize("expires_at", [0.0, 1.7e9 + 0.123456, math.inf, 1e300, -1e300])
def test_when_a_model_expires_can_be_parsed_even_if_never(expires_at: float) -> None:
    item = ps_item(card(info()), Residence(expires_at, 7, 2048))
    assert (item["size_vram"], item["context_length"], item["size"]) == (7, 2048, 1000)
    parsed = datetime.fromisoformat(item["expires_at"])
    assert parsed.tzinfo is not None
    if expires_at > 2e9:
        assert parsed > datetime.now(UTC) + timedelta(days=365 * 100)
    else:
        assert parsed.timestamp() == pytest.approx(max(0, expires_at), abs=1e-6)


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_has_what_clients_need() -> None:
    about = info(
        512,
        general__basename="base",
        general__license="apache-2.0",
        arch__context_length=8192,
        tokenizer__chat_template="{{ tools }}",
    )
    answer = show(card(about, num_ctx=2048))
    assert answer.keys() == SHOW and not nulls(answer)
    assert (answer["license"], answer["template"], answer["system"]) == ("apache-2.0", "{{ tools }}", "")
    assert answer["messages"] == [] and answer["capabilities"] == ["completion", "tools"]
    assert answer["modelfile"].splitlines() == ["# Modelfile", "FROM m", "PARAMETER num_ctx 2048"]
    assert answer["details"]["parameter_size"] == "512"
    assert answer["model_info"] == {
        "general.architecture": "arch",
        "general.basename": "base",
        "general.parameter_count": 512,
        "general.license": "apache-2.0",
        "arch.context_length": 8192,
    }


def test_continue_can_take_the_parameters_apart() -> None:
    [line] = show(card(info(), num_ctx=2048))["parameters"].splitlines()
    match = CONTINUE.match(line)
    assert match is not None and match.groups()[:2] == ("num_ctx", "2048")
    assert show(card(info()))["parameters"] == ""


def test_continue_finds_that_a_model_fills_in_and_the_template_means_the_same() -> None:
    template = "{% for m in messages %}<{{ m }}>{% endfor %}"
    shown = show(card(info(infill=True, tokenizer__chat_template=template)))["template"]
    assert ".Suffix" in shown
    assert re.fullmatch(r"\{# [^{}#%]+ #\}", shown.removesuffix(template))  # a comment is all that was added
    assert show(card(with_template(template)))["template"] == template


def test_copilot_sees_the_name_it_asked_for() -> None:
    about = card(info(general__basename="base"))
    agent = "GitHubCopilotChat/0.37.1"
    assert show(about, requested_name="M:latest", user_agent=agent)["model_info"]["general.basename"] == "M:latest"
    assert show(about, requested_name="M", user_agent="curl/8")["model_info"]["general.basename"] == "base"
    assert show(card(info()))["model_info"]["general.basename"] == "m"


def test_long_arrays_are_shown_on_request_and_what_json_lacks_never(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_array("five", [1, 2, 3, 4, 5])
        writer.add_array("six", [1, 2, 3, 4, 5, 6])
        writer.add_array("hundred", list(range(100)))
        writer.add_float32("nan", math.nan)
        writer.add_array("infinite", [1.0, math.inf])

    found = asyncio.run(Headers().info("m", ModelConfig(path=write(tmp_path / "m.gguf", change))))
    brief, verbose = (show(found, verbose=verbose)["model_info"] for verbose in (False, True))
    assert (brief["five"], brief["six"], brief["hundred"]) == ([1, 2, 3, 4, 5], [], [])
    assert (verbose["six"], verbose["hundred"]) == ([1, 2, 3, 4, 5, 6], [])
    assert not {"nan", "infinite"} & (brief.keys() | verbose.keys())
    json.dumps(verbose, allow_nan=False)


# -- reading files -----------------------------------------------------------------------------------------------------


async def test_a_card_is_made_anew_when_the_file_has_changed(tmp_path: Path) -> None:
    headers, model = Headers(), ModelConfig(path=write(tmp_path / "m.gguf"), args=["--mmproj", "p"])
    first = await headers.info("m", model)
    assert first.parameters == 512 and "vision" in first.capabilities
    again = await headers.info("m", model)
    assert again == first and again.metadata is first.metadata
    write(tmp_path / "m.gguf", lambda writer: writer.add_name("other"))
    changed = await headers.info("m", model)
    assert changed.metadata["general.name"] == "other"
    assert changed.digest != first.digest
    assert re.fullmatch(r"[0-9a-f]{64}", changed.digest)


async def test_a_broken_file_has_no_card_and_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "m.gguf")
    os.truncate(path, path.stat().st_size - 1)
    headers, model = Headers(), ModelConfig(path=path)
    with caplog.at_level(logging.WARNING):
        assert [await headers.info("m", model) for _ in range(3)] == [ModelInfo("m")] * 3
    [record] = caplog.records
    assert "cut off" in record.getMessage()
    write(path)
    assert await headers.info("m", model) != ModelInfo("m")


async def test_a_file_that_is_not_here_has_no_card(tmp_path: Path) -> None:
    assert await Headers().info("m", ModelConfig(path=tmp_path / "none.gguf")) == ModelInfo("m")


async def test_a_file_of_the_hugging_face_cache_is_known_by_its_digest(tmp_path: Path) -> None:
    digest = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    write(tmp_path / "blobs" / digest)
    link = tmp_path / "snapshots" / "m.gguf"
    link.symlink_to(f"../blobs/{digest}")
    found = await Headers().info("m", ModelConfig(path=link))
    assert found.digest == digest


async def test_many_who_ask_at_once_get_the_same_card(tmp_path: Path) -> None:
    headers, model = Headers(), ModelConfig(path=write(tmp_path / "m.gguf"))
    found = await asyncio.gather(*(headers.info("m", model) for _ in range(20)))
    assert len({id(card.metadata) for card in found}) == 1 and ModelInfo("m") not in found
