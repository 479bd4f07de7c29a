"""Arguments of llama-server as the file gives them: a text is split by the rules of a shell, paths become absolute.

Source of the flags: llama.cpp tools/server/README.md, b11434.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_PIECE = re.compile(
    r"""
    (?P<continued>\\[ \t]*(?:\n|\Z))           # also with blanks behind the backslash, which no one can see
    | (?P<space>[ \t\n]+)
    | (?P<escaped>\\.)
    | '(?P<single>[^']*)'
    | "(?P<double>(?:[^"\\]|\\.)*)"
    | (?P<plain>[^ \t\n\\'"]+)
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r"\\(?:\n|([$`\"\\]))")
_FLAG_AND_MORE = re.compile(r"--?[A-Za-z][\w-]*[ \t\n]")


def split_command(text: str) -> list[str]:
    """The words of `text` by the rules of a POSIX shell, without its expansions.

    A backslash drops the line end behind it, `#` at the beginning of a word a comment. Any other line end separates
    words: the text is one command. A word that begins with an escaped blank begins behind it: folding a YAML text joins
    `\\` and the next line so. Raises: ValueError for a quote that is not closed.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    words: list[str] = []
    word: str | None = None
    position = 0
    while position < len(text):
        if word is None and text[position] == "#":
            position = (text.find("\n", position) + 1) or len(text)
            continue
        piece = _PIECE.match(text, position)
        if piece is None:
            raise ValueError("has a quote that is not closed")
        position = piece.end()
        kind, found = piece.lastgroup, piece[piece.lastgroup or 0]
        if kind == "space" or (kind == "escaped" and word is None and found[1] in " \t"):
            words += [] if word is None else [word]
            word = None
        elif kind == "double":
            word = (word or "") + _ESCAPED.sub(lambda escape: escape[1] or "", found)
        elif kind != "continued":
            word = (word or "") + (found[1] if kind == "escaped" else found)
    return words if word is None else [*words, word]


def split_args(value: object) -> object:
    """`"--temp 0.7"`, and an item `"--temp 0.7"` of a list, as `["--temp", "0.7"]`; other items are one argument each.

    Raises: ValueError, as `split_command`.
    """
    if isinstance(value, str):
        return split_command(value)
    if not isinstance(value, list):
        return value
    args: list[object] = []
    for item in value:
        joined = isinstance(item, str) and _FLAG_AND_MORE.match(item)
        args += split_command(item) if joined else [item]
    return args


@dataclass(frozen=True, slots=True)
class _PathFlag:
    """A flag whose value is a path, or several with commas, each perhaps with `:SCALE`. `exists`: whether the path
    can be used; None: llama-server creates it."""

    exists: Callable[[str], bool] | None
    several: bool = False
    scaled: bool = False

    def split(self, value: str) -> list[tuple[str, str]]:
        """The paths of a value, each with what follows it."""
        parts = value.split(",") if self.several else [value]
        if not self.scaled:
            return [(part, "") for part in parts]
        return [(path, f":{scale}") if colon else (scale, "") for path, colon, scale in map(_at_last_colon, parts)]


def _at_last_colon(part: str) -> tuple[str, str, str]:
    return part.rpartition(":")


_FILES = """
    -mm --mmproj -md --model-draft --spec-draft-model -mv --model-vocoder -lcs --lookup-cache-static --grammar-file -jf
    --json-schema-file --chat-template-file --ui-config-file --webui-config-file --mcp-servers-config --ssl-key-file
    --ssl-cert-file --models-preset
"""
_FOLDERS = "--path --slot-save-path --media-path --models-dir --video-ffmpeg-dir"
_CREATED = "-lcd --lookup-cache-dynamic --log-file --log-prompts-dir"
_PATH_FLAGS: dict[str, _PathFlag] = {
    **dict.fromkeys(_FILES.split(), _PathFlag(os.path.exists)),
    **dict.fromkeys(_FOLDERS.split(), _PathFlag(os.path.isdir)),
    **dict.fromkeys(_CREATED.split(), _PathFlag(None)),
    **dict.fromkeys(("--lora", "--control-vector"), _PathFlag(os.path.exists, several=True)),
    **dict.fromkeys(("--lora-scaled", "--control-vector-scaled"), _PathFlag(os.path.exists, several=True, scaled=True)),
}
_SECRET = re.compile(r"-(?:[\w-]*-)?(?:key|token|secret|password|hft)|--mcp-servers-json", re.IGNORECASE)
_USER = re.compile(r"(://)[^/@\s]+@")
_NAMED = re.compile(
    r"([\w-]{0,60}(?:key|token|secret|passw(?:or)?d|cookie|auth(?:orization)?) ?[:=] ?).+", re.IGNORECASE
)
"""A header (`-H "Authorization: Bearer abc"`), or a variable for a container (`-e HF_TOKEN=abc`)."""
SECRET = "***"


def spelled(flag: str) -> str:
    """A flag as in the documentation: llama-server takes `_` for `-` after `--`."""
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _with_flags(args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """For each argument: the flag whose value it is or contains, what of it precedes the value, and the value.

    Every argument behind a flag counts as its value, also a flag. The flag is empty for the first argument.
    """
    before = ""
    for arg in args:
        flag, equals, value = arg.partition("=")
        if equals and flag.startswith("-"):
            yield spelled(flag), flag + equals, value
        else:
            yield before, "", arg
        before = spelled(arg) if arg.startswith("-") else ""


def absolute_paths(args: Sequence[str], absolute: Callable[[str], str]) -> list[str]:
    """`args` with every path, after a flag or after `--flag=`, replaced by `absolute` of it."""
    done = []
    for flag, prefix, value in _with_flags(args):
        kind = _PATH_FLAGS.get(flag)
        if kind is not None:
            value = ",".join(f"{absolute(path) if path else path}{rest}" for path, rest in kind.split(value))
        done.append(prefix + value)
    return done


def missing_paths(args: Sequence[str]) -> list[str]:
    """The paths in `args` that llama-server cannot use, each as `--flag: path`. Blocks on the disk."""
    return [
        f"{flag}: {path}"
        for flag, _, value in _with_flags(args)
        if (kind := _PATH_FLAGS.get(flag)) is not None and kind.exists is not None
        for path, _ in kind.split(value)
        if not kind.exists(path)
    ]


def without_secret_values(args: Sequence[str]) -> list[str]:
    """`args` with `***` for the values of flags, headers and variables for keys, tokens and the like, and for what URLs
    have before `@`."""
    return [
        prefix + (SECRET if _SECRET.fullmatch(flag) and value else _without_secrets(value))
        for flag, prefix, value in _with_flags(args)
    ]


def _without_secrets(value: str) -> str:
    found = _NAMED.fullmatch(value)
    return found[1] + SECRET if found is not None else _USER.sub(rf"\1{SECRET}@", value)
