"""The files that git knows: nothing in them belongs to one machine."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support.harness import ROOT


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    folders = "|".join(("root", "Users", "work", "tmp", re.escape(str(ROOT).strip("/"))))
    private = re.compile(rf"(?<![\w.~-])/({folders})/")
    wrong = []
    for name in filter(None, done.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and private.search(file.read_text(encoding="utf-8", errors="replace")):
            wrong.append(name)
    assert wrong == []
