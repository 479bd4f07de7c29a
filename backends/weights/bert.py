"""Writes the GGUF file of a BERT embedding model from its safetensors, with `numpy` and `gguf` alone.

The folder is as sentence-transformers keeps one: `config.json`, `vocab.txt`, `1_Pooling/config.json`, and beside them
the weights. Everything here blocks, for a second or two: call it in a thread.

Source: the BERT architecture as in Devlin et al., arXiv 1810.04805; the safetensors format; llama.cpp
`gguf-py/gguf/constants.py` for the names of tensors and keys, and `src/llama-vocab.cpp` for the tokenizer, b11434.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Of what is written: another one for a change by which files written before are outdated."""
VARIANTS = ("Q8_0", "F16")
"""The types that the matrices can have, the default first."""
NEEDS = ("numpy", "gguf")
"""The packages that this module imports."""
WORD_START = "\u2581"
"""Begins the tokens that begin a word in GGUF files; in `vocab.txt` it is those that go on that have `##`."""
NORMAL, UNKNOWN, CONTROL = 1, 2, 3
"""Types of tokens. Source: gguf-py `TokenType`."""
SPECIAL = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
HEADER_LENGTH = struct.Struct("<Q")
DTYPES = {"F32": "<f4", "F16": "<f2"}

_OUTER = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_KEPT = ("position_embd.weight", "token_types.weight")
"""Matrices that stay F32: llama.cpp adds their rows."""


class NotConvertible(Exception):
    """The folder holds no BERT embedding model of the known kind; the message says what is different."""


def write_gguf(weights: Path, target: Path, variant: str) -> None:
    """Write the model whose safetensors file is `weights` to `target`, its matrices as `variant`, one of `VARIANTS`.

    Raises: `NotConvertible`; `OSError` for a disk that is full, and the like; `ImportError` without `NEEDS`.
    """
    import gguf

    folder = weights.parent
    config = _json(folder / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise NotConvertible(f"{folder / 'config.json'} describes no BERT model with gelu")
    tensors = dict(named(read_safetensors(weights), config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(target, "bert")
    _describe(writer, config, _pooling(folder))
    _tokenizer(writer, (folder / "vocab.txt").read_text(encoding="utf-8").splitlines(), config["type_vocab_size"])
    matrix = gguf.GGMLQuantizationType[variant]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{variant}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        kind = matrix if tensor.ndim == 2 and name not in _KEPT else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.astype("<f4", copy=False), kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a safetensors file by name, mapped from the disk: a length, JSON of that length, then the data.
    Raises: `NotConvertible`."""
    import numpy as np

    try:
        with path.open("rb") as file:
            (length,) = HEADER_LENGTH.unpack(file.read(HEADER_LENGTH.size))
            header = json.loads(file.read(min(length, path.stat().st_size)))
    except (struct.error, ValueError) as error:
        raise NotConvertible(f"{path} is no safetensors file") from error
    data = np.memmap(path, mode="r", offset=HEADER_LENGTH.size + length)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in DTYPES:
            begin, end = entry["data_offsets"]
            found[name] = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def named(tensors: dict[str, Any], layers: int) -> Iterator[tuple[str, Any]]:
    """The tensors that embeddings require, by llama.cpp's names. Raises: `NotConvertible` if one is missing."""
    blocks = {f"encoder.layer.{n}.{own}": f"blk.{n}.{gguf}" for n in range(layers) for own, gguf in _LAYER.items()}
    for own, gguf in (_OUTER | blocks).items():
        for part in ("weight",) if own.endswith("_embeddings") else ("weight", "bias"):
            tensor = tensors.get(f"{own}.{part}", tensors.get(f"bert.{own}.{part}"))
            if tensor is None:
                raise NotConvertible(f"there is no tensor {own}.{part}")
            yield f"{gguf}.{part}", tensor


def _describe(writer: Any, config: dict[str, Any], pooling: Any) -> None:
    writer.add_name(str(config.get("_name_or_path", "bert")).rpartition("/")[2])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)


def _pooling(folder: Path) -> Any:
    import gguf

    modes = _json(folder / "1_Pooling" / "config.json")
    chosen = {mode for mode, is_on in modes.items() if mode.startswith("pooling_mode_") and is_on is True}
    for mode, pooling in (("mean_tokens", gguf.PoolingType.MEAN), ("cls_token", gguf.PoolingType.CLS)):
        if chosen == {f"pooling_mode_{mode}"}:
            return pooling
    raise NotConvertible(f"its pooling is {', '.join(sorted(chosen)) or 'none'}")


def _tokenizer(writer: Any, vocabulary: list[str], token_types: int) -> None:
    """WordPiece as llama.cpp has it, which lower-cases and removes accents: for models of lower-cased text."""
    special = {token: id for id, token in enumerate(vocabulary) if token in SPECIAL}
    if missing := sorted(SPECIAL - special.keys()):
        raise NotConvertible(f"its vocabulary has no {', '.join(missing)}")
    writer.add_tokenizer_model("bert")
    writer.add_token_list([_piece(token, token in special) for token in vocabulary])
    kinds = {token: CONTROL for token in special} | {"[UNK]": UNKNOWN}
    writer.add_token_types([kinds.get(token, NORMAL) for token in vocabulary])
    writer.add_token_type_count(token_types)
    writer.add_bos_token_id(special["[CLS]"])
    writer.add_eos_token_id(special["[SEP]"])
    writer.add_unk_token_id(special["[UNK]"])
    writer.add_sep_token_id(special["[SEP]"])
    writer.add_pad_token_id(special["[PAD]"])
    writer.add_mask_token_id(special["[MASK]"])


def _piece(token: str, is_special: bool) -> str:
    if is_special:
        return token
    return token[2:] if token.startswith("##") else WORD_START + token


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotConvertible(f"{path} is not JSON") from error
    return content if isinstance(content, dict) else {}
