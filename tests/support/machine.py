"""A machine with a real systemd, booted in a container from this host's own /usr: nothing is downloaded.

It requires root, systemd-nspawn, a systemd in /usr, and the permission to make namespaces and mounts; `bootable` says
what is missing. All mounts are in the container's own namespace, and its processes end with the one that booted it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.harness import ROOT

RESULTS = Path("/results")
"""Where the machine sees the folder that it shares with the host."""
PROGRAM = Path("/opt/llama-smart-proxy")
"""Where it sees the virtual environment that runs the tests, as the installer would have made it."""
BOOT_S = 120.0
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("os-release", "passwd", "group", "nsswitch.conf", "ld.so.conf", "ld.so.conf.d", "ld.so.cache", "alternatives")
_SKIPPED = ("tmpfiles-setup", "tmpfiles-setup-dev", "tmpfiles-clean", "firstboot", "sysusers", "sysctl")
_ENTER = 'for folder in $FOLDERS; do echo $$ >"$folder/cgroup.procs" || exit 9; done; exec "$@"'
# All processes of a namespace of pids end with its first one, which ends with `unshare`, which ends with the tests.
_ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--propagation", "private", "--")
_CHECKS = """
[Unit]
Requires=basic.target
After=basic.target
SuccessAction=poweroff-immediate
FailureAction=poweroff-immediate
[Service]
Type=oneshot
WorkingDirectory={root}
ExecStart={python} -m {module}
StandardOutput=file:/results/output
StandardError=inherit
TimeoutStartSec=infinity
"""


def trees() -> list[Path]:
    """The folders outside of /usr that the tests' Python needs, the project's among them."""
    needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parents[1]}
    outside = sorted(path for path in needed if not path.is_relative_to("/usr"))
    return [path for path in outside if not any(path != other and path.is_relative_to(other) for other in outside)]


class Machine:
    """One that boots, runs the module `module` of the tests as root, and is switched off at its end."""

    def __init__(self, folder: Path, module: str) -> None:
        self.results = folder / "results"
        self._root = folder / "root"
        self._name = f"lsp-{uuid.uuid4().hex[:12]}"
        self._console = folder / "console"
        self._cgroups = [path / self._name for path in _own_cgroups()]
        folder.chmod(0o755)
        for path in (self.results, self._root, self._root / "usr", self._root / "etc/systemd/system"):
            path.mkdir(parents=True)
        for name in _LINKS:
            if (link := Path("/", name)).is_symlink():
                (self._root / name).symlink_to(os.readlink(link))
        self._write_etc(self._root / "etc", module)

    def _write_etc(self, etc: Path, module: str) -> None:
        for source in filter(Path.exists, (Path("/etc", name) for name in _ETC)):
            if source.is_dir():
                shutil.copytree(source, etc / source.name, symlinks=True)
            else:
                shutil.copyfile(source, etc / source.name)
        (etc / "shadow").write_text("root:*:1::::::\n")
        (etc / "shadow").chmod(0o600)
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")  # one that is not new enables no units by itself
        for name in _SKIPPED:
            (etc / f"systemd/system/systemd-{name}.service").symlink_to("/dev/null")
        checks = _CHECKS.format(root=ROOT, python=sys.executable, module=module)
        (etc / "systemd/system/checks.service").write_text(checks)

    def _argv(self) -> list[str]:
        binds = [*(f"{path}:{path}" for path in (Path("/usr"), *trees())), f"{sys.prefix}:{PROGRAM}"]
        options = ["--private-network", "--register=no", "--keep-unit", "--resolv-conf=off", "--timezone=off", "--boot"]
        return [
            *("setpriv", "--pdeathsig", "KILL", "--", *_ALONE, "systemd-nspawn", "--quiet", "-D", str(self._root)),
            *("-M", self._name, *options, *(f"--bind-ro={bind}" for bind in binds), f"--bind={self.results}:{RESULTS}"),
            *("systemd.unit=checks.service", "systemd.condition-needs-update=no"),
        ]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The container's supervisor, which ends when the machine is switched off. At the end of the context nothing is
        left of it: processes, mounts and control groups."""
        env = os.environ | {"FOLDERS": " ".join(map(str, self._cgroups))}
        try:
            for folder in self._cgroups:
                folder.mkdir()
            with self._console.open("wb") as console:
                argv = ["sh", "-c", _ENTER, "sh", *self._argv()]
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=env)
            try:
                yield process
            finally:
                process.kill()
                process.wait()
        finally:
            self._clean()

    def _clean(self) -> None:
        ends = time.monotonic() + BOOT_S
        while (pids := self.pids()) and time.monotonic() < ends:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for top in self._cgroups:
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    os.rmdir(folder)
        with suppress(OSError):
            Path("/run/systemd/nspawn/propagate", self._name).rmdir()

    def pids(self) -> set[int]:
        """The machine's processes, as the host counts them."""
        files = [file for top in self._cgroups for file in top.rglob("cgroup.procs")]
        found: set[int] = set()
        for file in files:
            with suppress(OSError):
                found.update(int(pid) for pid in file.read_text().split())
        return found - {os.getpid()}

    def left(self) -> list[str]:
        """What is still there of it on the host."""
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self._root) in line]
        groups = [str(path) for path in self._cgroups if path.exists()]
        return [*mounts, *groups, *map(str, self.pids())]

    def facts(self) -> dict[str, Any]:
        """What its checks have written; empty if it did not get so far."""
        file = self.results / "facts.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def said(self) -> str:
        """What was shown on its console, the output of the checks, and the journal."""
        files = (self._console, self.results / "output", self.results / "journal")
        return "\n".join(file.read_text(errors="replace")[-8000:] for file in files if file.exists())


def _own_cgroups() -> list[Path]:
    """The folders of this process's control groups that systemd manages: two containers must not share one."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in {"": ("", "unified"), "name=systemd": ("systemd",)}.get(controllers, ()):
            folder = Path("/sys/fs/cgroup", mount)
            if (folder / "cgroup.procs").exists():
                found.append(folder / path.lstrip("/"))
                break
    return found


def obstacle() -> str | None:
    """What this host lacks for a machine, as far as can be seen without booting one."""
    if os.geteuid() != 0:
        return "requires root"
    for program in ("systemd-nspawn", "setpriv"):
        if shutil.which(program) is None:
            return f"requires {program} (Debian: systemd-container, util-linux)"
    if not Path("/usr/lib/systemd/systemd").exists():
        return "requires systemd in /usr"
    if not all(Path("/", name).is_symlink() for name in ("bin", "sbin", "lib")):
        return "requires a merged /usr"
    if not _own_cgroups() or not all(os.access(path, os.W_OK) for path in _own_cgroups()):
        return "requires control groups that can be written"
    return None
