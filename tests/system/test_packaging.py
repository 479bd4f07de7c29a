"""What is installed is one package: it shares no name with others, and no file of it is loaded twice."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from tests.support.harness import ROOT, environment
from tests.support.image import instructions

OURS = "llama_smart_proxy"
TREES = ("agents", "backends", "proxy")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
EVERYTHING = """
import importlib, json, os, pkgutil, sys
from pathlib import Path
import llama_smart_proxy as ours

for info in pkgutil.walk_packages(ours.__path__, f"{ours.__name__}."):
    if not info.name.endswith(".__main__"):
        importlib.import_module(info.name)
from llama_smart_proxy.agents.loader import discover
for place in discover([Path("{folder}")]).values():
    place.load()
found = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith(("{root}" + os.sep, "{folder}" + os.sep)):
        found.setdefault(os.path.realpath(file), []).append(name)
json.dump(found, sys.stdout)
"""
MINE = """
from llama_smart_proxy import Agent, BadRequest, ChatRequest, ChunkStream, Context, say

class Mine(Agent):
    '''Says hello.'''
    command = "mine"
    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        return say("hello")
"""


def run(argv: Sequence[str], folder: Path, path: Path | None = None) -> str:
    """What the program prints, started in `folder` with PYTHONPATH `path`. Fails if it does."""
    env = environment({"PYTHONPATH": str(path) if path else ""})
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"
    return done.stdout


def sources(folder: Path) -> dict[str, bytes]:
    """The Python files below, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.py"))
        if "__pycache__" not in path.parts
    }


def checked_out() -> dict[str, bytes]:
    """The Python files that the package is made of, by their path in it."""
    below = {f"{tree}/{path}": data for tree in TREES for path, data in sources(ROOT / tree).items()}
    return below | {path: (ROOT / "src" / OURS / path).read_bytes() for path in ("__init__.py", "__main__.py")}


# -- in the checkout ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cwd", ["checkout", "elsewhere"])
def test_no_file_is_loaded_under_two_names(tmp_path: Path, cwd: str) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    program = EVERYTHING.replace("{root}", str(ROOT)).replace("{folder}", str(tmp_path))
    folder = ROOT if cwd == "checkout" else tmp_path
    found: dict[str, list[str]] = json.loads(run([sys.executable, "-c", program], folder, ROOT))
    assert {path: names for path, names in found.items() if len(names) > 1} == {}
    ours = {path for path, (name, *_) in found.items() if name.partition(".")[0] == OURS}
    below = [path for path in checked_out() if path != "__main__.py"]
    assert ours == {os.path.realpath(ROOT / "src" / OURS / path) for path in below}, "all of it was looked at"
    assert any(path.endswith("mine.py") for path in found)


@pytest.mark.parametrize("name", [TREES[0], *(pytest.param(name, marks=pytest.mark.full) for name in TREES[1:])])
def test_a_foreign_package_of_a_name_in_ours_breaks_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "config.yaml").write_text("agents: [help, example, think, redact, shield, parallel]\n")
    command = str(Path(sys.executable).with_name("llama-smart-proxy"))
    for argv in ([command], [sys.executable, "-m", OURS]):
        assert run([*argv, "check", "--config", "config.yaml"], tmp_path, tmp_path).startswith("OK: config.yaml")


# -- built and installed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a checkout like this one, in a folder of its own: building leaves files behind."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.exists():
            target.write_bytes(source.read_bytes())
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run([sys.executable, "-c", program], copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built of the source distribution, and of nothing else."""
    out = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(sdist)], out)
    (built,) = out.iterdir()
    return built


def install(target: Path, *what: str) -> None:
    run([*PIP, "install", "--no-deps", "--target", str(target), *what], target.parent)


def recorded(distribution: Distribution) -> set[str]:
    """The files that this distribution has installed, without those that hold its own metadata."""
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return {path for path, *_ in rows if ".dist-info/" not in path}


def check_it_serves(argv: Sequence[str], folder: Path, path: Path | None) -> None:
    """The program, started in `folder`, answers requests and ends by SIGTERM."""
    env = environment({"PYTHONPATH": str(path) if path else ""})
    with subprocess.Popen(argv, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = iter(process.stderr.readline, "")
        try:
            found = next(found for line in log if (found := re.search(r"listening on (http://\S+)", line)))
            with urllib.request.urlopen(f"{found[1]}/plugins", timeout=60) as answer:
                assert {plugin["name"] for plugin in json.load(answer)} >= {"help", "redact"}
        finally:
            process.terminate()
            rest = process.stderr.read()
        assert process.wait(60) == 0, rest


def check_it_runs(target: Path, folder: Path) -> None:
    """Our command, and `python -m`, run from what is installed in `target`."""
    (folder / "config.yaml").write_text("agents: [help, example, think, redact, shield, parallel]\n")
    command = str(target / "bin" / "llama-smart-proxy")
    for argv in ([command], [sys.executable, "-m", OURS]):
        assert run([*argv, "check", "--config", "config.yaml"], folder, target).startswith("OK: config.yaml")
    run([command, "init", "--config", "new.yaml"], folder, target)
    check_it_serves([command, "serve", "--config", "config.yaml", "--port", "0"], folder, target)
    assert (folder / "new.yaml").read_bytes() == (ROOT / "config.yaml").read_bytes()
    program = f"import {OURS}, {OURS}.agents.base as base; print({OURS}.Agent is base.Agent, base.__file__)"
    assert run([sys.executable, "-c", program], folder, target).split() == [
        "True",
        str(target / OURS / "agents" / "base.py"),
    ]


def test_the_source_distribution_has_the_files_and_not_links_to_them(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    base = sdist.name.removesuffix(".tar.gz")
    held = {member.name for member in members}
    assert {f"{base}/src/{OURS}/{path}" for path in checked_out()} <= held
    assert {f"{base}/{name}" for name in ("LICENSE", "README.md", "pyproject.toml")} <= held
    assert not [name for name in held if name.startswith(f"{base}/tests")], "a part of the tests is of no use"


def test_what_is_installed_is_one_package_with_all_of_ours(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install(target, "--no-index", str(wheel))
    (ours,) = distributions(path=[str(target)])
    files = recorded(ours)
    assert {path.partition("/")[0] for path in files} == {OURS, ".."}, "the package, and the command"
    assert sources(target / OURS) == checked_out()
    check_it_runs(target, tmp_path)


@pytest.mark.full
def test_it_goes_together_with_packages_that_have_the_names_of_ours(wheel: Path, tmp_path: Path) -> None:
    target, others = tmp_path / "site", {"openai-agents": "agents", "proxy.py": "proxy"}
    done = subprocess.run([*PIP, "download", "--no-deps", "--dest", str(tmp_path / "others"), *others])
    if done.returncode != 0:
        pytest.skip("no package registry can be reached")
    install(target, "--no-index", str(wheel), *map(str, (tmp_path / "others").iterdir()))
    files = {found.name: recorded(found) for found in distributions(path=[str(target)])}
    assert len(files) == 3
    for name, package in others.items():
        (theirs,) = (paths for found, paths in files.items() if found.replace("_", "-") == name)
        assert f"{package}/__init__.py" in theirs
        assert not theirs & files["llama-smart-proxy"]
        program = f"from importlib.util import find_spec; print(find_spec({package!r}).origin)"
        origin = run([sys.executable, "-c", program], tmp_path, target).strip()
        assert origin == str(target / package / "__init__.py")
        assert (target / package / "__init__.py").read_bytes() != (ROOT / package / "__init__.py").read_bytes()
    assert "proxy" in run([sys.executable, "-c", "import proxy; print(proxy.__name__)"], tmp_path, target)
    check_it_runs(target, tmp_path)


@pytest.mark.full
def test_installed_into_a_new_environment_it_serves_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of the tests: what is installed here is the package."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    [site] = (place / "lib").glob("python*/site-packages")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
    (site / "others.pth").write_text("\n".join(packages))
    (tmp_path / "config.yaml").write_text("agents: [help, redact]\n")
    command = str(python.with_name("llama-smart-proxy"))
    program = f"import {OURS}; print({OURS}.__file__)"
    assert run([str(python), "-c", program], tmp_path).strip() == str(site / OURS / "__init__.py")
    check_it_serves([command, "serve", "--config", "config.yaml", "--port", "0"], tmp_path, None)


@pytest.mark.full
def test_both_distributions_are_the_same_bytes_whenever_they_are_built(tmp_path: Path) -> None:
    built = []
    for number, umask in enumerate((0o022, 0o077)):
        target = tmp_path / str(number)
        argv = [sys.executable, str(ROOT / "packaging" / "dist.py"), str(target)]
        env = environment({"SOURCE_DATE_EPOCH": "1700000000", "TZ": ("UTC", "Asia/Tokyo")[number]})
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240, umask=umask)
        assert done.returncode == 0, done.stderr
        built.append({file.name: file.read_bytes() for file in target.iterdir()})
        second = int(time.time())
        while int(time.time()) == second:  # times in archives are whole seconds
            time.sleep(0.01)
    assert len(built[0]) == 2 and built[0] == built[1]


@pytest.mark.full
def test_what_the_dockerfile_copies_is_all_that_the_package_is_built_of(wheel: Path, tmp_path: Path) -> None:
    context, out = tmp_path / "src", tmp_path / "out"
    for word, rest in instructions():
        words = rest.split()
        if word == "COPY" and not words[0].startswith("--") and not words[-1].startswith("/"):
            for name in words[:-1]:
                source, target = ROOT / name, context / (words[-1] if len(words) == 2 else name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(
                        source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                    )
                else:
                    shutil.copy(source, target)
    run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(context)],
        tmp_path,
    )
    [built] = out.iterdir()
    names = [zipfile.ZipFile(file).namelist() for file in (wheel, built)]
    assert set(names[0]) == set(names[1])
