"""GGUF files of embedding models: what is written of safetensors, and where it is kept."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_smart_proxy.backends.weights import bert, converted
from llama_smart_proxy.backends.weights.bert import NotConvertible, write_gguf
from llama_smart_proxy.backends.weights.converted import Unwritable, made, path_of
from llama_smart_proxy.backends.weights.gguf import read_info

HIDDEN, INNER, LAYERS, LONGEST = 64, 128, 2, 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "[unused0]", "the", "##ing", "é", "!"]
CONFIG = {
    **{"model_type": "bert", "hidden_act": "gelu", "_name_or_path": "org/tiny", "layer_norm_eps": 1e-12},
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    **{"max_position_embeddings": LONGEST, "type_vocab_size": 2, "vocab_size": len(VOCABULARY)},
}
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": HIDDEN}
F32, F16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0"))


def tensors() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Those of a model with random weights, by the names of its own kind, and some that embeddings do not require."""
    rows = {"word": len(VOCABULARY), "position": LONGEST, "token_type": 2}
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (count, HIDDEN) for name, count in rows.items()
    }
    norms, dense = ["embeddings.LayerNorm"], {"pooler.dense": (HIDDEN, HIDDEN)}
    for layer in (f"encoder.layer.{number}" for number in range(LAYERS)):
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        names = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        dense |= {f"{layer}.{name}": (HIDDEN, HIDDEN) for name in names}
        dense |= {f"{layer}.intermediate.dense": (INNER, HIDDEN), f"{layer}.output.dense": (HIDDEN, INNER)}
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    shapes |= {f"{name}.{part}": (HIDDEN,) for name in norms for part in ("weight", "bias")}
    chance = np.random.default_rng(1)
    return {name: chance.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_safetensors(path: Path, content: Mapping[str, np.ndarray[Any, Any]]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in content.items():
        kind = {"float32": "F32", "float16": "F16", "int64": "I64"}[str(tensor.dtype)]
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": offsets}  # type: ignore[dict-item]
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A package with a model, of which a GGUF file can be written."""
    folder = tmp_path / "package" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    ids = {"embeddings.position_ids": np.arange(LONGEST)}
    write_safetensors(folder / "model.safetensors", {**tensors(), **ids})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(MEAN))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder / "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llama-smart-proxy" / "weights"


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "kind", "error"), [("Q8_0", Q8_0, 0.02), ("F16", F16, 0.002)])
def test_the_tensors_are_those_of_the_model(
    source: Path, tmp_path: Path, variant: str, kind: int, error: float
) -> None:
    write_gguf(source, tmp_path / "m.gguf", variant)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, LAYERS)
    own = {name: tensor for name, tensor in tensors().items() if not name.startswith("pooler")}
    assert set(found) == {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in own}
    for name, tensor in own.items():
        written = found[names.get_name(name, try_suffixes=(".weight", ".bias")) or ""]
        exact = tensor.ndim == 1 or "position" in name or "token_type" in name
        assert written.tensor_type == (F32 if exact else kind)
        values = gguf.quants.dequantize(written.data, written.tensor_type)
        assert np.abs(values - tensor).max() <= (0 if exact else error)


def test_the_header_has_what_llama_cpp_requires(source: Path, tmp_path: Path) -> None:
    write_gguf(source, tmp_path / "m.gguf", "F16")
    metadata = read_info(tmp_path / "m.gguf").metadata
    expected = {
        **{"general.architecture": "bert", "general.name": "tiny", "bert.context_length": LONGEST},
        **{"bert.embedding_length": HIDDEN, "bert.feed_forward_length": INNER, "bert.block_count": LAYERS},
        **{"bert.attention.head_count": 4, "bert.attention.causal": False, "bert.pooling_type": 1},
        **{"tokenizer.ggml.model": "bert", "tokenizer.ggml.token_type_count": 2},
        **{"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.unknown_token_id": 1},
        **{"tokenizer.ggml.seperator_token_id": 3, "tokenizer.ggml.padding_token_id": 0},
        **{"tokenizer.ggml.mask_token_id": 4, "tokenizer.ggml.token_type": [3, 2, 3, 3, 3, 1, 1, 1, 1, 1]},
        "tokenizer.ggml.tokens": [*SPECIAL, "\u2581[unused0]", "\u2581the", "ing", "\u2581é", "\u2581!"],
    }
    assert {name: metadata.get(name) for name in expected} == expected
    assert metadata["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", json.dumps(CONFIG | {"model_type": "roberta"}), "describes no BERT model"),
        ("config.json", json.dumps(CONFIG | {"hidden_act": "relu"}), "describes no BERT model"),
        ("config.json", "[]", "describes no BERT model"),
        ("config.json", "{", "is not JSON"),
        ("config.json", json.dumps(CONFIG | {"num_hidden_layers": 3}), r"no tensor encoder\.layer\.2\."),
        ("1_Pooling/config.json", json.dumps({"pooling_mode_max_tokens": True}), "its pooling is pooling_mode_max"),
        ("1_Pooling/config.json", json.dumps(MEAN | {"pooling_mode_cls_token": True}), "its pooling is"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"no \[MASK\]"),
        ("model.safetensors", b"\xff" * 8, "is no safetensors file"),
        ("model.safetensors", b"", "is no safetensors file"),
        ("model.safetensors", struct.pack("<Q", 2) + b"{}", "no tensor embeddings"),
    ],
)
def test_another_kind_of_model_is_refused_with_the_reason(
    source: Path, file: str, content: str | bytes, reason: str
) -> None:
    (source.parent / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NotConvertible, match=reason):
        write_gguf(source, source.parent / "m.gguf", "Q8_0")
    with pytest.raises(Unwritable, match=reason):
        made(source, "Q8_0")


# -- where it is kept --------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_written_once_for_each_variant_and_for_its_user_alone(source: Path, cache: Path) -> None:
    first = made(source, "Q8_0")
    written = first.stat().st_mtime_ns
    assert made(source, "Q8_0") == first and first.stat().st_mtime_ns == written
    assert stat.S_IMODE(first.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700
    other = made(source, "F16")
    assert files(cache) == sorted([first.name, other.name])


def test_it_is_written_anew_when_the_package_or_what_is_written_changes(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(source, "Q8_0")
    write_safetensors(source, {name: tensor * 2 for name, tensor in tensors().items()})
    second = made(source, "Q8_0")
    assert second != first and files(cache) == [second.name]
    monkeypatch.setattr(bert, "VERSION", bert.VERSION + 1)
    third = made(source, "Q8_0")
    assert third != second and files(cache) == [third.name]


def _make(source: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(made(source, "Q8_0").stat().st_ino)


def test_processes_that_start_at_one_time_write_it_once(source: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_make, args=(source, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    inodes = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(inodes) == 1 and len(files(cache)) == 1


def _with_full_disk(source: Path, results: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, 2**12))
    try:
        results.put(str(made(source, "F16")))
    except Unwritable as error:
        results.put(str(error))


def test_what_cannot_be_written_whole_is_not_kept_and_the_error_names_the_folder(source: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_with_full_disk, args=(source, results))
    process.start()
    message = results.get(timeout=120)
    process.join()
    assert "No space left" in message and str(cache) in message and "XDG_CACHE_HOME" in message
    assert files(cache) == []
    assert made(source, "F16").exists()


def test_what_a_killed_process_has_left_behind_is_replaced(source: Path, cache: Path) -> None:
    path = path_of(source, "Q8_0")
    path.parent.mkdir(parents=True)
    path.with_suffix(".part").write_bytes(b"GGUF, half")
    assert read_info(made(source, "Q8_0")).tensors and files(cache) == [path.name]


def test_what_is_missing_is_named_with_the_remedy_unless_the_file_is_there(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unwritable, match=r"variant Q4_K_M is none of Q8_0, F16"):
        made(source, "Q4_K_M")
    there = made(source, "F16")
    monkeypatch.setattr(bert, "NEEDS", ("numpy", "gguf_that_is_not_there"))
    assert made(source, "F16") == there
    with pytest.raises(Unwritable, match=r"requires gguf_that_is_not_there: pip install 'llama-smart-proxy\[rag\]'"):
        converted.checked(source, "Q8_0")
