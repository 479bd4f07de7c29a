"""The command line: `llama-smart-proxy [serve|check|schema|init|import|pull|simulate|help]`."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TextIO

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.log import LEVELS, open_standard_streams, shown_output

logger = logging.getLogger(__name__)

READER_GONE = 128 + signal.SIGPIPE
"""Exit status when the reader of the output has left (`schema | head`), as shells show it of other programs."""
INTERRUPTED = 128 + signal.SIGINT
CONFIG_FILES = ("config.yaml", "config.yml", "config.json")
"""Names of a configuration in the current folder, the first that exists; the last is that of the earlier projects."""
_UNWRITABLE = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What a write of output fails with: its reader has left, the disk is full, the terminal is gone."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 if it failed or its output cannot be written, 2 if the configuration
    or the command line is invalid, `READER_GONE` if the reader of its output has left, or `INTERRUPTED`."""
    open_standard_streams()
    logging.getLogger("llama_smart_proxy.backends").addHandler(logging.NullHandler())  # commands print what they find
    try:
        try:
            with shown_output():
                return _command(sys.argv[1:] if argv is None else argv)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # here, as nothing can be caught when the interpreter does it
    except KeyboardInterrupt:  # before the server has installed its signal handlers
        return INTERRUPTED
    except OSError as exc:
        if exc.errno not in _UNWRITABLE:
            raise
        if exc.errno != errno.EPIPE:
            with suppress(OSError):  # if that is where it was to be written
                print(f"llama-smart-proxy: the output cannot be written: {exc.strerror}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            _discard(stream)
        return READER_GONE if exc.errno == errno.EPIPE else 1


def _discard(stream: TextIO) -> None:
    """Drop what `stream` has not written and cannot write."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _command(argv: list[str]) -> int:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["serve", *argv]
    parser, commands = _parsers()
    args = parser.parse_args(argv)
    if args.command == "help":
        print((commands[args.topic] if args.topic else parser).format_help(), end="")
        return 0
    if args.command == "schema":
        from llama_smart_proxy.proxy.cli.check import schema_command

        return schema_command()
    if args.command == "init":
        from llama_smart_proxy.proxy.cli.init import init_command

        return init_command(Path(args.config or os.environ.get("LSP_CONFIG") or CONFIG_FILES[0]))
    if args.command == "import":
        from llama_smart_proxy.proxy.cli.importing import import_command

        return import_command(Path(args.file), Path(args.output) if args.output else None)
    path = _config_path(args.config)
    if args.command == "check":
        from llama_smart_proxy.proxy.cli.check import check_command

        return check_command(path, os.environ, strict=args.strict, argv_of=args.argv)
    try:
        if args.command == "pull":
            from llama_smart_proxy.proxy.cli.pull import pull_command

            return pull_command(path, os.environ, args.name)
        return _simulate(path) if args.command == "simulate" else _serve(args, path)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 2


COMMANDS = {
    "serve": "Run the proxy until Ctrl-C, SIGTERM or SIGHUP. The default: `llama-smart-proxy --port 8080` serves.",
    "check": "Report all problems of the configuration without starting anything; exit status 2 if there are any.",
    "schema": "Print the JSON schema of the configuration: every field, its default and its description.",
    "init": "Write a configuration file with examples, to be edited; an existing file is kept.",
    "import": "Translate the configuration of another program; what has no equivalent is listed on stderr.",
    "pull": "Download a model before its first use: a configured one, hf.co/org/repo[:variant] from Hugging Face, or "
    "any other name, such as qwen3:0.6b, through the Ollama server of the configuration.",
    "simulate": "Start the proxy on a free port, send a chat, a stream, an embedding and a model swap to the "
    "configured models, and print what passed.",
    "help": "Describe the program, or one command.",
}


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
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
    serve.add_argument("--reload", action="store_true", help="reload agents when their files change")
    commands["pull"].add_argument("name", metavar="NAME", help="the name of the model")
    commands["import"].add_argument("format", metavar="llama-swap", choices=["llama-swap"], help="the other program")
    commands["import"].add_argument("file", metavar="FILE", help="its configuration")
    commands["import"].add_argument("-o", "--output", metavar="FILE", help="file to write, in place of stdout")
    commands["help"].add_argument("topic", metavar="COMMAND", nargs="?", choices=COMMANDS, help="one of the commands")
    commands["check"].add_argument("--argv", metavar="MODEL", help="print the command line of the model's llama-server")
    commands["check"].add_argument("--strict", action="store_true", help="exit status 2 for warnings, too")
    for name in ("serve", "check", "pull", "simulate"):
        found = f"{', '.join(CONFIG_FILES[:-1])} or {CONFIG_FILES[-1]} in the current folder"
        commands[name].add_argument("--config", metavar="FILE", help=f"default: $LSP_CONFIG, else {found}")
    commands["init"].add_argument("--config", metavar="FILE", help=f"default: $LSP_CONFIG, else {CONFIG_FILES[0]}")
    return parser, commands


def _config_path(given: str | None) -> Path | None:
    named = given or os.environ.get("LSP_CONFIG")
    return Path(named) if named else next(iter(_present()), None)


def _present() -> list[Path]:
    return [path for path in map(Path, CONFIG_FILES) if path.exists()]


def _serve(args: argparse.Namespace, path: Path | None) -> NoReturn:
    from llama_smart_proxy.backends.llamacpp.problems import machine_problems
    from llama_smart_proxy.proxy import log, serve
    from llama_smart_proxy.proxy.config import load_config

    flags = {"server.host": args.host, "server.port": args.port, "log_level": args.log_level}
    overrides = {name: value for name, value in flags.items() if value is not None}
    config = load_config(path, env=os.environ, overrides=overrides)
    if missing := [problem for problem in machine_problems(config) if problem.fatal]:
        raise ConfigError([f"{path or 'defaults'}: {problem}" for problem in missing])
    log.configure(config.log_level)
    _log_source(path)
    for warning in config.warnings:
        logger.warning("%s", warning)
    try:
        status = serve.run(config, reload=args.reload)
    except ConfigError as exc:  # agents are checked only when the server starts
        print(ConfigError([f"{path or 'defaults'}: {line}" for line in exc.problems]), file=sys.stderr)
        status = 2
    serve.leave(status)


def _log_source(path: Path | None) -> None:
    """Log which file is in use, and which one beside it is not."""
    if path is None:
        logger.info(
            "no configuration file, the defaults apply: `llama-smart-proxy init` writes %s, --config FILE names one",
            CONFIG_FILES[0],
        )
        return
    logger.info("configuration: %s", path.absolute())
    others = [name for name in CONFIG_FILES if name != path.name and path.with_name(name).exists()]
    if others and path.name in CONFIG_FILES:
        logger.info("not in use, as %s is: %s", path.name, ", ".join(others))


def _simulate(path: Path | None) -> int:
    from llama_smart_proxy.proxy.cli import simulate

    return simulate.run(path)


if __name__ == "__main__":
    sys.exit(main())
