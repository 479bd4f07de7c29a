"""The command, arguments and environment a model server is started with."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from llama_smart_proxy.backends.llamacpp.command import EMBEDDED, build_argv, child_env, server_command
from llama_smart_proxy.backends.llamacpp.flags import parse
from llama_smart_proxy.backends.pool.launcher import INHERITED
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


DRIVERS = """
    CUDA_VISIBLE_DEVICES CUDA_SCALE_LAUNCH_QUEUES CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NCCL_DEBUG
    __NV_PRIME_RENDER_OFFLOAD __GLX_VENDOR_LIBRARY_NAME __VK_LAYER_NV_optimus ROCR_VISIBLE_DEVICES ROCM_PATH
    ROCBLAS_USE_HIPBLASLT HIP_VISIBLE_DEVICES HIPBLASLT_TENSILE_LIBPATH HSA_OVERRIDE_GFX_VERSION HSA_ENABLE_SDMA
    AMD_SERIALIZE_KERNEL AMDGPU_TARGETS GPU_MAX_HW_QUEUES MIOPEN_FIND_MODE VK_ICD_FILENAMES VK_DRIVER_FILES
    VULKAN_SDK RADV_PERFTEST MESA_VK_DEVICE_SELECT DRI_PRIME LIBGL_ALWAYS_SOFTWARE ANV_QUEUE_OVERRIDE
    INTEL_DEBUG LP_NUM_THREADS MVK_CONFIG_LOG_LEVEL TU_DEBUG V3D_DEBUG ONEAPI_DEVICE_SELECTOR ONEAPI_ROOT
    SYCL_CACHE_PERSISTENT UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS ZES_ENABLE_SYSMAN ZE_AFFINITY_MASK
    IGC_EnableDPEmulation MKLROOT MKL_NUM_THREADS TBBROOT OCL_ICD_FILENAMES OPENCL_VENDOR_PATH
    MUSA_VISIBLE_DEVICES ASCEND_RT_VISIBLE_DEVICES ASCEND_TOOLKIT_HOME MTL_HUD_ENABLED METAL_DEVICE_WRAPPER_TYPE
    GGML_VK_VISIBLE_DEVICES GGML_CUDA_ENABLE_UNIFIED_MEMORY GGML_METAL_NO_RESIDENCY GGML_OPENVINO_DEVICE
    DISABLE_LAYER_AMD_SWITCHABLE_GRAPHICS_1 IPEX_LLM_NUM_CTX HEXAGON_SDK_ROOT ADSP_LIBRARY_PATH LLAMA_TRACE
    LLAMA_KV_CACHE_DEBUG LLAMA_GRAPH_REUSE_DISABLE LLAMA_SET_ROWS OMP_NUM_THREADS GOMP_CPU_AFFINITY
    KMP_BLOCKTIME OPENBLAS_NUM_THREADS LD_LIBRARY_PATH DYLD_LIBRARY_PATH TMPDIR
"""
SECRETS = """
    NVIDIA_API_KEY NVIDIA_NGC_CLI_API_KEY AMD_TOKEN GPU_CLOUD_SECRET ONEAPI_PASSWORD ROCM_ACCESS_TOKENS
    CUDA_APIKEY XDG_SECRET_STORE VK_credentials_file GGML_RPC_AUTH HIP_DB_PASS LC_PASSWD
"""


def environment(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "x")


def test_a_child_inherits_what_drives_a_gpu_but_no_secret_among_it() -> None:
    child = child_env(environment(*DRIVERS.split(), *SECRETS.split()), {}, "k1")
    assert set(child) - {"PYTHONPATH", "LLAMA_API_KEY"} == set(DRIVERS.split())


def test_further_variables_reach_a_child_by_name_or_pattern() -> None:
    ours = environment(
        "MY_FLAG", "MY_TOKEN", "LD_PRELOAD", "LLAMA_ARG_THREADS", "LLAMA_ARG_PORT", "HF_TOKEN", "A1", "A22"
    )
    kept = environment("LSP_OWNER", "LLAMA_API_KEY", "OTHER")

    def given(*passthrough: str) -> set[str]:
        return set(child_env(ours | kept, {}, "k1", passthrough)) - {"PYTHONPATH", "LLAMA_API_KEY"}

    assert given() == set()
    assert given("LD_PRELOAD", "HF_TOKEN") == {"LD_PRELOAD", "HF_TOKEN"}, "a secret only by its name"
    assert given("MY_*", "LLAMA_ARG_*", "A?") == {"MY_FLAG", "LLAMA_ARG_THREADS", "A1"}
    assert given("*") == {"MY_FLAG", "LD_PRELOAD", "LLAMA_ARG_THREADS", "A1", "A22", "OTHER"}
    assert child_env(kept, {}, "k1", ["*"])["LLAMA_API_KEY"] == "k1"


def test_null_in_the_env_of_a_model_removes_a_variable() -> None:
    child = child_env({"CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin"}, {"CUDA_VISIBLE_DEVICES": None, "X": ""}, "k1")
    assert "CUDA_VISIBLE_DEVICES" not in child and child["X"] == ""


def test_the_documentation_lists_what_a_child_inherits() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text("utf-8")
    section = page.partition("### The environment of llama-server")[2].partition("`llama_cpp.env_passthrough:")[0]
    assert set(re.findall(r"`([^`]+)`", section)) == set(INHERITED.split())
