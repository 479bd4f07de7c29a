"""Tiny language models with random weights, written on the spot: real files for llama.cpp, of a few hundred kB each.

They speak nonsense, quickly. Text of any kind tokenises, because the vocabulary is the 256 bytes; what comes out is
printable ASCII, and ends by itself after some hundred tokens. Chat, completion, infill, embeddings and reranking work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 32768
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|fim_pre|>", "<|fim_suf|>", "<|fim_mid|>")
Matrix = npt.NDArray[np.float64]
FIRST_BYTE = len(CONTROL)
SPACE = FIRST_BYTE + 256
VOCABULARY = SPACE + 1


def write_tiny_gguf(
    path: Path, *, seed: int = 0, name: str = "tiny", pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN
) -> Path:
    """Writes a llama-architecture model to `path` and returns `path`; another `seed` gives another model. With
    `pooling` it says that it is made for embeddings."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    _add_shape(writer)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    _add_tokenizer(writer)
    for tensor, values in _weights(np.random.default_rng(seed)).items():
        writer.add_tensor(tensor, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    kinds = [gguf.TokenType.CONTROL] * FIRST_BYTE + [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL]
    kinds[0] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(CONTROL.index("<s>"))
    writer.add_eos_token_id(CONTROL.index("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_uint32("tokenizer.ggml.fim_pre_token_id", CONTROL.index("<|fim_pre|>"))
    writer.add_uint32("tokenizer.ggml.fim_suf_token_id", CONTROL.index("<|fim_suf|>"))
    writer.add_uint32("tokenizer.ggml.fim_mid_token_id", CONTROL.index("<|fim_mid|>"))
    writer.add_chat_template(CHAT_TEMPLATE)


def _weights(random: np.random.Generator) -> dict[str, Matrix]:
    """Random but for dimension 0, which no layer touches: it stays constant and serves as a bias for each token."""
    square = (WIDTH, WIDTH)
    embedding = random.normal(size=(VOCABULARY, WIDTH))
    embedding[:, 0] = 4.0
    weights = {"token_embd.weight": embedding, "output_norm.weight": np.ones(WIDTH), "output.weight": _output(random)}
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            weights[f"blk.{layer}.{part}.weight"] = random.normal(size=square) / WIDTH**0.5
        for part in ("attn_output", "ffn_down"):
            weights[f"blk.{layer}.{part}.weight"][0] = 0.0
        for part in ("attn_norm", "ffn_norm"):
            weights[f"blk.{layer}.{part}.weight"] = np.ones(WIDTH)
    return weights


def _output(random: np.random.Generator) -> Matrix:
    """The last matrix: printable ASCII likely, the end of the answer now and then, everything else never."""
    matrix: Matrix = random.normal(size=(VOCABULARY, WIDTH)) / WIDTH**0.5
    matrix[:, 0] = -20.0
    matrix[FIRST_BYTE + 0x21 : FIRST_BYTE + 0x7F, 0] = 0.0
    matrix[SPACE, 0] = 0.5
    matrix[CONTROL.index("<|im_end|>"), 0] = 0.0
    return matrix


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four distinct tiny models by name: tiny-a, tiny-b, tiny-c, tiny-d. Only tiny-b is made for embeddings."""
    folder = tmp_path_factory.mktemp("models")
    pooled = {"tiny-b": gguf.PoolingType.MEAN}
    names = [f"tiny-{letter}" for letter in "abcd"]
    return {
        name: write_tiny_gguf(folder / f"{name}.gguf", seed=seed, name=name, pooling=pooled.get(name))
        for seed, name in enumerate(names)
    }


def write_small_gguf(path: Path, change: Callable[[gguf.GGUFWriter], object] = lambda writer: None) -> Path:
    """A small GGUF file, with one tensor of 512 elements."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    change(writer)
    writer.add_tensor("t", np.zeros((2, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
