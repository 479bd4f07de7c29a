"""The Dockerfile, taken apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "packaging" / "docker"
KEY = "k" * 32


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile, in order, each as a word and the rest."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


def last_stage() -> dict[str, list[str]]:
    """What the instructions of the image itself say, by their words."""
    found = instructions()
    start = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    values: dict[str, list[str]] = {}
    for word, rest in found[start:]:
        values.setdefault(word, []).append(rest)
    return values


def argv(text: str) -> list[str]:
    """A command in its JSON form: no shell that would keep signals from the program."""
    words: list[str] = json.loads(text)
    return words
