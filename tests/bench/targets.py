"""What is measured: each row of the table is one `Target`."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import agents, process, wire

LISTEN_TIMEOUT_S = 20.0
AGAINST = "against"
"""Name of the proxy of another checkout."""

Command = Callable[[Path, int, int], list[str]]
"""(directory for its files, port to listen on, port of the stub) -> command line."""


@dataclass
class Target:
    """A way from the client to the stub. `command` is None for the way without anything between; `translates` tells
    whether clients of one API reach the stub in another one there. `root` is the checkout that the program is of."""

    name: str
    command: Command | None
    translates: bool = False
    root: Path = process.ROOT
    port: int = 0
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)
    _directory: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def pids(self) -> list[int]:
        """The measured processes, descendants included."""
        return [p.pid for p in process.tree(self._process.pid)] if self._process else []

    def start(self, stub_port: int, cores: process.Cores) -> float:
        """Start the program and return the seconds from exec until its port accepts.

        Raises: `wire.BrokenRun` with what it wrote when it ends or does not listen within `LISTEN_TIMEOUT_S`.
        """
        if self.command is None:
            self.port = stub_port
            return 0.0
        self._directory = tempfile.TemporaryDirectory(prefix=f"bench-{self.name}-")
        self.port = _free_port()
        directory = Path(self._directory.name)
        argv = self.command(directory, self.port, stub_port)
        began = time.perf_counter()
        self._process = process.spawn(argv, cores.target, directory / "log", root=self.root)
        while not _accepts(self.port):
            if self._process.poll() is not None or time.perf_counter() - began > LISTEN_TIMEOUT_S:
                raise wire.BrokenRun(f"{self.name} does not listen; it said: {self.log()[-2000:]}")
            time.sleep(0.002)
        return time.perf_counter() - began

    def log(self) -> str:
        """What the program wrote so far."""
        return (Path(self._directory.name) / "log").read_text() if self._directory else ""

    def check_alive(self) -> None:
        """Raise `wire.BrokenRun` when the program has ended by itself."""
        if self._process and self._process.poll() is not None:
            raise wire.BrokenRun(f"{self.name} ended with code {self._process.returncode}: {self.log()[-2000:]}")

    def stop(self) -> None:
        """End the program, if it runs, and remove its files."""
        if self._process:
            process.stop(self._process)
            self._process = None
        if self._directory:
            self._directory.cleanup()
            self._directory = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


NGINX_CONF = """
daemon off;
master_process off;
pid {directory}/pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_max_body_size 100m;
  client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;
  uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e;
  upstream stub {{ server 127.0.0.1:{stub_port}; keepalive 128; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 10000000;
    location / {{
      proxy_pass http://stub;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
"""One process: without a master, nginx is its own only worker and keeps the user it was started as."""


def nginx_command(directory: Path, port: int, stub_port: int) -> list[str]:
    conf = directory / "nginx.conf"
    conf.write_text(NGINX_CONF.format(directory=directory, port=port, stub_port=stub_port))
    return ["nginx", "-e", "stderr", "-p", str(directory), "-c", str(conf)]


RELAY_CONFIG = """
remotes:
  stub:
    url: http://127.0.0.1:{stub_port}
    models: [{model}]
ollama:
  host: http://127.0.0.1:{stub_port}
  models: ["{ollama_model}"]
agents_dirs: [{folder}]
agents: {agents}
models: {chains}
"""


def relay_command(directory: Path, port: int, stub_port: int) -> list[str]:
    return [sys.executable, "-m", "llama_smart_proxy", *_relay_options(directory, port, stub_port)]


def _relay_options(directory: Path, port: int, stub_port: int) -> list[str]:
    """What follows the command of the proxy. It logs at its default level, as it does for its users."""
    config = directory / "config.yaml"
    folder = directory / "agents"
    agents.write(folder)
    chains = {name: {"model": wire.MODEL, "agents": chain} for name, chain in agents.CHAINS.items()}
    text = RELAY_CONFIG.format(
        stub_port=stub_port, model=wire.MODEL, ollama_model=wire.OLLAMA_MODEL, folder=folder,
        agents=json.dumps(list(agents.AGENTS)), chains=json.dumps(chains),
    )  # fmt: skip
    config.write_text(text)
    return ["serve", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def other_checkout(root: Path) -> Target:
    """The proxy of another checkout, which has an environment of its own in `.venv`.

    Raises: FileNotFoundError if its command is not there.
    """
    program = (root / ".venv/bin/llama-smart-proxy").absolute()
    if not program.is_file():
        raise FileNotFoundError(program)
    return Target(AGAINST, lambda *place: [str(program), *_relay_options(*place)], translates=True, root=root)


def reference_command(directory: Path, port: int, stub_port: int) -> list[str]:
    return [sys.executable, "-m", "tests.bench.reference", str(port), str(stub_port)]


def all_targets(*, reference: bool) -> list[Target]:
    """Every target that can run here, in the order of the table; nginx only when it is on PATH."""
    targets = [Target("direct", None)]
    if shutil.which("nginx"):
        targets.append(Target("nginx", nginx_command))
    targets.append(Target("relay", relay_command, translates=True))
    if reference:
        targets.append(Target("reference", reference_command))
    return targets
