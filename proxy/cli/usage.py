"""The command `usage`: what the requests of each key and model have used."""

from __future__ import annotations

import argparse

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli.remote import Remote, at
from llama_smart_proxy.proxy.cli.tables import NONE, duration, print_json, print_table

HEADS = {
    "requests": "REQUESTS",
    "errors": "ERRORS",
    "prompt_tokens": "PROMPT",
    "cached_tokens": "CACHED",
    "completion_tokens": "COMPLETION",
}


def usage_command(proxy: Remote, args: argparse.Namespace) -> int:
    """Print usage by the columns `args.by`. Returns the exit status. Raises: RemoteError."""
    answer = proxy.ask("GET", at("admin", "usage", by=args.by, since=args.since, until=args.until))
    if args.json:
        print_json(answer)
        return 0
    lines: list[Json] = answer["usage"]
    if not lines:
        print("no request has used a model")
        return 0
    by = [name for name in args.by.split(",") if name]
    heads = [*(name.upper() for name in by), *HEADS.values(), "TIME"]
    rows = [[*(str(line[name] or NONE) for name in by), *_counts(line)] for line in lines]
    if len(lines) > 1:
        total = {name: sum(line[name] for line in lines) for name in (*HEADS, "seconds")}
        rows.append([*("total" if name == by[0] else "" for name in by), *_counts(total)])
    print_table(heads, rows, right=" ".join([*HEADS.values(), "TIME"]))
    return 0


def _counts(line: Json) -> list[str]:
    return [*(f"{line[name]:,}" for name in HEADS), duration(line["seconds"])]
