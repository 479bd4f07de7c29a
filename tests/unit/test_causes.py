"""Why a server did not start, in one sentence. The outputs are those of llama-server b11434."""

from __future__ import annotations

import pytest

from llama_smart_proxy.backends.llamacpp.launcher import ECHOES
from llama_smart_proxy.backends.pool.causes import MOST, cause_in

LORA = """
0.00.004.369 W srv  llama_server: security: no API key is set and CORS allows all origins
0.00.236.758 E llama_adapter_lora_init: failed to open '/x/y.gguf': No such file or directory
0.00.236.789 E cmn  common_init_: failed to load lora adapter '/x/y.gguf'
0.00.236.794 E cmn  common_init_: failed to create context with model '/home/me/models/SmolLM2-135M.gguf'
0.00.236.801 E srv    load_model: failed to create_context with model '/home/me/models/SmolLM2-135M.gguf'
0.00.237.455 E srv  llama_server: exiting due to model loading error
"""
TRUNCATED = """
0.00.018.000 I srv    load_model: loading model 'trunc.gguf'
0.00.018.814 E llama_model_load: error loading model: tensor 'token_embd.weight' data is not within the file bounds
0.00.018.861 E llama_model_load_from_file_impl: failed to load model
0.00.018.913 E common_fit_params: encountered an error while trying to fit params to free device memory: failed to load
0.00.031.526 E llama_model_load: error loading model: tensor 'token_embd.weight' data is not within the file bounds
0.00.031.561 E srv    load_model: failed to load model, 'trunc.gguf'
0.00.031.600 I srv    operator(): operator(): cleaning up before exit...
0.00.032.159 E srv  llama_server: exiting due to model loading error
"""
JUNK = """
0.00.005.416 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'
0.00.005.506 E llama_model_load: error loading model: llama_model_loader: failed to load model from /m/junk.gguf
0.00.005.511 E llama_model_load_from_file_impl: failed to load model
"""
PROJECTOR = """
0.00.372.365 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'
0.00.372.439 E srv    load_model: failed to load multimodal model, '/m/junk.gguf'
0.00.373.274 E srv  llama_server: exiting due to model loading error
"""
TEMPLATE = """
0.00.005.146 E common_chat_templates_init: error: Unexpected token: }} of type 11
0.00.005.318 E common_chat_templates_init: please consider disabling jinja via --no-jinja, or using another
error: the supplied chat template is not supported: {{ no( }}
"""
ARGUMENT = """
error while handling argument "-ctk": Unsupported cache type: q9

usage:
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
"""
CRASH = """
terminate called after throwing an instance of 'std::system_error'
  what():  Resource temporarily unavailable
"""


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (LORA, "failed to load lora adapter 'y.gguf': failed to open 'y.gguf': No such file or directory"),
        (TRUNCATED, "tensor 'token_embd.weight' data is not within the file bounds"),
        (JUNK, "invalid magic characters: 'hell', expected 'GGUF'"),
        (
            PROJECTOR,
            "failed to load multimodal model, 'junk.gguf': invalid magic characters: 'hell', expected 'GGUF'",
        ),
        (TEMPLATE, "the supplied chat template is not supported: {{ no( }}: Unexpected token: }} of type 11"),
        (ARGUMENT, 'error while handling argument "-ctk": Unsupported cache type: q9'),
        ("error: invalid argument: --nonsense", "invalid argument: --nonsense"),
        (CRASH, "Resource temporarily unavailable"),
        ("/opt/llama-server: error while loading shared libraries: libcuda.so.1: cannot open shared object file: No "
         "such file or directory", "llama-server: error while loading shared libraries: libcuda.so.1: cannot open "
         "shared object file: No such file or directory"),
        ("ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
         "failed to initialize CUDA: no CUDA-capable device is detected"),
        ("cannot run ~/bin/llama-server: No such file", "cannot run llama-server: No such file"),
        ("loading\nall is well", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_cause_is_one_sentence_without_folders(output: str, cause: str | None) -> None:
    assert cause_in(output.splitlines(), ECHOES) == cause


def test_a_long_line_is_cut() -> None:
    assert len(cause_in(["error: " + "/a" * 10**6 + "x" * 10**6]) or "") <= MOST
