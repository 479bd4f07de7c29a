"""The local Hugging Face cache, shared with other programs: what is offered of it, and what is removed from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import gguf
from tests.support.hub_calls import Bench, Calls, bench, calling

__all__ = ["bench"]  # fixture
COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Calls]]:
    """One cache, and a process that uses it."""
    cache = tmp_path_factory.mktemp("cache")
    with calling({"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}) as calls:
        yield cache, calls


def put(cache: Path, repo: str, file: str, data: bytes = b"GGUF", *, commit: str = COMMIT) -> Path:
    """A file as other programs put it into the cache; the commit becomes the newest one."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob, link = folder / "blobs" / f"{file.replace('/', '-')}-{hash(data)}", folder / "snapshots" / commit / file
    for path in (blob, link, folder / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs" / "main").write_text(commit)
    return link


def offered(calls: Calls, repo: str) -> dict[str, str]:
    """The offered models of one repository, without the part of the name that they share."""
    found: dict[str, str] = calls("cached").result
    start = f"hf.co/{repo}:"
    return {name.removeprefix(start): file for name, file in found.items() if name.startswith(start)}


def located(calls: Calls, repo: str, variant: str) -> str | None:
    found: str | None = calls("locate", repo, variant).result
    return found


# -- what is offered ---------------------------------------------------------------------------------------------------


def test_models_are_offered_by_quantisation_or_else_by_file(caches: tuple[Path, Calls]) -> None:
    cache, calls = caches
    for file in ("m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "x-F16.gguf", "sub/y-f16.gguf", "plain.gguf", "b.BF16.gguf"):
        put(cache, "names/repo", file)
    expected = {"Q4_K_M": "m-Q4_K_M.gguf", "UD-Q4_K_XL": "m-UD-Q4_K_XL.gguf", "plain": "plain.gguf"}
    expected |= {"x-F16": "x-F16.gguf", "sub/y-f16": "sub/y-f16.gguf", "BF16": "b.BF16.gguf"}
    assert offered(calls, "names/repo") == expected
    for variant, file in expected.items():
        path = located(calls, "names/repo", variant)
        assert path is not None and path.endswith(f"/{COMMIT}/{file}")
        assert located(calls, "names/repo", file) == path


def test_only_whole_models_are_offered(caches: tuple[Path, Calls]) -> None:
    cache, calls = caches
    part = "big-Q8_0-0000{}-of-00003.gguf"
    for number in (1, 3):
        put(cache, "whole/repo", part.format(number))
    put(cache, "whole/repo", "mmproj-m-F16.gguf")
    put(cache, "whole/repo", "page-Q4_0.gguf", b"<html>")
    put(cache, "whole/repo", "README.md", b"GGUF")
    put(cache, "whole/repo", "lost-Q6_K.gguf").resolve().unlink()
    os.mkfifo(cache / "models--whole--repo" / "snapshots" / COMMIT / "fifo-Q5_0.gguf")
    assert offered(calls, "whole/repo") == {} and located(calls, "whole/repo", "Q8_0") is None
    put(cache, "whole/repo", part.format(2))
    assert offered(calls, "whole/repo") == {"Q8_0": "big-Q8_0.gguf"}
    first = located(calls, "whole/repo", "Q8_0")
    assert first is not None and first.endswith(part.format(1))


def test_the_newest_commit_goes_before_older_ones_which_still_count(caches: tuple[Path, Calls]) -> None:
    cache, calls = caches
    put(cache, "commits/repo", "old-Q8_0.gguf", commit="b" * 40)
    put(cache, "commits/repo", "m-Q4_K_M.gguf", b"GGUFold", commit="b" * 40)
    put(cache, "commits/repo", "renamed-Q4_K_M.gguf", b"GGUFnew", commit="0" * 40)
    assert set(offered(calls, "commits/repo").values()) == {"old-Q8_0.gguf", "m-Q4_K_M.gguf", "renamed-Q4_K_M.gguf"}
    newest, old = located(calls, "commits/repo", "Q4_K_M"), located(calls, "commits/repo", "Q8_0")
    assert newest is not None and newest.endswith("renamed-Q4_K_M.gguf")
    assert old is not None and old.endswith("old-Q8_0.gguf")


def test_changes_are_seen_at_once_and_an_unchanged_cache_is_not_read_again(cache: Path) -> None:
    with calling({"HF_HUB_CACHE": str(cache)}) as calls:
        assert calls("cached").result == {}
        link = put(cache, "change/repo", "deep/er/m-Q4_K_M.gguf")
        for folder in (cache, *(path for path in cache.rglob("*") if not path.is_symlink())):
            os.utime(folder, (1, 1))
        assert offered(calls, "change/repo") == {"Q4_K_M": "deep/er/m-Q4_K_M.gguf"}
        assert calls("reads").result == 1, "more than the list of repositories was read"
        put(cache, "change/repo", "deep/er/m-Q8_0.gguf")
        assert set(offered(calls, "change/repo")) == {"Q4_K_M", "Q8_0"}
        link.unlink()
        assert set(offered(calls, "change/repo")) == {"Q8_0"}


def test_a_cache_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for cache in (file, tmp_path / "absent"):
        with calling({"HF_HUB_CACHE": str(cache)}) as calls:
            assert calls("cached").result == {} and located(calls, "org/repo", "Q4_0") is None
    odd = tmp_path / "odd"
    for name in ("models--a--b", "models--", "models--a--..", "datasets--a--b"):
        (odd / name).mkdir(parents=True)
    (odd / "models--c--d").write_bytes(b"")
    (odd / "models--a--b" / "snapshots").write_bytes(b"")
    with calling({"HF_HUB_CACHE": str(odd)}) as calls:
        assert calls("cached").result == {}


# -- other programs ----------------------------------------------------------------------------------------------------


def test_what_other_programs_fetched_is_trusted_and_what_we_fetched_they_find(bench: Bench) -> None:
    bench.hub.add("both/repo/theirs-Q8_0.gguf", gguf(1000, 1))
    bench.hub.add("both/repo/ours-Q4_K_M.gguf", gguf(1000, 2))
    theirs = bench.calls("library", "both/repo", "theirs-Q8_0.gguf", False).result
    assert located(bench.calls, "both/repo", "Q8_0") == theirs
    assert bench.calls("pull", "both/repo").message == ""
    ours = bench.calls("library", "both/repo", "ours-Q4_K_M.gguf", True).result
    assert located(bench.calls, "both/repo", "Q4_K_M") == ours
    assert set(offered(bench.calls, "both/repo")) == {"Q4_K_M", "Q8_0"}
    assert bench.calls("scan").result == []


def test_what_another_program_left_broken_is_fetched_anew(bench: Bench) -> None:
    data = bench.hub.add("broken/repo/m-Q4_K_M.gguf", gguf(1000))
    path = Path(bench.calls("library", "broken/repo", "m-Q4_K_M.gguf", False).result)
    path.resolve().write_bytes(data[:500])
    assert bench.calls("pull", "broken/repo").message == ""
    found = located(bench.calls, "broken/repo", "Q4_K_M")
    assert found is not None and Path(found).read_bytes() == data


def test_a_projector_comes_and_goes_with_the_models_of_its_repository(bench: Bench) -> None:
    for name in ("m-Q4_K_M.gguf", "Q8_0/m-Q8_0.gguf", "mmproj-F32.gguf", "mmproj-F16.gguf", "mmproj-BF16.gguf"):
        bench.hub.add(f"vision/repo/{name}", gguf(1000, hash(name)))
    for variant in ("Q4_K_M", "Q8_0"):
        assert bench.calls("pull", "vision/repo", variant).message == ""
        found = located(bench.calls, "vision/repo", variant)
        assert found is not None and bench.calls("projector", found).result.endswith("/mmproj-F16.gguf")
    assert set(offered(bench.calls, "vision/repo")) == {"Q4_K_M", "Q8_0"}
    for left, file in ((2, "m-Q4_K_M.gguf"), (0, "Q8_0/m-Q8_0.gguf")):
        assert bench.calls("delete", "vision/repo", file).message == ""
        assert len(list((bench.folder("vision/repo") / "blobs").iterdir())) == left


def test_of_projectors_of_several_models_none_is_fetched(bench: Bench) -> None:
    for name in ("m-Q4_K_M.gguf", "mmproj-a-F16.gguf", "mmproj-b-F16.gguf"):
        bench.hub.add(f"unclear/repo/{name}", gguf(1000, hash(name)))
    assert bench.calls("pull", "unclear/repo").message == ""
    assert len(list((bench.folder("unclear/repo") / "blobs").iterdir())) == 1


# -- deleting ----------------------------------------------------------------------------------------------------------


def test_a_deleted_model_is_gone_with_all_its_parts_and_others_stay(bench: Bench) -> None:
    for part in ("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-Q4_K_M.gguf"):
        bench.hub.add(f"delete/repo/{part}", gguf(1000, hash(part)))
    for variant in ("Q8_0", "Q4_K_M"):
        assert bench.calls("pull", "delete/repo", variant).message == ""
    assert bench.calls("delete", "delete/repo", "m-Q8_0.gguf").message == ""
    assert offered(bench.calls, "delete/repo") == {"Q4_K_M": "m-Q4_K_M.gguf"}
    assert len(list((bench.folder("delete/repo") / "blobs").iterdir())) == 1
    outcome = bench.calls("delete", "delete/repo", "m-Q8_0.gguf")
    assert (outcome.code, outcome.status) == ("model_not_found", 404)


def test_bytes_that_another_file_links_to_stay(bench: Bench) -> None:
    data = gguf(1000)
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        bench.hub.add(f"linked/repo/{name}", data)
    for variant in ("Q4_0", "Q8_0"):
        assert bench.calls("pull", "linked/repo", variant).message == ""
    assert bench.calls("delete", "linked/repo", "a-Q4_0.gguf").message == ""
    path = located(bench.calls, "linked/repo", "Q8_0")
    assert path is not None and Path(path).read_bytes() == data
    assert bench.calls("delete", "linked/repo", "b-Q8_0.gguf").message == ""
    assert list((bench.folder("linked/repo") / "blobs").iterdir()) == []


def test_nothing_can_be_deleted_where_there_is_no_cache(tmp_path: Path) -> None:
    with calling({"HF_HUB_CACHE": str(tmp_path / "absent")}) as calls:
        assert calls("delete", "org/repo", "m.gguf").code == "model_not_found"
