"""What `check` reports of this machine: files, packages, repositories and programs that are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.cli.check import check_command

GGUF = b"GGUF"
MISSING = [
    ({"path": "none.gguf"}, "models.m.path: no such file: {folder}/none.gguf"),
    ({"path": "~/none.gguf"}, "models.m.path: no such file: {folder}/home/none.gguf"),
    ({"path": "away.gguf"}, "models.m.path: no such file: {folder}/away.gguf"),  # a link to nothing
    ({"path": "home"}, "models.m.path: not a regular file: {folder}/home"),
    ({"path": "text.gguf"}, "models.m.path: not a GGUF file: {folder}/text.gguf"),
    ({"path": "s-00001-of-00002.gguf"}, "models.m.path: no such file: {folder}/s-00002-of-00002.gguf"),
    ({"package": "no_such_pkg", "file": "m.gguf"}, "models.m.package: the package no_such_pkg is not installed"),
    ({"package": "a.b", "file": "m.gguf"}, "models.m.package: the package a.b is not installed"),
    ({"package": "yaml", "file": "m.gguf"}, "models.m.package: the package yaml contains no file m.gguf"),
    ({"repo": "one"}, "models.m.repo: is not the name of a Hugging Face repository"),
    ({"repo": "a/b/c"}, "models.m.repo: is not the name of a Hugging Face repository"),
    ({"repo": "https://huggingface.co/a/b"}, "models.m.repo: is not the name of a Hugging Face repository"),
    ({"repo": "a/b:Q4_K_M"}, "models.m.repo: is not the name of a Hugging Face repository"),
    ({"repo": "../x"}, "models.m.repo: is not the name of a Hugging Face repository"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "away.gguf").symlink_to(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("<html>")
    for name in ("m.gguf", "s-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(GGUF)
    return tmp_path


def checked(folder: Path, config: object, *, strict: bool = False) -> int:
    (folder / "c.json").write_text(json.dumps(config))
    return check_command(folder / "c.json", {}, strict=strict)


@pytest.mark.parametrize(("model", "message"), MISSING)
def test_a_model_that_cannot_be_served_is_a_warning_and_with_strict_a_problem(
    folder: Path, capsys: pytest.CaptureFixture[str], model: dict[str, str], message: str
) -> None:
    config = {"models": {"m": model, "there": {"path": "m.gguf"}}}
    assert checked(folder, config) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: {message.format(folder=folder)}") and err.count("\n") == 1
    assert out == f"OK: {folder}/c.json (2 models, 0 remotes)\n"
    assert checked(folder, config, strict=True) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"{folder}/c.json: {message.format(folder=folder)}") and err.count("\n") == 1
    assert out == ""


def test_a_warning_names_the_section_that_the_model_is_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(folder, {"llama_cpp": {"models": {"m": {"path": "none.gguf"}}}}) == 0
    assert capsys.readouterr().err.startswith("warning: llama_cpp.models.m.path: no such file")


def test_only_what_prevents_the_start_is_a_problem_without_strict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"llama_cpp": {"server": "./none", "models_dir": "none"}, "models": {"m": {"path": "none.gguf"}}}
    assert checked(folder, config) == 2
    out, err = capsys.readouterr()
    starts = [f"{folder}/c.json: llama_cpp.server: ", f"{folder}/c.json: llama_cpp.models_dir: ", "warning: models.m"]
    assert out == "" and [line.startswith(start) for line, start in zip(err.splitlines(), starts, strict=True)]


def test_strict_counts_the_warnings_of_the_file_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(folder, {"gpu": {}}) == 0
    assert checked(folder, {"gpu": {}}, strict=True) == 2
    assert checked(folder, {"models": {"m": {"path": "m.gguf"}}}, strict=True) == 0


def test_a_repository_that_is_not_here_is_none_unless_the_hub_is_off(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"models": {"m": {"repo": "org/name-GGUF"}}}
    assert (checked(folder, config, strict=True), capsys.readouterr().err) == (0, "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checked(folder, config) == 0
    assert capsys.readouterr().err.startswith("warning: models.m.repo: is not in the local Hugging Face cache, and HF_")


def test_a_module_that_fails_is_a_problem_of_check_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("import no_such_module")
    assert checked(folder, {"modules": ["mine.py"]}) == 2
    assert capsys.readouterr().err.startswith(f"{folder}/c.json: modules.0: {folder}/mine.py: ModuleNotFoundError")


def test_a_missing_wheel_of_the_embedded_server_is_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    config = {"llama_cpp": {"server": "embedded"}, "models": {"m": {"path": "m.gguf"}}}
    assert checked(folder, config) == 0
    assert "warning: llama_cpp.server: " in (err := capsys.readouterr().err) and "xllamacpp is not installed" in err
