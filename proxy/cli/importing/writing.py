"""Our configuration as YAML with comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llama_smart_proxy.proxy.cli.importing.servers import Block

WIDTH = 110


@dataclass(frozen=True)
class Note:
    """A remark on something in the other program's configuration. `at` is the part of ours that it belongs to: a
    section and a name in it; empty for the whole."""

    where: str
    text: str
    at: tuple[str, ...] = ()


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|"))


def rendered(data: Mapping[str, Any], notes: Sequence[Note], source: str) -> str:
    """The text of a file: `data`, with each note at the part it belongs to."""
    lines = _comment(f"Imported from {source}, a configuration of llama-swap. Test it: llama-smart-proxy check")
    lines += _remarks(notes, ())
    for section, value in data.items():
        lines.append("")
        if section not in ("models", "remotes"):
            lines += _dumped({section: value})
            continue
        lines.append(f"{section}:")
        for name, entry in value.items():
            lines += [f"  {line}" for line in (*_remarks(notes, (section, name)), *_dumped({name: entry}))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _remarks(notes: Sequence[Note], at: tuple[str, ...]) -> list[str]:
    return [line for note in notes if note.at == at for line in _comment(f"{note.where}: {note.text}")]


def _comment(text: str) -> list[str]:
    words = " ".join(text.split())
    return [f"# {line}" for line in textwrap.wrap(words, WIDTH, break_long_words=False, break_on_hyphens=False)]


def _dumped(value: Mapping[str, Any]) -> list[str]:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=False)
    return text.rstrip("\n").split("\n")
