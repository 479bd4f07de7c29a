"""The command `kb`: the knowledge base of the running proxy."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli.kb_add import add_command
from llama_smart_proxy.proxy.cli.kb_eval import eval_command
from llama_smart_proxy.proxy.cli.remote import Remote, RemoteError, at
from llama_smart_proxy.proxy.cli.tables import print_json, print_table, size

COLLECTION_HEADS = ("NAME", "ID", "FILES", "PENDING", "FAILED", "SIZE")
DOCUMENT_HEADS = ("NAME", "STATUS", "PIECES", "SIZE", "SOURCE")
STATE_COLOURS = {"completed": "green", "failed": "red", "in_progress": "yellow", "cancelled": "dim"}
SHOWN = 500
"""Characters of a passage that are printed."""


def kb_command(proxy: Remote, args: argparse.Namespace) -> int:
    """Run the action `args.action`. Returns the exit status. Raises: RemoteError."""
    name = args.collection or ""
    if args.collection == "" or getattr(args, "document", None) == "":
        raise RemoteError("the name is empty; `llama-smart-proxy kb list` shows those that there are", 2)
    if "/" in name or name in (".", ".."):
        raise RemoteError(f"{name}: no path can have this name; `llama-smart-proxy kb list` shows ids", 2)
    return _ACTIONS[args.action](proxy, args)


def _list(proxy: Remote, args: argparse.Namespace) -> int:
    if args.collection is not None:
        return _list_documents(proxy, args)
    found = [*_pages(proxy, "v1", "vector_stores")]
    if args.json:
        print_json(found)
    elif not found:
        print("there is no collection; `llama-smart-proxy kb add PATH` makes one")
    else:
        print_table(COLLECTION_HEADS, [*map(_row, found)], right="FILES PENDING FAILED SIZE")
    return 0


def _row(collection: Json) -> list[str]:
    counts = collection["file_counts"]
    numbers = (str(counts[name]) for name in ("total", "in_progress", "failed"))
    return [collection["name"], collection["id"], *numbers, size(collection["usage_bytes"])]


def _list_documents(proxy: Remote, args: argparse.Namespace) -> int:
    """As JSON each document is an object in a line of its own."""
    lines = proxy.lines(at("knowledge", args.collection))
    if args.json:
        for line in lines:
            print(line)
        return 0
    found = [json.loads(line) for line in lines]
    if not found:
        print("the collection is empty")
        return 0
    rows = [
        [one["name"], one["status"], str(one["pieces"]), size(one["bytes"]), one["source"] or one["id"]]
        for one in found
    ]
    print_table(DOCUMENT_HEADS, rows, colours=STATE_COLOURS, right="PIECES SIZE")
    for one in found:
        if one["error"]:
            print(f"{one['source'] or one['name']}: {one['error']}")
    return 0


def _pages(proxy: Remote, *parts: str) -> Iterator[Json]:
    """All objects of a list that comes in pages."""
    after = None
    while True:
        page = proxy.ask("GET", at(*parts, limit=100, after=after))
        yield from page["data"]
        if not page["has_more"]:
            return
        after = page["last_id"]


def _rm(proxy: Remote, args: argparse.Namespace) -> int:
    if args.document is None:
        answer = proxy.ask("DELETE", at("v1", "vector_stores", args.collection), timeout_s=None)
    else:
        document = _one(proxy, args.collection, args.document)
        # what came from a path or a page is there for this collection alone
        path = ("files",) if document["source"] else ("vector_stores", args.collection, "files")
        answer = proxy.ask("DELETE", at("v1", *path, document["id"]), timeout_s=None)
    if args.json:
        print_json(answer)
    else:
        print(f"{args.document or args.collection}: removed")
    return 0


def _one(proxy: Remote, collection: str, named: str) -> Json:
    """The document of this id, path, URL or name. Raises: RemoteError if there is none, or if there are several."""
    forms = {named, os.path.abspath(named)}
    by_name = []
    for line in proxy.lines(at("knowledge", collection)):
        document = json.loads(line)
        if document["id"] == named or document["source"] in forms:
            return dict(document)
        if document["name"] == named:
            by_name.append(document)
    if len(by_name) != 1:
        several = f"several documents are called {named}: {', '.join(one['source'] or one['id'] for one in by_name)}"
        raise RemoteError(several if by_name else f"the collection {collection} has no document {named}")
    return dict(by_name[0])


def _search(proxy: Remote, args: argparse.Namespace) -> int:
    body = {"query": args.query, "max_num_results": args.limit}
    answer: Any = proxy.ask("POST", at("v1", "vector_stores", args.collection, "search"), body)
    if args.json:
        print_json(answer)
        return 0
    for number, found in enumerate(answer["data"], 1):
        passage = " ".join(found["content"][0]["text"].split())
        shown = passage if len(passage) <= SHOWN else f"{passage[:SHOWN]} ..."
        print(f"{number}. {found['x_source'] or found['filename']} ({found['x_relevance']:.2f})\n   {shown}")
    if not answer["data"]:
        print("nothing was found")
    else:
        print(f"confidence that the answer is there: {answer['x_confidence']:.2f}")
    return 0


_ACTIONS: dict[str, Callable[[Remote, argparse.Namespace], int]] = {
    "add": add_command,
    "list": _list,
    "rm": _rm,
    "search": _search,
    "eval": eval_command,
}
