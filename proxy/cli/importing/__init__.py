"""`llama-smart-proxy import`: writes our configuration from that of another program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llama_smart_proxy.proxy.cli.importing.llama_swap import Import
from llama_smart_proxy.proxy.cli.importing.reading import Unreadable, read
from llama_smart_proxy.proxy.cli.importing.writing import rendered


def import_command(source: Path, target: Path | None) -> int:
    """Translate llama-swap's configuration in the file `source` into ours, and write that to `target`, which must not
    exist, or to stdout. What has no equivalent is listed on stderr, and in comments of the result.

    Returns the exit status: 0, 1 if the result cannot be written, 2 with all problems of `source` on stderr.
    """
    try:
        imported = Import(read(source))
    except Unreadable as exc:
        for problem in exc.problems:
            print(f"{source}: {problem}", file=sys.stderr)
        return 2
    text = rendered(imported.data, imported.notes, source.name)
    if target is None:
        print(text, end="")
    elif (reason := _write(target, text)) is not None:
        print(f"{target}: {reason}", file=sys.stderr)
        return 1
    for note in imported.notes:
        print(f"{note.where}: {note.text}", file=sys.stderr)
    counts = ", ".join(f"{len(imported.data.get(kind, {}))} {kind}" for kind in ("models", "remotes"))
    print(f"{source}: {counts}; {len(imported.notes)} remarks", file=sys.stderr)
    if target is not None:
        print(f"{target}: written. Next: llama-smart-proxy check --config {target}", file=sys.stderr)
    return 0


def _write(target: Path, text: str) -> str | None:
    """Why the file cannot be written; None if it was. It may contain keys, so only its owner can read it."""
    try:
        with open(target, "x", encoding="utf-8", opener=_private) as file:
            file.write(text)
    except FileExistsError:
        return "exists already, and is kept as it is; -o names another file"
    except OSError as exc:
        return f"cannot be written: {exc.strerror or exc}"
    return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
