"""Which projector goes with which model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llama_smart_proxy.backends.http.connection import Endpoint
from llama_smart_proxy.backends.llamacpp.arguments import takes_projector
from llama_smart_proxy.backends.llamacpp.launcher import LlamaCppLauncher
from llama_smart_proxy.backends.weights.projectors import Projectors, among, beside
from llama_smart_proxy.proxy.config import ModelConfig


def put(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("model", "others", "chosen"),
    [
        ("vl-4b-Q4_K_M", "mmproj-vl-4b-F16", "mmproj-vl-4b-F16"),
        ("llava-v1.6-mistral-7b.Q4_K_M", "mmproj-model-f16", "mmproj-model-f16"),
        ("vl-4b-Q4_K_M", "mmproj-F16 vl-4b-Q8_0 vl-4b-UD-Q2_K_XL", "mmproj-F16"),
        ("vl-4b-Q4_K_M", "mmproj-foreign-F16", "mmproj-foreign-F16"),
        ("vl-4b-Q4_K_M", "mmproj-vl-4b-F16 mmproj-vl-8b-F16", "mmproj-vl-4b-F16"),
        ("VL_4B.Q4_K_M", "mmproj-vl-4b-F16 mmproj-vl-8b-F16", "mmproj-vl-4b-F16"),
        ("Qwen2.5-VL-7B-Q4_0", "Qwen2.5-VL-7B.mmproj-Q8_0 Qwen2.5-VL-7B.mmproj-f16", "Qwen2.5-VL-7B.mmproj-f16"),
        ("big-Q4_K_M-00001-of-00002", "mmproj-big-F16 mmproj-F16", "mmproj-big-F16"),
        ("vl-4b-it-Q4_0", "mmproj-vl-4b-F16 mmproj-vl-8b-F16", "mmproj-vl-4b-F16"),
        ("vl-4b-Q4_0", "mmproj-vl-4b-it-F16 mmproj-vl-8b-it-F16", "mmproj-vl-4b-it-F16"),
        ("vl-4b.i1-Q4_0", "vl-4b-Q8_0 vl-4b.mmproj-f16 other", "vl-4b.mmproj-f16"),
        ("模型-Q4_0", "mmproj-模型-F16 mmproj-F16", "mmproj-模型-F16"),
        ("vl-4b-Q4_K_M", "", None),
        ("vl-4b-Q4_K_M", "mmproj-F16 mmproj-BF16", None),
        ("c-Q4_0", "mmproj-a-F16 mmproj-b-F16", None),
        ("text-Q4_0", "vl-4b-Q4_0 mmproj-vl-4b-F16", None),
        ("text-Q4_0", "vl-4b-Q4_0 mmproj-F16", None),
        ("qwen2-7b-Q4_0", "qwen2-7b-vl-Q4_0 mmproj-qwen2-7b-vl-f16", None),
        ("b-Q4_0", "mmproj-bob-F16 mmproj-alice-F16", None),
    ],
)
def test_a_model_gets_the_one_that_has_its_name_or_the_only_one(model: str, others: str, chosen: str | None) -> None:
    files = [f"{name}.gguf" for name in (model, *others.split())]
    assert Projectors(files).of(files[0]) == (f"{chosen}.gguf" if chosen else None)


@pytest.mark.parametrize(
    ("model", "files", "chosen"),
    [
        ("m-Q4_0.gguf", "m-Q4_0.gguf mmproj-F16.gguf", "mmproj-F16.gguf"),
        (
            "m-Q4_0.gguf",
            "m-Q4_0.gguf m-draft-Q4_0.gguf mmproj-F32.gguf mmproj-BF16.gguf mmproj-F16.gguf",
            "mmproj-F16.gguf",
        ),
        ("Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q4_0.gguf mmproj-F16.gguf", "mmproj-F16.gguf"),
        ("sub/a-Q4_0.gguf", "sub/mmproj-F16.gguf mmproj-F32.gguf", "sub/mmproj-F16.gguf"),
        ("m-Q4_0.gguf", "mmproj-a-F16.gguf mmproj-b-F16.gguf", None),
        ("m-Q4_0.gguf", "README.md sub/mmproj-F16.gguf", None),
    ],
)
def test_in_a_repository_all_projectors_are_for_its_one_model(model: str, files: str, chosen: str | None) -> None:
    assert among(model, {model, *files.split()}) == chosen


def test_it_is_looked_for_beside_the_file_above_a_quantisation_and_in_a_snapshot(tmp_path: Path) -> None:
    snapshot = "models--org--repo/snapshots/abc"
    put(tmp_path, "org/m/m-Q4.gguf", "org/m/mmproj-F16.gguf", "org/m/UD-Q4_K_XL/m-1.gguf", "org/m/other/m-2.gguf")
    put(tmp_path, f"{snapshot}/mmproj-F16.gguf", f"{snapshot}/sub/m.gguf", "models--org--repo/snapshots/mmproj-no.gguf")
    found = tmp_path / "org/m/mmproj-F16.gguf"
    assert beside(tmp_path / "org/m/m-Q4.gguf") == found == beside(tmp_path / "org/m/UD-Q4_K_XL/m-1.gguf")
    assert beside(tmp_path / "org/m/other/m-2.gguf") is None
    assert beside(tmp_path / snapshot / "sub/m.gguf") == tmp_path / snapshot / "mmproj-F16.gguf"
    assert beside(tmp_path / "models--org--repo/snapshots/def/m.gguf") is None


def test_one_that_cannot_be_used_is_none(tmp_path: Path) -> None:
    put(tmp_path, "m.gguf")
    (tmp_path / "mmproj-m-F16.gguf").write_bytes(b"")
    (tmp_path / "mmproj-m-F32.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "mmproj-m-BF16.gguf").symlink_to("nowhere")
    (tmp_path / "mmproj-m-Q8_0.gguf").mkdir()
    assert beside(tmp_path / "m.gguf") is None


def test_that_it_is_unclear_is_said_in_the_log_once_for_each_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "c.gguf", "mmproj-a.gguf", "mmproj-b.gguf")
    with caplog.at_level(logging.WARNING):
        assert beside(tmp_path / "c.gguf") is None and beside(tmp_path / "c.gguf", log=False) is None
    [record] = caplog.records
    assert "--mmproj in its args" in record.getMessage() and "mmproj-a.gguf, mmproj-b.gguf" in record.getMessage()


@pytest.mark.parametrize(
    ("args", "env", "takes"),
    [
        ([], {}, True),
        (["--mmproj-offload", "-c", "8"], {"LLAMA_ARG_CTX_SIZE": "8"}, True),
        (["--mmproj", "p.gguf"], {}, False),
        (["-mm", "p.gguf"], {}, False),
        (["--mmproj_url", "http://x"], {}, False),
        (["-mmu", "http://x"], {}, False),
        (["--no-mmproj"], {}, False),
        (["--no-mmproj-auto"], {}, False),
        ([], {"LLAMA_ARG_MMPROJ": "p.gguf"}, False),
        ([], {"LLAMA_ARG_NO_MMPROJ": "1"}, False),
    ],
)
def test_a_model_whose_args_or_env_decide_about_it_gets_none_from_us(
    tmp_path: Path, args: list[str], env: dict[str, str | None], takes: bool
) -> None:
    put(tmp_path, "m.gguf", "mmproj-m-F16.gguf")
    assert takes_projector(args, env) is takes
    for own, default in ((args, []), ([], args)):
        model = ModelConfig(path=tmp_path / "m.gguf", args=own, env=env)
        argv = list(LlamaCppLauncher("m", model, "embedded", default).prepare()(Endpoint("127.0.0.1", 1), "key").argv)
        assert (str(tmp_path / "mmproj-m-F16.gguf") in argv) is takes
        if takes:
            assert argv[argv.index("--mmproj") + 1] == str(tmp_path / "mmproj-m-F16.gguf")
