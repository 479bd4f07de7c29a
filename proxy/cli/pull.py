"""`llama-smart-proxy pull`: download a model from the Hugging Face hub before the first request for it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Progress
from llama_smart_proxy.proxy.config import Config, load_config
from llama_smart_proxy.proxy.errors import ProxyError

LINE_S = 10.0


def pull_command(path: Path | None, env: Mapping[str, str], name: str) -> int:
    """Download the configured model `name`, or `hf.co/org/repo:variant`. Progress is printed to stderr: bars on a
    terminal, else lines.

    Returns the exit status: 0, 1 with the reason on stderr, or 130 if interrupted; the next run then continues the
    download.

    Raises: ConfigError.
    """
    source = _source(load_config(path, env=env), name)
    if source is None:
        print(f"{name}: neither a configured model with a `repo` nor hf.co/org/repo:variant", file=sys.stderr)
        return 1
    show = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        hub.pull(*source, show, threading.Event())
    except ProxyError as exc:
        show.end()
        print(exc.message, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show.end()
        print("stopped; run the same command to continue", file=sys.stderr)
        return 130
    show.end()
    print(f"{hub.download_name(*source)} is ready")
    return 0


def _source(config: Config, name: str) -> tuple[str, str | None] | None:
    """Repository and variant of `name`; None if it names no model of the hub."""
    for own, model in config.models.items():
        if name.lower() in (own.lower(), *(alias.lower() for alias in model.aliases)):
            return (model.repo, model.variant) if model.repo is not None else None
    return hub.parse_name(name)


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
