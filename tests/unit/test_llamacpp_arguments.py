"""What llama-server's arguments mean: those that a model's file requires, and what users say with theirs."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.backends.llamacpp.arguments import context_of_slot, flags_of, required_by, tags_of, value_of

NONE, MEAN, CLS, LAST, RANK = range(5)


def bert(pooling: int, trained: int | None = 512) -> dict[str, Any]:
    context = {"bert.context_length": trained} if trained is not None else {}
    return {"general.architecture": "bert", "bert.pooling_type": pooling, "bert.attention.causal": False, **context}


def batch(size: int) -> str:
    return f"--batch-size {size} --ubatch-size {size}"


@pytest.mark.parametrize(
    ("metadata", "ctx", "args", "expected"),
    [
        (bert(MEAN), None, "", f"--embedding {batch(512)}"),
        (bert(CLS), None, "", f"--embedding {batch(512)}"),
        (bert(NONE), None, "", f"--embedding {batch(512)}"),
        (bert(9), None, "", f"--embedding {batch(512)}"),
        (bert(RANK), None, "", f"--reranking {batch(512)}"),
        (bert(LAST), None, "", "--embedding"),  # split by llama-server
        ({"general.architecture": "qwen3", "qwen3.pooling_type": RANK}, None, "", "--reranking"),
        # the context
        (bert(MEAN, 2048), 1024, "", f"--embedding {batch(1024)}"),
        (bert(MEAN, 2048), 0, "", f"--embedding {batch(2048)}"),
        (bert(MEAN, 2048), 4096, "", f"--embedding {batch(2048)}"),
        (bert(MEAN, 2048), 1024, "-c 256", f"--embedding {batch(256)}"),
        (bert(MEAN, 2048), None, "--ctx_size 256 --ctx-size 128", f"--embedding {batch(128)}"),
        (bert(MEAN, 2048), 512, "-c many", f"--embedding {batch(512)}"),
        (bert(MEAN, None), 1024, "", f"--embedding {batch(1024)}"),
        (bert(MEAN, None), None, "", "--embedding"),
        (bert(MEAN, 131072), None, "", f"--embedding {batch(8192)}"),
        (bert(MEAN, 131072), 65536, "", f"--embedding {batch(65536)}"),
        # the user's flags come after these, and decide
        (bert(MEAN), None, "--pooling rank", f"--reranking {batch(512)}"),
        (bert(MEAN), None, "--reranking", f"--reranking {batch(512)}"),
        (bert(RANK), None, "--pooling last", "--embedding"),
        # other models
        ({"general.architecture": "llama", "llama.context_length": 512}, None, "", ""),
        ({"general.architecture": "llama", "bert.pooling_type": MEAN}, None, "", ""),
        ({"general.architecture": "llama", "llama.pooling_type": "mean"}, None, "", ""),
        ({}, None, "", ""),
    ],
)
def test_a_file_with_a_pooling_type_requires_what_embeddings_need(
    metadata: dict[str, Any], ctx: int | None, args: str, expected: str
) -> None:
    assert " ".join(required_by(metadata, ctx, args.split())) == expected


def test_flags_are_read_as_llama_server_reads_them() -> None:
    args = ["--no_mmap", "-c", "1", "--tags", "b, a,,c", "--tags", "a", "-c", "2", "--last"]
    assert flags_of(args) == {"--no-mmap", "-c", "--tags", "--last"}
    assert value_of(args, "-c", "--ctx-size") == "2" and value_of(args, "--last") is None
    assert tags_of(args) == ["a", "b", "c"] and tags_of([]) == []


@pytest.mark.parametrize(
    ("ctx", "parallel", "args", "expected"),
    [
        (None, None, "", 0),
        (8192, None, "", 8192),
        (8192, 4, "", 2048),
        (8192, 4, "-c 4096", 1024),
        (None, None, "--ctx-size 4096 -np 2", 2048),
        (8192, None, "-c 0", 0),
        (8192, None, "-c", 8192),
        (8192, 2, "-c many --parallel x", 4096),
        (8192, None, "-np -1", 8192),
        (-1, None, "", 0),
    ],
)
def test_the_context_of_a_request_is_that_of_a_slot(
    ctx: int | None, parallel: int | None, args: str, expected: int
) -> None:
    assert context_of_slot(ctx, parallel, args.split()) == expected
