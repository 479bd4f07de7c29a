"""The commands that ask or change the running proxy: `ps` and the like."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli import remote
from llama_smart_proxy.proxy.cli.remote import Remote
from llama_smart_proxy.proxy.cli.tables import NONE, duration, print_json, print_table, size

STATE_COLOURS = {
    "ready": "green",
    "failed": "red",
    "starting": "yellow",
    "downloading": "yellow",
    "queued": "yellow",
    "unloading": "dim",
    "stopping": "dim",
}


def control_command(args: argparse.Namespace, config: Path | None) -> int:
    """Run the command `args.command`. Returns its exit status. Raises: as `remote.run`."""
    return remote.run(args, config, lambda proxy: ACTIONS[args.command](proxy, args))


def _ps(proxy: Remote, args: argparse.Namespace) -> int:
    answer = proxy.ask("GET", "/running")
    if args.json:
        print_json(answer)
        return 0
    models = answer["running"]
    if not models:
        print("no model is loaded")
        return 0
    heads = ["NAME", "STATE", "SLOTS", "QUEUE", "MEM", "CONTEXT", "LOADED", "IDLE", "EXPIRES", "BACKEND"]
    print_table(heads, [*map(_row, models)], colours=STATE_COLOURS, right="SLOTS QUEUE MEM CONTEXT")
    for model in models:
        if "error" in model:
            print(f"{model['model']}: {model['error']}")
    return 0


def _row(model: Json) -> list[str]:
    slots, state = model["slots"], model["state"]
    expires = "never" if state == "ready" else NONE
    if model["expires_in_s"] is not None:
        expires = f"in {duration(model['expires_in_s'])}"
    return [
        model["model"],
        state,
        f"{slots['busy']}/{slots['total']}" if slots and slots["total"] else NONE,
        str(model["queue"]),
        size(model["rss_bytes"] or model["vram_bytes"]),
        str(model["context_length"] or NONE),
        f"{duration(model['loaded_s'])} ago" if model["loaded_s"] is not None else NONE,
        duration(model["idle_s"]),
        expires,
        model["backend"] or NONE,
    ]


ACTIONS: dict[str, Callable[[Remote, argparse.Namespace], int]] = {"ps": _ps}
