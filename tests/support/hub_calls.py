"""Calls of `backends.hub` in a process of their own: `huggingface_hub` reads its environment once, when imported.

As a program it reads calls from stdin, JSON lines of a name and arguments, and answers each with a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import Hub, running_hub
from tests.support.harness import ROOT, environment

Progress = dict[str, Any]


@dataclass
class Outcome:
    """What became of a call: its result, or the error it raised; and the progress it told."""

    result: Any = None
    progress: list[Progress] = field(default_factory=list)
    code: str = ""
    status: int = 0
    message: str = ""


class Calls:
    """A process that can be asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def __call__(self, name: str, *args: object) -> Outcome:
        self.begin(name, *args)
        return self.end()

    def begin(self, name: str, *args: object) -> None:
        """Ask, and do not wait for the answer: `end` does."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *args]) + "\n")
        self.process.stdin.flush()

    def end(self) -> Outcome:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process ended instead of answering"
        return Outcome(**json.loads(line))


@contextmanager
def calling(env: Mapping[str, str]) -> Iterator[Calls]:
    """Calls with that environment."""
    argv = [sys.executable, "-m", "tests.support.hub_calls"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, env=environment(env), text=True, stdin=pipe, stdout=pipe) as process:
        try:
            yield Calls(process)
        finally:
            process.kill()


@dataclass(frozen=True)
class Bench:
    """A hub, a cache, and a process that fetches from one into the other."""

    hub: Hub
    home: Path
    calls: Calls

    def folder(self, repo: str) -> Path:
        """Where the cache keeps a repository."""
        return self.home / "hub" / f"models--{repo.replace('/', '--')}"

    def partial(self, repo: str) -> Path:
        """The unfinished file of a repository that has one, and only one."""
        (found,) = (self.folder(repo) / "blobs").glob("*.incomplete")
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for all tests of a file, each of which has a repository of its own."""
    folder = tmp_path_factory.mktemp("hub")
    with running_hub(folder / "hub") as hub, calling(hub.env(folder / "home")) as calls:
        yield Bench(hub, folder / "home", calls)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# -- the program -------------------------------------------------------------------------------------------------------


def pull(tell: Callable[[Progress], None], repo: str, variant: str | None = None) -> None:
    from llama_smart_proxy.backends.weights import hub

    hub.pull(repo, variant, tell, threading.Event())


def cached(tell: Callable[[Progress], None]) -> dict[str, str]:
    """Names and files of what `hub.cached_models` finds."""
    from llama_smart_proxy.backends.weights import hub

    return {name: str(model.variant) for name, model in hub.cached_models().items()}


def reads(tell: Callable[[Progress], None]) -> int:
    """How many files and folders are opened to say what is in a cache that was looked at before."""
    from llama_smart_proxy.backends.weights import hub

    hub.cached_models()
    seen: list[str] = []
    sys.addaudithook(lambda event, args: seen.append(event) if event in ("open", "os.listdir", "os.scandir") else None)
    hub.cached_models()
    return len(seen)


def library(tell: Callable[[Progress], None], repo: str, file: str, local: bool) -> str:
    """Where huggingface_hub itself has that file, or puts it."""
    import huggingface_hub

    return huggingface_hub.hf_hub_download(repo, file, local_files_only=local)


def scan(tell: Callable[[Progress], None]) -> list[str]:
    """What huggingface_hub finds wrong with the cache."""
    import huggingface_hub

    return [str(warning) for warning in huggingface_hub.scan_cache_dir().warnings]


def locate(tell: Callable[[Progress], None], repo: str, variant: str) -> str | None:
    from llama_smart_proxy.backends.weights.files import locate
    from llama_smart_proxy.proxy.config import ModelConfig

    path = locate("m", ModelConfig(repo=repo, variant=variant))
    return str(path) if path is not None else None


def projector(tell: Callable[[Progress], None], model: str) -> str | None:
    """The projector of a model, given by its path."""
    from llama_smart_proxy.backends.weights.projectors import beside

    found = beside(Path(model))
    return str(found) if found is not None else None


def delete(tell: Callable[[Progress], None], repo: str, file: str) -> None:
    from llama_smart_proxy.backends.weights import hub

    hub.delete(repo, file)


def watch(tell: Callable[[Progress], None], repo: str, watchers: int) -> list[list[Progress]]:
    """What so many see who want the same model at the same time."""
    from llama_smart_proxy.backends.weights import hub
    from llama_smart_proxy.backends.weights.downloads import Downloads

    async def one(downloads: Downloads) -> list[Progress]:
        download = downloads.join(hub.download_name(repo, None), hub.work(repo, None))
        return [progress async for progress in download.watch()] + [download.progress]

    async def all_of_them() -> list[list[Progress]]:
        downloads = Downloads()
        return await asyncio.gather(*(one(downloads) for _ in range(watchers)))

    return asyncio.run(all_of_them())


def cancel(tell: Callable[[Progress], None], repo: str, at: int) -> int:
    """Begin to fetch, and leave once `at` bytes are there; how many threads are left after that."""
    from llama_smart_proxy.backends.weights import hub
    from llama_smart_proxy.backends.weights.downloads import Downloads
    from tests.support.harness import until

    async def leave() -> None:
        downloads = Downloads()
        download = downloads.join("it", hub.work(repo, None))
        await until(lambda: download.progress.get("completed", 0) >= at, what=f"byte {at}")
        await downloads.close()
        await until(lambda: threading.active_count() == 1, what="the end of the thread")

    asyncio.run(leave())
    return threading.active_count()


CALLS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (pull, cached, reads, library, scan, locate, projector, delete, watch, cancel)
}


def main() -> None:
    """Answer until stdin ends."""
    from llama_smart_proxy.proxy.errors import ProxyError

    for line in sys.stdin:
        name, *args = json.loads(line)
        outcome = Outcome()
        try:
            outcome.result = CALLS[name](outcome.progress.append, *args)
        except ProxyError as exc:
            outcome.code, outcome.status, outcome.message = exc.code, exc.status, exc.message
        except Exception:
            outcome.message = traceback.format_exc()
        print(json.dumps(vars(outcome)), flush=True)


if __name__ == "__main__":
    main()
