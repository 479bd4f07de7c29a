"""The command line: `llama-smart-proxy [serve|check|schema|pull|simulate]`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.log import LEVELS, shown_output

READER_GONE = 128 + signal.SIGPIPE
"""Exit status when the reader of the output has left (`schema | head`), as shells show it of other programs."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 2 if the configuration or the command line is invalid, `READER_GONE`
    if the reader of its output has left."""
    try:
        try:
            with shown_output():
                return _command(sys.argv[1:] if argv is None else argv)
        finally:
            for stream in _outputs():
                stream.flush()  # here, as nothing can be caught when the interpreter does it
    except BrokenPipeError:
        for stream in _outputs():
            _discard(stream)
        return READER_GONE


def _outputs() -> list[TextIO]:
    """Standard output and error, without those that were closed before the program started."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _discard(stream: TextIO) -> None:
    """Drop what `stream` has not written and cannot write."""
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _command(argv: list[str]) -> int:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["serve", *argv]
    args = _parser().parse_args(argv)
    if args.command == "schema":
        from llama_smart_proxy.proxy.cli.check import schema_command

        return schema_command()
    path = _config_path(args.config)
    if args.command == "check":
        from llama_smart_proxy.proxy.cli.check import check_command

        return check_command(path, os.environ)
    try:
        if args.command == "pull":
            from llama_smart_proxy.proxy.cli.pull import pull_command

            return pull_command(path, os.environ, args.name)
        return _simulate(path) if args.command == "simulate" else _serve(args, path)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the server has installed its signal handlers
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-smart-proxy", description="One process between chat UIs and local models."
    )
    parser.add_argument("--version", action="version", version=f"llama-smart-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    serve = commands.add_parser("serve", help="run the proxy (the default)")
    check = commands.add_parser("check", help="report every problem of the configuration")
    commands.add_parser("schema", help="print the configuration's JSON schema")
    pull = commands.add_parser("pull", help="download a model from Hugging Face")
    pull.add_argument("name", metavar="NAME", help="a configured model, or hf.co/org/repo[:variant]")
    simulate = commands.add_parser("simulate", help="start the proxy on a free port and test it with your models")
    for command in (serve, check, pull, simulate):
        command.add_argument("--config", metavar="FILE", help="default: $LSP_CONFIG, else config.yaml if it exists")
    serve.add_argument("--host", help="address to listen on")
    serve.add_argument("--port", type=int, help="port to listen on; 0 picks a free one")
    serve.add_argument("--log-level", choices=LEVELS)
    serve.add_argument("--reload", action="store_true", help="reload agents when their files change")
    return parser


def _config_path(given: str | None) -> Path | None:
    named = given or os.environ.get("LSP_CONFIG")
    if named:
        return Path(named)
    default = Path("config.yaml")
    return default if default.exists() else None


def _serve(args: argparse.Namespace, path: Path | None) -> int:
    from llama_smart_proxy.proxy import log, serve
    from llama_smart_proxy.proxy.cli.check import machine_problems
    from llama_smart_proxy.proxy.config import load_config

    flags = {"server.host": args.host, "server.port": args.port, "log_level": args.log_level}
    overrides = {name: value for name, value in flags.items() if value is not None}
    config = load_config(path, env=os.environ, overrides=overrides)
    if missing := machine_problems(config):
        raise ConfigError([f"{path or 'defaults'}: {line}" for line in missing])
    log.configure(config.log_level)
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        return serve.run(config, reload=args.reload)
    except ConfigError as exc:  # agents are checked only when the server starts
        raise ConfigError([f"{path or 'defaults'}: {line}" for line in exc.problems]) from None


def _simulate(path: Path | None) -> int:
    from llama_smart_proxy.proxy.cli import simulate

    return simulate.run(path)


if __name__ == "__main__":
    sys.exit(main())
