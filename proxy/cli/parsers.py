"""The commands of the command line, and what each accepts."""

from __future__ import annotations

import argparse

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.log import FORMATS, LEVELS

CONFIG_FILES = ("config.yaml", "config.yml", "config.json")
"""Names of a configuration in the current folder, the first that exists; the last is that of the earlier projects."""
COMMANDS = {
    "serve": "Run the proxy until Ctrl-C or SIGTERM; SIGHUP reloads its configuration. The default: "
    "`llama-smart-proxy --port 8080` serves.",
    "check": "Report all problems of the configuration without starting anything; exit status 2 if there are any.",
    "schema": "Print the JSON schema of the configuration: every field, its default and its description.",
    "init": "Write a configuration file with examples, to be edited; an existing file is kept.",
    "import": "Translate the configuration of another program; what has no equivalent is listed on stderr.",
    "pull": "Download a model before its first use: a configured one, hf.co/org/repo[:variant] from Hugging Face, or "
    "any other name, such as qwen3:0.6b, through the Ollama server of the configuration.",
    "simulate": "Start the proxy on a free port, send a chat, a stream, an embedding and a model swap to the "
    "configured models, and print what passed.",
    "ps": "List the models of the running proxy that are loaded, loading, waited for, or have failed, and the requests "
    "under way.",
    "load": "Load a model, and wait until it is loaded.",
    "unload": "Unload a model, once its answers are complete; or cancel its download.",
    "logs": "Print the last lines that a model's server has printed.",
    "why": "Explain what a request waited for and how long each part took; its id is in the header X-Request-Id.",
    "events": "Print what happens to models, queues and downloads, until Ctrl-C.",
    "reload": "Let the running proxy read its configuration again. An invalid one changes nothing; exit status 1.",
    "key": "Make an API key: `key new` prints it once, and what the configuration gets of it.",
    "usage": "Print how many requests, errors and tokens there were, by API key, model and day.",
    "kb": "Add documents to the knowledge base of the running proxy, list, remove and search them, and measure how "
    "well questions find them.",
    "help": "Describe the program, or one command.",
}
REMOTE = ("ps", "load", "unload", "logs", "why", "events", "reload", "usage", "kb")
"""The commands that ask or change the running proxy."""
KB_ACTIONS = {
    "add": "Add files, folders and web pages. What has not changed since the last time is not sent again.",
    "list": "List collections, or the documents of one of them.",
    "rm": "Remove a collection, or one document of it.",
    "search": "Print the passages that answer a question best.",
    "eval": "Measure how often the right document, or a passage with the right answer, is found.",
}
COLLECTION = "default"
"""The collection of who names none."""
STATUSES = (
    "Exit status: 0 done, 1 refused or failed, 2 wrong command line or configuration, 3 no proxy is running there, "
    "4 the API key is missing or not sufficient, 130 interrupted."
)


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and that of each command."""
    parser = argparse.ArgumentParser(
        prog="llama-smart-proxy",
        description="One process between chat UIs and local models.",
        epilog="`llama-smart-proxy help COMMAND` describes one command. The documentation is in README.md and docs/.",
    )
    parser.add_argument("--version", action="version", version=f"llama-smart-proxy {__version__}")
    group = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands = {name: group.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    serve = commands["serve"]
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on; 0 picks a free one")
    serve.add_argument("--log-level", choices=LEVELS, help="least severe messages to log")
    serve.add_argument("--log-format", choices=FORMATS, help="auto is text on a terminal, and logfmt elsewhere")
    serve.add_argument("--reload", action="store_true", help="reload configuration and agents when their files change")
    commands["pull"].add_argument("name", metavar="NAME", help="the name of the model")
    commands["key"].add_argument("action", metavar="new", choices=["new"], help="make a key")
    commands["key"].add_argument("--name", help="its name in logs, metrics and usage")
    commands["key"].add_argument("--scope", choices=["inference", "admin"], default="inference", help="what it may do")
    commands["import"].add_argument("format", metavar="llama-swap", choices=["llama-swap"], help="the other program")
    commands["import"].add_argument("file", metavar="FILE", help="its configuration")
    commands["import"].add_argument("-o", "--output", metavar="FILE", help="file to write, in place of stdout")
    commands["help"].add_argument("topic", metavar="COMMAND", nargs="?", choices=COMMANDS, help="one of the commands")
    commands["check"].add_argument("--argv", metavar="MODEL", help="print the command line of the model's llama-server")
    commands["check"].add_argument("--strict", action="store_true", help="exit status 2 for warnings, too")
    remote = [*(commands[name] for name in REMOTE if name != "kb"), *_kb_actions(commands["kb"])]
    for command in (*(commands[name] for name in ("serve", "check", "pull", "simulate")), *remote):
        found = f"{', '.join(CONFIG_FILES[:-1])} or {CONFIG_FILES[-1]} in the current folder"
        command.add_argument("--config", metavar="FILE", help=f"default: $LSP_CONFIG, else {found}")
    for command in remote:
        _add_remote(command)
    for name in ("load", "unload", "logs"):
        commands[name].add_argument("model", metavar="MODEL", help="name of the model")
    commands["load"].add_argument("--no-wait", action="store_true", help="return while it loads")
    commands["logs"].add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    commands["logs"].add_argument("-n", "--lines", metavar="N", type=int, default=200, help="so many lines (200)")
    commands["why"].add_argument("id", metavar="ID", help="id of the request")
    _add_usage(commands["usage"])
    commands["init"].add_argument("--config", metavar="FILE", help=f"default: $LSP_CONFIG, else {CONFIG_FILES[0]}")
    return parser, commands


def _add_remote(parser: argparse.ArgumentParser) -> None:
    """Where the proxy is, the key for it, and the form of the answer."""
    parser.add_argument("--url", help="address of the proxy; default: $LSP_URL, else as in the configuration")
    parser.add_argument("--key", help="API key; default: $LSP_API_KEY, which other users of this machine cannot see")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = STATUSES


def _add_usage(parser: argparse.ArgumentParser) -> None:
    by = "what to count by, of key, model, day and api; default: key,model,day"
    parser.add_argument("--by", default="key,model,day", metavar="COLUMNS", help=by)
    parser.add_argument("--since", metavar="DAY", help="the first day, such as 2026-01-31")
    parser.add_argument("--until", metavar="DAY", help="the last day")


def _kb_actions(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of what `kb` does."""
    parser.epilog = "`llama-smart-proxy kb ACTION --help` describes one action."
    group = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions = {name: group.add_parser(name, help=text, description=text) for name, text in KB_ACTIONS.items()}
    add, rm, search = actions["add"], actions["rm"], actions["search"]
    add.add_argument(
        "paths", metavar="PATH|URL", nargs="+", help="a file, a folder with all that is below it, or a page"
    )
    skipped = "names of the only files that are added from folders, such as '*.md'; may be repeated"
    add.add_argument("--pattern", metavar="GLOB", action="append", default=[], help=skipped)
    waits = "wait until all is read and can be found (the default), and name what is not readable"
    add.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help=waits)
    for action in (add, search, actions["eval"]):
        named = f"name or id of a collection; default: {COLLECTION}"
        action.add_argument("--collection", metavar="NAME", default=COLLECTION, help=named)
    actions["list"].add_argument("collection", metavar="COLLECTION", nargs="?", help="list the documents of this one")
    rm.add_argument("collection", metavar="COLLECTION", help="name or id of the collection")
    rm.add_argument("document", metavar="DOCUMENT", nargs="?", help="name, path, URL or id of one document in it")
    search.add_argument("query", metavar="QUERY", help="what is looked for")
    search.add_argument("--limit", metavar="N", type=int, default=5, help="so many passages (5)")
    lines = 'lines of JSON: {"question": ..., "document": ...} or {"question": ..., "answer": ...}'
    actions["eval"].add_argument("file", metavar="FILE", help=lines)
    return [*actions.values()]
