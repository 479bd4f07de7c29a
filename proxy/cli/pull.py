"""`llama-smart-proxy pull`: download a model, from the Hugging Face hub or by an Ollama, before its first request."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Progress
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, ModelConfig, load_config
from llama_smart_proxy.proxy.errors import ProxyError

LINE_S = 10.0


def pull_command(path: Path | None, env: Mapping[str, str], name: str) -> int:
    """Download the configured model `name`, `hf.co/org/repo:variant`, or any other name through an Ollama host of the
    configuration. Progress is printed to stderr: bars on a terminal, else lines.

    Returns the exit status: 0, 1 with the reason on stderr, or 130 if interrupted; the next run then continues the
    download.

    Raises: ConfigError.
    """
    config = load_config(path, env=env)
    name = next((base for own, base in _virtual(config) if own == name.lower()), name)
    source = _source(config, name)
    problem = None if source is not None else _problem(config, name)
    if problem is not None:
        print(f"{name}: {problem}", file=sys.stderr)
        return 1
    show = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        if source is not None:
            name = hub.download_name(*source)
            hub.pull(*source, show, threading.Event())
        else:
            asyncio.run(_pull_by_server(config, name, show))
    except ProxyError as exc:
        show.end()
        print(exc.message, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show.end()
        print("stopped; run the same command to continue", file=sys.stderr)
        return 130
    show.end()
    print(f"{name} is ready")
    return 0


def _virtual(config: Config) -> Iterator[tuple[str, str]]:
    """Each name of a virtual model, in lower case, and the model that it stands for."""
    for name, model in config.virtual.items():
        for own in (name, *model.aliases):
            yield own.lower(), model.model or name


def _configured(config: Config, name: str) -> ModelConfig | None:
    for own, model in config.models.items():
        if name.lower() in (own.lower(), *(alias.lower() for alias in model.aliases)):
            return model
    return None


def _source(config: Config, name: str) -> tuple[str, str | None] | None:
    """Repository and variant of `name`; None if it names no model of the hub."""
    model = _configured(config, name)
    if model is None:
        return hub.parse_name(name)
    return (model.repo, model.variant) if model.repo is not None else None


def _problem(config: Config, name: str) -> str | None:
    """Why a model that is none of the hub cannot be downloaded; None if it can, by an Ollama host."""
    model = _configured(config, name)
    if model is not None and model.has_source:
        return "is configured with a file of its own; there is nothing to download"
    if config.uses_ollama:
        return None
    return (
        "neither a configured model with a `repo` nor hf.co/org/repo:variant; for names of Ollama's library configure "
        "its host: `ollama: {host: 127.0.0.1}`"
    )


async def _pull_by_server(config: Config, name: str, show: Callable[[Progress], None]) -> None:
    """Have the server pull the model that would pull it for a client. Raises: ProxyError, ConfigError."""
    app = App(config)
    try:
        download = await app.proxy.router.download(name, ())
        if download is not None:
            async with aclosing(download.watch()) as watched:
                async for progress in watched:
                    show(progress)
    finally:
        await app.stop_models()


class _Lines:
    """Prints each new status as a line, and the progress every `LINE_S` seconds."""

    def __init__(self) -> None:
        self._status = ""
        self._printed_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        status, total, completed = progress["status"], progress.get("total"), progress.get("completed", 0)
        due = total is not None and (completed == total or now - self._printed_s >= LINE_S)
        if status != self._status or due:
            self._status, self._printed_s = status, now
            amount = "" if total is None else f": {completed / 1e6:.1f} of {total / 1e6:.1f} MB"
            print(f"{status}{amount}", file=sys.stderr, flush=True)

    def end(self) -> None:
        pass


class _Bars:
    """Shows one progress bar for each file."""

    def __init__(self) -> None:
        self._status = ""
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        if progress["status"] != self._status:
            self.end()
            self._status = progress["status"]
            if "total" in progress:
                start = progress["completed"]
                self._bar = tqdm(desc=self._status, total=progress["total"], initial=start, unit="B", unit_scale=True)
            else:
                print(self._status, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(progress["completed"] - self._bar.n)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
