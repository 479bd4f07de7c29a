"""The commands that ask or change the running proxy: `ps` and the like."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli import remote
from llama_smart_proxy.proxy.cli.kb import kb_command
from llama_smart_proxy.proxy.cli.remote import Remote, RemoteError, at
from llama_smart_proxy.proxy.cli.tables import NONE, duration, print_json, print_table, size
from llama_smart_proxy.proxy.cli.usage import usage_command

MODEL_HEADS = ("NAME", "STATE", "SLOTS", "QUEUE", "MEM", "CONTEXT", "LOADED", "IDLE", "EXPIRES", "BACKEND")
REQUEST_HEADS = ("REQUEST", "KEY", "MODEL", "STATE", "FOR", "PATH")
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
    models, requests = answer["running"], answer["requests"]
    if not models:
        print("no model is loaded")
    else:
        print_table(MODEL_HEADS, [*map(_row, models)], colours=STATE_COLOURS, right="SLOTS QUEUE MEM CONTEXT")
    for model in models:
        if "error" in model:
            print(f"{model['model']}: {model['error']}")
    if requests:
        print()
        print_table(REQUEST_HEADS, [*map(_request_row, requests)], right="FOR")
    return 0


def _request_row(request: Json) -> list[str]:
    names = ("id", "key", "model", "state")
    return [*(request[name] or NONE for name in names), duration(request["seconds"]), request["path"]]


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


def _load(proxy: Remote, args: argparse.Namespace) -> int:
    path = at("admin", "models", args.model, "load", wait=0 if args.no_wait else None)
    return _change(proxy, path, args)


def _unload(proxy: Remote, args: argparse.Namespace) -> int:
    return _change(proxy, at("admin", "models", args.model, "unload"), args)


def _change(proxy: Remote, path: str, args: argparse.Namespace) -> int:
    answer = proxy.ask("POST", path, timeout_s=None)
    if args.json:
        print_json(answer)
    else:
        print(f"{answer['model']}: {answer['state']}")
    return 0


def _logs(proxy: Remote, args: argparse.Namespace) -> int:
    """As JSON each line is a string: in a list, or when following in a line of its own."""
    follow = 1 if args.follow else None
    lines = proxy.lines(at("logs", args.model, lines=args.lines, follow=follow))
    if args.json and not args.follow:
        print_json([*lines])
        return 0
    for line in lines:
        print(json.dumps(line, ensure_ascii=False) if args.json else line, flush=args.follow)
    return 0


def _events(proxy: Remote, args: argparse.Namespace) -> int:
    """As JSON each event is an object in a line of its own, with its kind as `event`."""
    kind = ""
    for line in proxy.lines("/events"):
        field, _, value = line.partition(": ")
        if field == "event":
            kind = value
        elif field == "data":
            data = json.loads(value)
            if args.json:
                print(json.dumps({"event": kind, **data}, ensure_ascii=False), flush=True)
            else:
                name = data.pop("name", "")
                details = " ".join(f"{key}={_shown(value)}" for key, value in data.items() if value is not None)
                print(f"{time.strftime('%H:%M:%S')}  {kind:9}  {name}  {details}", flush=True)
    return 0


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) or " " in value else value


def _why(proxy: Remote, args: argparse.Namespace) -> int:
    answer = proxy.ask("GET", at("admin", "why", args.id))
    if args.json:
        print_json(answer)
        return 0
    print(answer["sentence"])
    rows = [
        [step["kind"], duration(step["after_s"]), duration(step["seconds"]), *_about(step)] for step in answer["steps"]
    ]
    times = answer["times"]
    first_s, prefill_s, decode_s = times["first_token_s"], times["prefill_s"], times["decode_s"]
    if prefill_s is not None:
        kind = "server" if decode_s is None else "prefill"  # which is not known of an answer that came as a whole
        rows.append([kind, duration(first_s and first_s - prefill_s), duration(prefill_s), ""])
    if decode_s is not None:
        rows.append(["decode", duration(first_s), duration(decode_s), ""])
    if rows:
        print()
        print_table(["STEP", "AFTER", "TOOK", "ABOUT"], rows, right="AFTER TOOK")
    return 0


def _about(step: Json) -> list[str]:
    names = ("model", "agent", "why", "ahead", "behind", "places")
    found = [(name, step[name]) for name in names if step.get(name) not in (None, [], "")]
    return [" ".join(f"{name}={_shown(value)}" if name not in ("model", "agent") else value for name, value in found)]


def _reload(proxy: Remote, args: argparse.Namespace) -> int:
    try:
        answer = proxy.ask("POST", "/admin/reload", timeout_s=None)
    except RemoteError as exc:
        problems = exc.error.get("problems")
        if not isinstance(problems, list) or not problems:
            raise
        if args.json:
            print_json({"reloaded": False, "problems": problems})
        else:
            print(*problems, sep="\n", file=sys.stderr)
        return exc.status
    if args.json:
        print_json(answer)
        return 0
    changes = {name: names for name, names in answer.items() if isinstance(names, list) and names}
    print(f"reloaded{'' if changes else ': nothing has changed'}")
    for name, names in changes.items():
        print(f"{name.replace('_', ' ')}: {', '.join(map(str, names))}")
    return 0


ACTIONS: dict[str, Callable[[Remote, argparse.Namespace], int]] = {
    "usage": usage_command,
    "kb": kb_command,
    "ps": _ps,
    "load": _load,
    "unload": _unload,
    "logs": _logs,
    "why": _why,
    "events": _events,
    "reload": _reload,
}
