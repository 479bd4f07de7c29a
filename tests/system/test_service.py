"""The units of the systemd service, and what the installer derives from a configuration."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.config import Config
from tests.support.harness import ROOT, environment

PACKAGING = ROOT / "packaging"
NAME = "llama-smart-proxy"
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="requires Debian's systemd")


def configured(root: Path, config: str) -> subprocess.CompletedProcess[str]:
    """The outcome of the installer's second half below `root`, with this configuration."""
    settings = root / "etc" / NAME
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "config.yaml").write_text(config)
    argv = [sys.executable, str(PACKAGING / "install.py"), "configure", "--root", str(root)]
    return subprocess.run(argv, env=environment(), text=True, capture_output=True, timeout=120)


def unit(root: Path, name: str) -> str:
    return (root / "etc/systemd/system" / name).read_text()


@needs_systemd
@pytest.mark.parametrize(("drop_in", "tenths"), [(None, 15), ("gpu", 15), ("local-only", 11)])
def test_the_units_are_valid_and_confined(tmp_path: Path, drop_in: str | None, tenths: int) -> None:
    service = tmp_path / f"{NAME}.service"
    service.write_text(
        (PACKAGING / service.name).read_text().replace("/opt/llama-smart-proxy/bin/llama-smart-proxy", "/bin/true")
    )
    shutil.copy(PACKAGING / f"{NAME}.socket", tmp_path)
    if drop_in is not None:
        (tmp_path / f"{NAME}.service.d").mkdir()
        shutil.copy(PACKAGING / "drop-ins" / f"{drop_in}.conf", tmp_path / f"{NAME}.service.d")
        # `security --offline` reads no drop-ins
        service.write_text(
            service.read_text().replace(
                "[Install]", (PACKAGING / "drop-ins" / f"{drop_in}.conf").read_text() + "\n[Install]"
            )
        )
    if drop_in == "local-only":  # as PrivateDevices= implies
        service.write_text(
            "\n".join(line for line in service.read_text().splitlines() if not line.startswith("DeviceAllow"))
        )
    found = subprocess.run(
        ["systemd-analyze", "verify", service, tmp_path / f"{NAME}.socket"], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    scored = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", f"--threshold={tenths}", service],
        capture_output=True,
        text=True,
    )
    assert scored.returncode == 0, scored.stdout[-300:]


def test_the_drop_ins_follow_from_the_configuration(tmp_path: Path) -> None:
    done = configured(tmp_path, "server: {host: '::', port: 8080}\nserver_pool: {port_start: 9000, port_end: 9009}\n")
    assert done.returncode == 0 and "http://127.0.0.1:8080" in done.stdout
    service, socket = (
        unit(tmp_path, f"{NAME}.service.d/10-config.conf"),
        unit(tmp_path, f"{NAME}.socket.d/10-config.conf"),
    )
    assert "SocketBindAllow=tcp:9000-9009\nSocketBindAllow=tcp:8080\n" in service
    assert socket.endswith("ListenStream=\nListenStream=[::]:8080\n")


def test_what_is_there_is_kept_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    assert configured(tmp_path, "server: {port: 8080}\n").returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = configured(tmp_path, "server: {port: 8080}\n")
    assert "kept" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_invalid_configuration_is_reported_and_nothing_is_started(tmp_path: Path) -> None:
    done = configured(tmp_path, "server: {port: x}\n")
    assert done.returncode == 2 and "server.port" in done.stderr and "nothing has been started" in done.stderr


def test_a_credential_of_the_service_is_known_to_the_installer(tmp_path: Path) -> None:
    settings = tmp_path / "etc" / NAME / "credentials"
    settings.mkdir(parents=True)
    (settings / "VLLM_API_KEY").write_text("canary\n")
    done = configured(tmp_path, "remotes: {vllm: {url: 'http://127.0.0.1:1', api_key: '${VLLM_API_KEY}'}}\n")
    assert done.returncode == 0 and "canary" not in done.stdout + done.stderr


def test_uninstalling_keeps_the_configuration_and_foreign_drop_ins(tmp_path: Path) -> None:
    configured(tmp_path, "server: {port: 8080}\n")
    foreign = tmp_path / "etc/systemd/system" / f"{NAME}.service.d" / "50-mine.conf"
    foreign.write_text("[Service]\nNice=5\n")
    argv = [sys.executable, str(PACKAGING / "install.py"), "uninstall", "--root", str(tmp_path)]
    assert subprocess.run(argv, capture_output=True).returncode == 0
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["50-mine.conf", "config.yaml"]


def test_folders_that_are_hidden_from_the_service_are_bound_and_unreadable_models_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PACKAGING)
    install = importlib.import_module("install")
    home = tmp_path / "home"
    monkeypatch.setattr(install, "HIDDEN", (home,))
    for file in (
        "m/a.gguf",
        "m/b.gguf",
        "blobs/x",
        "hub/models--o--r/snapshots/1/c.gguf",
        "hub/models--o--t/config.json",
    ):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(b"GGUF")
    (home / "m/linked.gguf").symlink_to(home / "blobs/x")
    (home / "m/b.gguf").chmod(0o600)
    home.chmod(0o700)
    models = {name: {"path": str(home / "m" / f"{name}.gguf")} for name in ("a", "b", "linked")}
    config = Config.model_validate({"models": models, "llama_cpp": {"models_dir": str(home / "m")}})
    service, _, warnings = install.drop_ins(config, [home / "hub"])
    bound = [line.partition("=")[2] for line in service.splitlines() if line.startswith("BindReadOnlyPaths=")]
    hub = "/var/lib/llama-smart-proxy/huggingface/hub"
    assert bound == [f"-{home}/blobs", f"-{home}/m", f"-{home}/hub/models--o--r:{hub}/models--o--r"]
    assert warnings == [f"{home}/m/b.gguf: the service cannot read it: chmod o+r {home}/m/b.gguf"]
