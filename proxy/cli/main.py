"""The command line: `llama-smart-proxy [COMMAND]`; see `parsers.COMMANDS`."""

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

from llama_smart_proxy.proxy.cli.parsers import CONFIG_FILES, REMOTE, parsers
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.log import open_standard_streams, shown_output

logger = logging.getLogger(__name__)

READER_GONE = 128 + signal.SIGPIPE
"""Exit status when the reader of the output has left (`schema | head`), as shells show it of other programs."""
INTERRUPTED = 128 + signal.SIGINT
_UNWRITABLE = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What a write of output fails with: its reader has left, the disk is full, the terminal is gone."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 if it failed or its output cannot be written, 2 if the configuration
    or the command line is invalid, those of `remote` for a command to the running proxy, `READER_GONE` if the reader of
    its output has left, or `INTERRUPTED`."""
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
    parser, commands = parsers()
    args = parser.parse_args(argv)
    if args.command == "help":
        print((commands[args.topic] if args.topic else parser).format_help(), end="")
        return 0
    if args.command in _WITHOUT_CONFIGURATION:
        return _without_configuration(args)
    path = _config_path(args.config)
    if args.command == "check":
        from llama_smart_proxy.proxy.cli.check import check_command

        return check_command(path, os.environ, strict=args.strict, argv_of=args.argv)
    try:
        if args.command == "pull":
            from llama_smart_proxy.proxy.cli.pull import pull_command

            return pull_command(path, os.environ, args.name)
        if args.command in REMOTE:
            from llama_smart_proxy.proxy.cli.control import control_command

            return control_command(args, path)
        return _simulate(path) if args.command == "simulate" else _serve(args, path)
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return 2


_WITHOUT_CONFIGURATION = ("schema", "init", "import", "key")


def _without_configuration(args: argparse.Namespace) -> int:
    """The commands that read no configuration."""
    if args.command == "schema":
        from llama_smart_proxy.proxy.cli.check import schema_command

        return schema_command()
    if args.command == "init":
        from llama_smart_proxy.proxy.cli.init import init_command

        return init_command(Path(args.config or os.environ.get("LSP_CONFIG") or CONFIG_FILES[0]))
    if args.command == "import":
        from llama_smart_proxy.proxy.cli.importing import import_command

        return import_command(Path(args.file), Path(args.output) if args.output else None)
    from llama_smart_proxy.proxy.cli.key import new_key_command

    return new_key_command(args.name, args.scope)


def _config_path(given: str | None) -> Path | None:
    named = given or os.environ.get("LSP_CONFIG")
    return Path(named) if named else next(iter(_present()), None)


def _present() -> list[Path]:
    return [path for path in map(Path, CONFIG_FILES) if path.exists()]


def _serve(args: argparse.Namespace, path: Path | None) -> NoReturn:
    from llama_smart_proxy.proxy import log, serve
    from llama_smart_proxy.proxy.reload import Source

    flags = {"server.host": args.host, "server.port": args.port, "log_level": args.log_level}
    flags["log_format"] = args.log_format
    overrides = {name: value for name, value in flags.items() if value is not None}
    source = Source(path, overrides)
    config = source.read()
    log.configure(config.log_level, config.log_format, with_content=config.log_content)
    _log_source(path)
    for warning in config.warnings:
        logger.warning("%s", warning)
    try:
        status = serve.run(config, source, watch=args.reload)
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
