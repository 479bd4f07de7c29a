"""`models_dir` as other programs and people lay it out: which files are models, and under which names."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llama_smart_proxy.backends.weights.models_dir import ModelsDir, Scan, key

COMPOSED, APART = (unicodedata.normalize(form, "müller") for form in ("NFC", "NFD"))
LONG = "n" * 250


def put(*paths: Path, data: bytes = b"GGUF\x03") -> Path:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return paths[0]


def fill(folder: Path, files: str | list[str]) -> None:
    for number, file in enumerate(files.split() if isinstance(files, str) else files):
        put(folder / file, data=b"GGUF" + bytes([number]))


def look(folder: Path, taken: Mapping[str, Path | None] | None = None) -> Scan:
    return ModelsDir(folder, {key(name): path for name, path in (taken or {}).items()}).look()


def offered(folder: Path, scan: Scan | None = None) -> dict[str, str]:
    """Names, and the files that they mean."""
    models = (scan or look(folder)).models.values()
    return {model.name: os.fsdecode(os.path.relpath(model.path, folder)) for model in models}


# -- which files are models --------------------------------------------------------------------------------------------


def test_files_of_nested_folders_are_offered_by_their_names_and_by_their_paths(tmp_path: Path) -> None:
    fill(tmp_path, "flat.gguf one/one-Q4.gguf acme/Tiny-GGUF/Tiny-Q8_0.GGUF a/b/c/d/e/f/deep.gguf x.gguf/in.gguf")
    scan = look(tmp_path)
    assert offered(tmp_path, scan) == {
        "flat": "flat.gguf",
        "one-Q4": "one/one-Q4.gguf",
        "Tiny-Q8_0": "acme/Tiny-GGUF/Tiny-Q8_0.GGUF",
        "deep": "a/b/c/d/e/f/deep.gguf",
        "in": "x.gguf/in.gguf",
    }
    assert scan.aliases[key("acme/Tiny-GGUF/Tiny-Q8_0")].name == "Tiny-Q8_0" and scan.remarks == ()
    assert [model.aliases for model in scan.models.values() if model.name in ("flat", "in")] == [[], ["x.gguf/in"]]


def test_a_split_model_is_offered_once_and_only_when_all_parts_are_there(tmp_path: Path) -> None:
    fill(tmp_path, [f"org/big/big-Q4-0000{part}-of-00003.gguf" for part in (1, 2, 3)])
    fill(tmp_path, "half-00001-of-00002.gguf late-00002-of-00002.gguf")
    put(tmp_path / "late-00001-of-00002.gguf", data=b"")
    scan = look(tmp_path)
    assert offered(tmp_path, scan) == {"big-Q4": "org/big/big-Q4-00001-of-00003.gguf"}
    assert scan.remarks == ("half-00001-of-00002.gguf: 1 of its parts are missing; it is left out",)


def test_what_strangers_have_in_their_folders_is_no_model(tmp_path: Path) -> None:
    fill(tmp_path, "good.gguf .hidden.gguf .cache/huggingface/x.gguf $RECYCLE.BIN/r.gguf sub/mmproj-x-F16.gguf")
    fill(
        tmp_path,
        "a.gguf.part b.gguf.crdownload downloading_c.gguf.part d.gguf.incomplete e.gguf e.gguf.aria2 notes.txt",
    )
    put(tmp_path / "empty.gguf", data=b"")
    put(tmp_path / "pointer.gguf", data=b"version https://git-lfs.github.com/spec/v1\n")
    put(tmp_path / "page.gguf", data=b"<html>Please log in</html>")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "self.gguf").symlink_to("self.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert offered(tmp_path) == {"good": "good.gguf"}


def test_loops_of_links_end_and_folders_behind_links_count_once(tmp_path: Path) -> None:
    root = tmp_path / "models"
    fill(root, "z/real/m.gguf")
    fill(tmp_path, "elsewhere/far.gguf")
    (root / "z" / "real" / "up").symlink_to(root)
    (root / "z" / "real" / "self").symlink_to(".")
    (root / "a-link").symlink_to("z/real")
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to("far")
    assert offered(root) == {"m": "z/real/m.gguf", "far": "again/far.gguf"}


def test_a_folder_that_cannot_be_read_is_told_and_the_rest_is_offered(tmp_path: Path) -> None:
    fill(tmp_path, "good.gguf")
    at = os.open(tmp_path, os.O_RDONLY)
    for _ in range(16):  # until its path is too long for the system
        os.mkdir("d" * 254, dir_fd=at)
        below = os.open("d" * 254, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    scan = look(tmp_path)
    assert offered(tmp_path, scan) == {"good": "good.gguf"}
    assert len(scan.remarks) == 1 and scan.remarks[0].endswith("File name too long; it is left out")


def test_a_folder_that_is_not_there_is_an_error_and_no_models(tmp_path: Path) -> None:
    fill(tmp_path, "dir/m.gguf")
    folder = ModelsDir(tmp_path / "dir", {})
    assert len(folder.look().models) == 1
    (tmp_path / "dir").rename(tmp_path / "away")
    gone = folder.look()
    assert gone.models == {} and "No such file" in gone.error
    (tmp_path / "away").rename(tmp_path / "dir")
    assert len(folder.look().models) == 1 and folder.look().error == ""


# -- names -------------------------------------------------------------------------------------------------------------

SCRIPTS = [
    "模型-7B-Q4_K_M",
    "модель",
    "نموذج",
    "मॉडल",
    "한국어 모델",
    "🦙 lama 👨‍👩‍👧",
    "my model (1)",
    "50%&?#'\"",
    COMPOSED,
]


@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_name_in_any_script_is_kept_as_it_is(tmp_path: Path, stem: str) -> None:
    fill(tmp_path, [f"{stem}.gguf", "other.gguf"])
    assert offered(tmp_path).keys() == {stem, "other"}
    scan = look(tmp_path)
    for asked in (stem, stem.upper(), f"{stem}:latest", unicodedata.normalize("NFD", stem)):
        assert scan.models[key(asked)].name == stem


def test_a_name_breaks_no_line_turns_no_text_and_separates_no_aliases(tmp_path: Path) -> None:
    fill(tmp_path, ["line\nbreak.gguf", "esc\x1b[31m.gguf", "\u202etxt.gguf", "a,b.gguf", " edge .gguf"])
    put(tmp_path / os.fsdecode(b"latin-\xe9.gguf"))
    names = {"line-break", "esc-[31m", "-txt", "a-b", "edge", "latin--"}
    assert offered(tmp_path).keys() == names
    for name in names:
        assert name.isprintable() and name.encode()
    assert look(tmp_path).models[key("a,b")].name == "a-b"


COLLISIONS: list[tuple[list[str], dict[str, str]]] = [
    (["b/x.gguf", "a/x.gguf"], {"x": "a/x.gguf", "b/x": "b/x.gguf"}),
    (["a/x.gguf", "z/y/x.gguf", "x.gguf"], {"x": "x.gguf", "a/x": "a/x.gguf", "z/y/x": "z/y/x.gguf"}),
    (["X.gguf", "x.gguf"], {"X": "X.gguf", "x.gguf": "x.gguf"}),
    (["X.gguf", "a/x.gguf", "A/x.gguf"], {"X": "X.gguf", "A/x": "A/x.gguf", "a/x.gguf": "a/x.gguf"}),
    (["x.gguf", "x:latest.gguf"], {"x": "x.gguf", "x:latest.gguf": "x:latest.gguf"}),
    (["x.gguf", "x.GGUF"], {"x": "x.GGUF", "x.gguf": "x.gguf"}),
    (
        ["x.gguf", "x-00001-of-00002.gguf", "x-00002-of-00002.gguf"],
        {"x": "x-00001-of-00002.gguf", "x.gguf": "x.gguf"},
    ),
    ([f"{COMPOSED}.gguf", f"{APART}.gguf"], {COMPOSED: f"{APART}.gguf", f"{COMPOSED}.gguf": f"{COMPOSED}.gguf"}),
    (["a\n.gguf", "a\t.gguf", "a,.gguf"], {"a-": "a\t.gguf", "a-.gguf": "a\n.gguf", "a-.gguf-2": "a,.gguf"}),
    (["library/x.gguf", "x.gguf"], {"x": "x.gguf", "library/x.gguf": "library/x.gguf"}),
    ([f"{LONG}/{LONG}.gguf", f"{LONG}.gguf"], {LONG: f"{LONG}.gguf", f"nnnn/{LONG}": f"{LONG}/{LONG}.gguf"}),
]


@pytest.mark.parametrize(("files", "expected"), COLLISIONS, ids=[files[0][:20] for files, _ in COLLISIONS])
def test_no_two_files_become_one_name_and_every_collision_is_told(
    tmp_path: Path, files: list[str], expected: dict[str, str]
) -> None:
    fill(tmp_path, files)
    scan = look(tmp_path)
    assert offered(tmp_path, scan) == expected
    assert len(scan.remarks) == len(expected) - 1
    assert all(remark.isprintable() and " is offered as " in remark for remark in scan.remarks)
    keys = [key(model.name) for model in scan.models.values()]
    assert len(set(keys)) == len(keys) and not set(keys) & scan.aliases.keys()


def test_the_name_of_a_configured_model_means_that_one(tmp_path: Path) -> None:
    fill(tmp_path, "own.gguf taken.gguf free.gguf")
    taken = {"Own": tmp_path / "own.gguf", "taken:latest": tmp_path / "elsewhere.gguf", "hub": None}
    scan = look(tmp_path, taken)
    assert offered(tmp_path, scan) == {"free": "free.gguf", "taken.gguf": "taken.gguf"}
    assert scan.remarks == ("taken.gguf is offered as 'taken.gguf': the name 'taken' means a configured model",)


def test_a_link_of_the_same_name_to_the_same_file_is_no_second_model(tmp_path: Path) -> None:
    fill(tmp_path, "m.gguf")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.gguf").symlink_to("../m.gguf")
    (tmp_path / "other.gguf").symlink_to("m.gguf")
    scan = look(tmp_path)
    assert offered(tmp_path, scan) == {"m": "m.gguf", "other": "other.gguf"} and scan.remarks == ()


# -- projectors --------------------------------------------------------------------------------------------------------


def test_each_model_has_the_projector_of_its_folder(tmp_path: Path) -> None:
    fill(tmp_path, "vl-4b-Q4_K_M.gguf mmproj-vl-4b-F16.gguf text.gguf org/see-Q4.gguf org/mmproj-F16.gguf")
    fill(tmp_path, ["org/big/mmproj-F16.gguf", *(f"org/big/Q8_0/big-Q8_0-0000{part}-of-00002.gguf" for part in (1, 2))])
    projectors = {
        model.name: model.projector and os.path.relpath(model.projector, tmp_path)
        for model in look(tmp_path).models.values()
    }
    assert projectors == {
        "vl-4b-Q4_K_M": "mmproj-vl-4b-F16.gguf",
        "text": None,
        "see-Q4": "org/mmproj-F16.gguf",
        "big-Q8_0": "org/big/mmproj-F16.gguf",
    }


# -- looking again -----------------------------------------------------------------------------------------------------


def reads(call: Callable[[], object]) -> int:
    """How many files and folders are opened."""
    seen: list[str] = []
    watching = True
    sys.addaudithook(lambda event, _: seen.append(event) if watching and event in ("open", "os.scandir") else None)
    call()
    watching = False
    return len(seen)


def test_an_unchanged_folder_is_not_read_again_and_no_file_is_opened_twice(tmp_path: Path) -> None:
    fill(tmp_path, [f"pub{number % 7}/repo{number % 3}/m{number}.gguf" for number in range(60)])
    folder = ModelsDir(tmp_path, {})
    first = folder.look()
    assert len(first.models) == 60
    assert reads(folder.look) == 0 and folder.look() is first
    folder.forget()
    assert reads(folder.look) == len({path.parent for path in tmp_path.rglob("*")}) and folder.look() is first
    fill(tmp_path, "pub1/repo1/new.gguf")
    assert "new" in offered(tmp_path, folder.look())


def test_a_link_whose_target_comes_later_is_found_though_its_folder_stands_still(tmp_path: Path) -> None:
    fill(tmp_path, "models/here.gguf")
    root = tmp_path / "models"
    (root / "big.gguf").symlink_to(tmp_path / "nas" / "big.gguf")
    (root / "disk").symlink_to(tmp_path / "disk")
    folder = ModelsDir(root, {})
    assert offered(root, folder.look()).keys() == {"here"}
    stood_still = root.stat().st_mtime_ns
    fill(tmp_path, "nas/big.gguf")
    assert offered(root, folder.look()).keys() == {"here", "big"}
    fill(tmp_path, "disk/org/far.gguf")
    assert offered(root, folder.look()).keys() == {"here", "big", "far"}
    assert root.stat().st_mtime_ns == stood_still
