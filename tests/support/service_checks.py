"""What is tried with the service within a machine that systemd has booted (`machine.py`): a program, as root.

`python -m tests.support.service_checks` installs the units of the packaging as the installer does, and writes what it
has found to `results/facts.json`, one entry a step; with `sandbox` it only finds out whether services can be confined
in this machine as the packaged one is, and writes that.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.fakes.llama_server import install
from tests.support.confinement import PROBE, SANDBOX
from tests.support.harness import ROOT, ports
from tests.support.machine import PROGRAM, RESULTS, trees

NAME = "llama-smart-proxy"
SETTINGS = Path("/etc", NAME)
STATE = Path("/var/lib", NAME)
UNITS = Path("/run/systemd/system")
FAKES = Path("/srv/fakes")
GATE = FAKES / "gate"
PORT = 11555
KEY = "sk-canary-0123456789abcdef"
PATIENCE_S = 60.0
STOP = "" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "TimeoutStopSec=15\n"
"""In a container with control groups of version 1, systemd can miss the end of a service's last process, and then waits
for as long as this before it goes on."""
CONFIG: dict[str, Any] = {
    "server": {"port": PORT},
    "server_pool": ports(),
    "llama_cpp": {"server": str(FAKES / "llama-server")},
    "models": {"m": {"path": str(FAKES / "fake.gguf")}},
}
facts: dict[str, object] = {}
Step = Callable[[], object]


# -- means -------------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], object], what: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.05)


def systemctl(*words: str) -> int:
    """The exit status of one command, behind which the limit of starts counts from 0 again."""
    status = subprocess.run(["systemctl", *words], check=False, timeout=PATIENCE_S).returncode
    subprocess.run(["systemctl", "reset-failed", f"{NAME}.service"], check=False, stderr=subprocess.DEVNULL)
    return status


def shown(name: str) -> str:
    argv = ["systemctl", "show", "--property", name, "--value", f"{NAME}.service"]
    return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def main_pid() -> int:
    """The service's first process, 0 while there is none."""
    return int(shown("MainPID"))


def current() -> int:
    """The pid of the service, as soon as there is one."""
    until(main_pid, "the service")
    return main_pid()


def children() -> set[psutil.Process]:
    return set(psutil.Process(current()).children(recursive=True))


def configure(**changes: object) -> None:
    (SETTINGS / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))


def configured() -> int:
    """The exit status of the installer's second half, which writes the units and starts the service."""
    argv = [str(PROGRAM / "bin/python"), str(ROOT / "packaging/install.py"), "configure"]
    return subprocess.run(argv, check=False, cwd=ROOT).returncode


def drop_in(text: str = "") -> None:
    """What is added to the service from its next start on, in place of what was; nothing by default."""
    file = UNITS / f"{NAME}.service.d" / "99-checks.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    binds = "".join(f"BindReadOnlyPaths={tree}\n" for tree in trees())  # in case that the checkout is in /home or /tmp
    file.write_text(f"[Service]\n{binds}{STOP}{text}")
    systemctl("daemon-reload")


def asked(path: str, body: dict[str, object] | None = None, key: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=PATIENCE_S)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body)
        connection.request("GET" if data is None else "POST", path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def models() -> list[str]:
    return [model["id"] for model in json.loads(asked("/v1/models")[1])["data"]]


def chat(*, stream: bool = False) -> tuple[int, bytes]:
    text = json.dumps({"fake": {"tokens": 20, "last_at": str(GATE)}}) if stream else "Hello"
    messages = [{"role": "user", "content": text}]
    return asked("/v1/chat/completions", {"model": "m", "stream": stream, "messages": messages})


@contextmanager
def streaming() -> Iterator[Callable[[], str]]:
    """A streamed chat under way, whose last token comes when the function is called, which returns how it ended."""
    GATE.unlink(missing_ok=True)
    got: list[tuple[int, bytes]] = []
    client = threading.Thread(target=lambda: got.append(chat(stream=True)), daemon=True)
    client.start()
    until(
        lambda: any(request["state"] == "streaming" for request in json.loads(asked("/running")[1])["requests"]),
        "the stream",
    )

    def rest() -> str:
        GATE.touch()
        client.join(PATIENCE_S)
        return "whole" if got and got[0][0] == 200 and got[0][1].endswith(b"data: [DONE]\n\n") else repr(got)[-300:]

    yield rest


class Clients:
    """Two clients that ask all the time, each time on a connection of its own; how they fared."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._done.is_set():
            try:
                outcome = str(asked("/v1/models")[0])
            except (OSError, http.client.HTTPException) as exc:
                outcome = "refused" if isinstance(exc, ConnectionRefusedError) else "broken off"
            self.outcomes[outcome] += 1

    def served(self) -> None:
        """Return when twenty more have been answered."""
        before = self.outcomes["200"]
        until(lambda: self.outcomes["200"] >= before + 20, "answers")

    def end(self) -> Counter[str]:
        self._done.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        return self.outcomes


def restarted(before: int) -> None:
    until(lambda: main_pid() not in (0, before) and shown("ActiveState") == "active", "the restart")


# -- steps -------------------------------------------------------------------------------------------------------------


def installs() -> object:
    install(FAKES)
    (FAKES / "fake.gguf").write_bytes(b"GGUF")
    SETTINGS.mkdir()
    drop_in()
    loading = {"m": {**CONFIG["models"]["m"], "preload": True, "env": {"FAKE_LOAD_UNTIL": str(GATE)}}}
    configure(models=loading)
    found = configured(), shown("ActiveState"), shown("SubState"), asked("/v1/models")[0]
    until(lambda: shown("StatusText") == "loading: m", "the model in the status")
    GATE.touch()
    until(lambda: shown("StatusText") == "loaded: m", "the model in the status")
    configure()
    return found


def reloads() -> object:
    systemctl("restart", NAME)
    pid = current()
    with streaming() as rest:
        configure(models={**CONFIG["models"], "another": CONFIG["models"]["m"]})
        good = systemctl("reload", NAME)
        until(lambda: "another" in models(), "the new model")
        configure(server={"port": "x"})
        systemctl("reload", NAME)
        until(lambda: "server.port" in shown("StatusText"), "the problem in the status")
        kept = "another" in models(), json.loads(asked("/health")[1])["status"]
        configure()
        systemctl("reload", NAME)
        until(lambda: "another" not in models() and "server.port" not in shown("StatusText"), "the old models")
        until(lambda: shown("ActiveState") == "active", "the end of reloading")
        return good, kept, main_pid() == pid, rest()


def restarts() -> object:
    clients = Clients()
    clients.served()
    for _ in range(5):
        systemctl("restart", NAME)
        clients.served()
    orderly = dict(clients.outcomes)
    for _ in range(2):
        pid = current()
        os.kill(pid, signal.SIGKILL)
        restarted(pid)
        clients.served()
    outcomes = clients.end()
    return sorted(orderly), outcomes["refused"], set(outcomes) <= {"200", "broken off"}


def kills() -> object:
    chat()
    pid, before = current(), children()
    os.kill(pid, signal.SIGKILL)
    restarted(pid)
    return len(before), sum(child.is_running() for child in before), chat()[0]


def hangs() -> object:
    drop_in("WatchdogSec=8\nTimeoutStopSec=5\n")
    systemctl("restart", NAME)
    chat()
    pid, before = current(), children()
    os.kill(pid, signal.SIGSTOP)
    restarted(pid)
    log = subprocess.run(["journalctl", "-u", NAME, "-o", "cat"], check=True, text=True, stdout=subprocess.PIPE).stdout
    drop_in()
    return "Watchdog timeout" in log, len(before), sum(child.is_running() for child in before), chat()[0]


def stops() -> object:
    systemctl("restart", NAME)
    with streaming() as rest:
        before = children()
        subprocess.run(["systemctl", "stop", "--no-block", NAME], check=True)
        until(lambda: shown("ActiveState") == "deactivating", "the end")
        ended = rest()
        until(lambda: shown("ActiveState") == "inactive", "the end")
    left = len(before), sum(child.is_running() for child in before)
    return ended, left, shown("Result"), shown("ExecMainStatus"), chat()[0]


def keys() -> object:
    credential = SETTINGS / "credentials" / "CLIENT_KEY"
    credential.write_text(f"{KEY}\n")
    credential.chmod(0o600)
    configure(server={"port": PORT, "api_keys": ["${CLIENT_KEY}"]})
    status = systemctl("restart", NAME)
    found = status, asked("/v1/models")[0], asked("/v1/models", key=KEY)[0]
    credential.unlink()
    configure()
    return found


def refuses() -> object:
    found: list[object] = []
    for server in ({"port": PORT, "host": "0.0.0.0"}, {"port": "x"}):
        configure(server=server)
        installed = configured() if "host" in server else subprocess.run(["systemctl", "restart", NAME]).returncode
        until(lambda: shown("ActiveState") == "failed" or int(shown("NRestarts")) > 0, "the end")
        found.append((installed != 0, shown("ActiveState"), shown("NRestarts"), shown("ExecMainStatus")))
        configure()
        found.append((configured(), shown("ActiveState"), asked("/v1/models")[0]))
    return found


def confines() -> object:
    Path("/home/user").mkdir(parents=True, exist_ok=True)
    for folder in ("/boot", "/opt"):
        Path(folder).mkdir(exist_ok=True)
    secret = SETTINGS / "credentials" / "SECRET"
    secret.write_text("x")
    secret.chmod(0o600)
    (FAKES / "probe.py").write_text(PROBE)
    drop_in(f"ExecStartPre={PROGRAM}/bin/python {FAKES}/probe.py\n")
    systemctl("restart", NAME)
    found = json.loads((STATE / "probed").read_text())
    drop_in()
    return found


STEPS: dict[str, Step] = {
    "ready without its models, which it then shows": installs,
    "reloaded, and not with a bad configuration, beside a stream": reloads,
    "restarted and killed without a refused connection": restarts,
    "no child left of one that was killed": kills,
    "one that hangs is replaced by the watchdog": hangs,
    "stopped behind a stream": stops,
    "keys from credentials": keys,
    "not restarted with statuses 78 and 2": refuses,
    "confined": confines,
}


def sandbox() -> object:
    UNITS.mkdir(parents=True, exist_ok=True)
    (UNITS / "sandbox.service").write_text(SANDBOX)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    return subprocess.run(["systemctl", "start", "sandbox.service"], check=False).returncode


def main() -> None:
    FAKES.mkdir(parents=True)
    FAKES.chmod(0o755)
    for name, step in ({"sandbox": sandbox} if "sandbox" in sys.argv else STEPS).items():
        begun = time.monotonic()
        try:
            facts[name] = step()
        except Exception:  # what follows would fail for the same reason
            facts["failed"] = f"{name}: {traceback.format_exc()}"
        print(f"{name}: {time.monotonic() - begun:.1f} s: {facts.get(name, 'failed')}", flush=True)
        (RESULTS / "facts.json").write_text(json.dumps(facts))
        if "failed" in facts:
            break
    with (RESULTS / "journal").open("w") as file:
        subprocess.run(["journalctl", "-b", "--no-pager"], check=False, stdout=file)


if __name__ == "__main__":
    main()
