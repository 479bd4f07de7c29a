"""The command, arguments and environment a model server is started with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llama_smart_proxy.backends.llamacpp.command import EMBEDDED, build_argv, child_env, server_command
from llama_smart_proxy.backends.llamacpp.flags import parse
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import ConfigError


def program(folder: Path, name: str, mode: int = 0o755) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def argv(model: ModelConfig, *default_args: str, name: str = "m", gguf: Path = Path("/models/m.gguf")) -> list[str]:
    return build_argv(
        ["llama-server"], name=name, model=model, gguf=gguf, host="127.0.0.1", port=11600, default_args=default_args
    )


def test_without_llama_server_on_path_the_embedded_one_is_spawned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_command(None) == [sys.executable, "-P", "-m", "llama_smart_proxy.backends.llamacpp.embedded"]


def test_llama_server_on_path_is_preferred_unless_embedded_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = program(tmp_path, "llama-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_command(None) == [str(found)]
    assert server_command("embedded") == list(EMBEDDED)


def test_a_configured_server_is_a_path_or_a_name_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = program(tmp_path, "llama-server-cuda")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert server_command(str(found)) == [str(found)]
    assert server_command("llama-server-cuda") == [str(found)]


@pytest.mark.parametrize("mode", [0o644, None])
def test_a_server_that_cannot_be_executed_is_a_config_error(tmp_path: Path, mode: int | None) -> None:
    path = tmp_path / "absent" if mode is None else program(tmp_path, "plain-file", mode)
    with pytest.raises(ConfigError, match=r"llama_cpp\.server: .*no such program, or not executable"):
        server_command(str(path))


def test_argv_serves_the_file_under_its_name_on_the_given_port() -> None:
    assert argv(ModelConfig(path=Path("m.gguf"), ctx=2048, parallel=2)) == [
        *("llama-server", "--model", "/models/m.gguf", "--host", "127.0.0.1", "--port", "11600", "--alias", "m"),
        *("--ctx-size", "2048", "--parallel", "2", "--jinja", "--metrics", "--slots", "--no-webui"),
    ]


def test_argv_leaves_context_and_slots_to_the_server_when_not_configured() -> None:
    words = argv(ModelConfig(path=Path("m.gguf")))
    assert "--ctx-size" not in words and "--parallel" not in words


def test_a_models_own_args_come_after_the_defaults_so_that_they_win() -> None:
    words = argv(ModelConfig(path=Path("m.gguf"), ctx=1024, args=["-c", "4096"]), "-c", "2048")
    assert words[-4:] == ["-c", "2048", "-c", "4096"]
    assert parse(words[1:], {})["n_ctx"] == 4096


def test_values_that_look_like_flags_or_shell_stay_values() -> None:
    odd = Path("/models/--host 0.0.0.0;\n$(id).gguf")
    fields = parse(argv(ModelConfig(path=odd), name="--slot-save-path", gguf=odd)[1:], {})
    assert fields["model.path"] == str(odd)
    assert fields["model_alias"] == {"--slot-save-path"}
    assert fields["hostnames"] == ("127.0.0.1",)
    assert "slot_save_path" not in fields


def test_a_relative_file_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert argv(ModelConfig(path=Path("m.gguf")), gguf=Path("m.gguf"))[2] == str(tmp_path / "m.gguf")


def test_a_child_inherits_no_secret_and_no_setting_of_ours() -> None:
    ours = {
        **{"PATH": "/bin", "HOME": "/home/u", "LANG": "C", "LC_ALL": "C", "LD_LIBRARY_PATH": "/lib"},
        **{"CUDA_VISIBLE_DEVICES": "1", "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "1", "OMP_NUM_THREADS": "2"},
    }
    secret = dict.fromkeys(
        (
            *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "LSP_API_KEY"),
            *("http_proxy", "HTTPS_PROXY", "AIP_MODE", "AIP_HTTP_PORT", "LLAMA_ARG_PORT", "LLAMA_API_KEY"),
            *("LLAMA_SERVER_ROUTER_PORT", "PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "OLLAMA_PROXY_OLLAMA_HOST"),
            *("PATHX", "MY_PATH", "SSH_AUTH_SOCK", "NOTIFY_SOCKET"),
        ),
        "secret",
    )
    child = child_env(ours | secret, {}, "k1")
    assert child == ours | {"LLAMA_API_KEY": "k1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def test_a_models_env_is_added_but_cannot_replace_the_key() -> None:
    child = child_env({"PATH": "/bin"}, {"LLAMA_ARG_THREADS": "2", "PATH": "/opt", "LLAMA_API_KEY": "x"}, "k1")
    assert (child["LLAMA_ARG_THREADS"], child["PATH"], child["LLAMA_API_KEY"]) == ("2", "/opt", "k1")
