"""Reads the description of a model from the header of its GGUF file, which is not trusted.

The header is key-value metadata, then one entry for each tensor; the tensors' data follow. It is read into memory from
its beginning, never mapped: a file that shrinks under a mapping kills the process. How much is read, skipped and
kept is bounded for any file: some 50 MiB of memory and 0.2 s for the worst, 20 ms for common models.

Source: llama.cpp `ggml/src/gguf.cpp`, `gguf-py/gguf/constants.py`, `src/llama-vocab.cpp`, build b11434.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

from llama_smart_proxy.backends.weights.filenames import all_parts
from llama_smart_proxy.backends.weights.stamps import MAGIC

VERSIONS = (2, 3)
CHUNK = 2**20
MAX_HEADER = 40 * 2**20
"""Maximum bytes of a header; 262 144 tokens with their merges, the largest vocabulary in use, take 16 MiB."""
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 1024, 2**14, 2**20
MAX_TEXT = 2 * 2**20
"""Maximum bytes of text kept of one file; text beyond that is elided."""
MAX_SEARCHED = 8 * 2**20
"""Maximum bytes of tokens searched for the fill-in-the-middle tokens."""
MAX_KEPT = 64
"""Maximum number of elements of an array that is kept."""
MAX_DIMENSIONS, MAX_TENSOR_NAME = 4, 63
MAX_ELEMENTS = 2**63 - 1

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U32, _U64, _ARRAY_HEAD = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_TENSOR = [struct.Struct(f"<{dimensions}qIQ") for dimensions in range(MAX_DIMENSIONS + 1)]

# Tensor type: elements in a block, bytes of a block. Others are of unknown size.
_BLOCKS = {
    **dict.fromkeys((0, 26), (1, 4)),  # F32, I32
    **dict.fromkeys((1, 25, 30), (1, 2)),  # F16, I16, BF16
    **dict.fromkeys((27, 28), (1, 8)),  # I64, F64
    24: (1, 1),  # I8
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},  # Q4_0 to Q8_1
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},  # Q2_K to Q8_K
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18)},  # IQ2_XXS to IQ4_NL
    **{21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56)},  # IQ3_S, IQ2_S, IQ4_XS, IQ1_M
    **{34: (256, 54), 35: (256, 66)},  # TQ1_0, TQ2_0
    **{39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18)},  # MXFP4, NVFP4, Q1_0, Q2_0
}

# The three tokens required for fill-in-the-middle, by the words in their names.
_INFILL = (("pre", "prefix", "begin"), ("suf", "suffix", "hole"), ("mid", "middle", "end"))


class GgufError(Exception):
    """The file is not a valid GGUF file; the message is a clause with the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class Elided:
    """Replaces a metadata value that is too long to keep; `count` is its number of elements, or bytes of text."""

    count: int


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """The contents of a header. `tensors`, `parameters` (elements of all tensors) and `size_bytes` are sums over all
    parts of a split model, the rest is from its first. `infill`: it supports llama-server's fill-in-the-middle."""

    version: int
    metadata: Mapping[str, Any]
    tensors: int
    parameters: int
    size_bytes: int
    infill: bool


def read_info(path: Path) -> GgufInfo:
    """Read the header of the model at `path`, any part of it when it is split. Blocks: call it in a thread.

    Metadata values are Python values; arrays of more than 64 elements are `Elided`, and so is text beyond 2 MiB
    in all. Text that is not UTF-8 has U+FFFD in it; numbers may be NaN or infinite.

    Raises: `GgufError`, also for a missing part.
    """
    try:
        headers = [_read(path.with_name(part)) for part in all_parts(path.name)]
    except OSError as error:
        raise GgufError(f"it cannot be read: {error.strerror}") from error
    first = headers[0]
    return GgufInfo(
        version=first.version,
        metadata=first.metadata,
        tensors=sum(header.tensors for header in headers),
        parameters=sum(header.parameters for header in headers),
        size_bytes=sum(header.size for header in headers),
        infill=first.infill,
    )


def _read(path: Path) -> _Header:
    if not path.is_file():
        raise GgufError("it is not there" if not path.exists() else "it is not a regular file")
    with path.open("rb") as file:
        header = _Header(file, os.fstat(file.fileno()).st_size)
        header.read()
        header.release()
    return header


class _Header:
    """The header of one file: a buffer that begins at byte 0 and grows, and the values parsed from it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self.version = 0
        self.metadata: dict[str, Any] = {}
        self.tensors = 0
        self.parameters = 0
        self.infill = False
        self._file = file
        self._data = bytearray()
        self._at = 0
        self._text_left = MAX_TEXT
        self._strings_left = MAX_STRINGS
        self._tokens = (0, 0)

    def release(self) -> None:
        """Drop the buffer."""
        self._data = bytearray()

    def read(self) -> None:
        """Read all of it. Raises: `GgufError`."""
        if self._data[self._skip(len(MAGIC)) : len(MAGIC)] != MAGIC:
            raise GgufError("it is not a GGUF file")
        (self.version,) = self._take(_U32)
        if self.version & 0xFFFF == 0:
            raise GgufError("it is a big-endian file")
        if self.version not in VERSIONS:
            raise GgufError(f"it is of the unknown version {self.version}")
        (self.tensors,), (keys,) = self._take(_U64), self._take(_U64)
        if keys > MAX_KEYS or self.tensors > MAX_TENSORS:
            raise GgufError(f"it claims {keys} metadata keys and {self.tensors} tensors")
        for _ in range(keys):
            self._read_pair()
        self.infill = all(self._has_token(*role) for role in _INFILL)
        ends = [self._read_tensor() for _ in range(self.tensors)]
        alignment = self._alignment()
        data_at = -(-self._at // alignment) * alignment
        if ends and data_at + max(ends) > self.size:
            raise GgufError("it is cut off: a tensor's data lie beyond its end")

    # -- metadata --------------------------------------------------------------------------------------------------

    def _read_pair(self) -> None:
        key = self._text()
        if not isinstance(key, str) or not key or key in self.metadata:
            raise GgufError("a metadata key is empty, too long or there twice")
        (kind,) = self._take(_U32)
        begins = self._at
        self.metadata[key] = self._array() if kind == _ARRAY else self._value(kind)
        if key == "tokenizer.ggml.tokens":
            self._tokens = (begins, min(self._at, begins + MAX_SEARCHED))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        return self._take(struct.Struct("<" + _code(kind)))[0]

    def _array(self) -> list[Any] | Elided:
        kind, count = self._take(_ARRAY_HEAD)
        if kind == _STRING:
            self._strings_left -= count
            if self._strings_left < 0:
                raise GgufError(f"it holds more than {MAX_STRINGS} strings")
            if count <= MAX_KEPT:
                texts = [self._text() for _ in range(count)]
                return Elided(count) if any(isinstance(text, Elided) for text in texts) else texts
            self._skip_strings(count)
        elif count <= MAX_KEPT:
            return list(self._take(struct.Struct(f"<{count}{_code(kind)}")))
        else:
            self._skip(count * struct.calcsize("<" + _code(kind)))
        return Elided(count)

    def _text(self) -> str | Elided:
        (size,) = self._take(_U64)
        begins = self._skip(size)
        if size > self._text_left:
            return Elided(size)
        self._text_left -= size
        return self._data[begins : begins + size].decode("utf-8", "replace")

    def _skip_strings(self, count: int) -> None:
        data, at, length_at, strings = self._data, self._at, _U64.unpack_from, repeat(None, count)
        while True:
            try:
                for _ in strings:
                    at += 8 + length_at(data, at)[0]
                break
            except (struct.error, OverflowError):  # the next one begins beyond the buffer
                self._load(at + 8)
                at += 8 + length_at(data, at)[0]
        self._at = at
        self._skip(0)

    def _has_token(self, short: str, long: str, other: str) -> bool:
        """Whether a metadata key names a token for this role, or a token has a text by which llama.cpp recognises
        it."""
        if {f"tokenizer.ggml.fim_{short}_token_id", f"tokenizer.ggml.{long}_token_id"} & self.metadata.keys():
            return True
        texts = [f"<|fim_{long}|>", f"<fim-{long}>", f"<fim_{long}>", f"<|code_{long}|>", f"<|{long}|>"]
        texts += [f"<{short.upper()}>", f"\u2581<{short.upper()}>", f"<\uff5cfim\u2581{other}\uff5c>"]
        tokens = (text.encode() for text in texts)
        return any(self._data.find(_U64.pack(len(token)) + token, *self._tokens) >= 0 for token in tokens)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise GgufError("its alignment is no power of two")
        return alignment

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _read_tensor(self) -> int:
        """Parse one tensor's entry. Returns the end of its data, as an offset from the start of all data."""
        (name_length,) = self._take(_U64)
        if name_length > MAX_TENSOR_NAME:
            raise GgufError(f"a tensor's name has {name_length} bytes")
        self._skip(name_length)
        (dimensions,) = self._take(_U32)
        if dimensions > MAX_DIMENSIONS:
            raise GgufError(f"a tensor has {dimensions} dimensions")
        *shape, kind, offset = self._take(_TENSOR[dimensions])
        elements = 1
        for length in shape:
            elements *= length
        if any(length < 0 for length in shape) or elements > MAX_ELEMENTS:
            raise GgufError("a tensor has an impossible shape")
        self.parameters += elements
        per_block, block_bytes = _BLOCKS.get(kind, (1, 0))
        if (shape[0] if shape else 1) % per_block:
            raise GgufError("a tensor's rows are no whole number of blocks")
        return int(offset + elements // per_block * block_bytes)

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _take(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self._data, self._skip(layout.size))

    def _skip(self, size: int) -> int:
        """Skip the next `size` bytes, after loading them into the buffer. Returns their offset."""
        begins = self._at
        self._at += size
        if self._at > len(self._data):
            self._load(self._at)
        return begins

    def _load(self, end: int) -> None:
        if end > self.size:
            raise GgufError("it is cut off: it ends within its header")
        if end > MAX_HEADER:
            raise GgufError(f"its header is longer than {MAX_HEADER} bytes")
        while end > len(self._data):
            if not (chunk := self._file.read(CHUNK)):
                raise GgufError("it shrank while it was read")
            self._data += chunk


def _code(kind: int) -> str:
    """The `struct` code of a scalar type."""
    code = _SCALARS.get(kind)
    if code is None:
        raise GgufError(f"a metadata value is of the unknown type {kind}")
    return code
