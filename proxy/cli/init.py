"""`llama-smart-proxy init`: a configuration to begin with."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path


def init_command(path: Path) -> int:
    """Write the configuration that the checkout has as config.yaml to `path`, unless there is such a file. Returns the
    exit status: 0, or 1 with the reason on stderr."""
    if path.suffix.lower() == ".json":  # which is read as JSON
        print(f"{path}: the file with examples is YAML: name it {path.with_suffix('.yaml')}", file=sys.stderr)
        return 1
    text = resources.files("llama_smart_proxy").joinpath("config.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        print(f"{path}: exists already, and is kept as it is; --config FILE writes another one", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"{path}: cannot be written: {exc.strerror or exc}", file=sys.stderr)
        return 1
    option = "" if path == Path("config.yaml") else f" --config {path}"
    print(f"{path}: written. Edit it, then: llama-smart-proxy check{option}; llama-smart-proxy serve{option}")
    return 0
