"""The command line, run as a user runs it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.cli.main import main
from llama_smart_proxy.proxy.cli.parsers import COMMANDS, CONFIG_FILES
from tests.support import raw_client
from tests.support.harness import ROOT, environment, free_port, running_proxy

TIMEOUT_S = 200.0
INSTALLED = Path(sys.executable).with_name("llama-smart-proxy")


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return socket.has_dualstack_ipv6()


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6")


def run(
    *words: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, program: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`python -m proxy` (or `program`) with these words, to its end."""
    argv = [*(program or (sys.executable, "-m", "llama_smart_proxy")), *words]
    return subprocess.run(argv, cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=TIMEOUT_S)


def wrong_file(folder: Path) -> Path:
    file = folder / "wrong.yaml"
    file.write_text(
        "server: {port: many}\nmodels: {m: {pathh: x.gguf}, n: {path: a, package: b, file: c}}\nnonsense: 1\n"
    )
    return file


ODD = "\x1b[2Jx\x9b31m\u202ey\x07\r"


def test_what_a_file_or_a_server_has_written_cannot_command_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31m.json"
    file.write_text(json.dumps({ODD: 1, "models": {ODD: {"path": ODD}}, "agents_dirs": [ODD], "agents": [ODD]}))
    for words in (("check",), ("pull", ODD), ("pull", f"hf.co/org/repo:x{ODD}"), ("simulate",), ("serve",)):
        done = run(*words, "--config", str(file))
        assert done.returncode and done.stderr
        for line in (done.stdout + done.stderr).replace("\t", "").split("\n"):
            assert line.isprintable(), (words, line)


# -- version, help, mistakes -------------------------------------------------------------------------------------------


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"llama-smart-proxy {__version__}")


@pytest.mark.skipif(not INSTALLED.exists(), reason="the package is not installed")
def test_the_installed_command_is_the_same_program() -> None:
    done = run("--version", program=(str(INSTALLED),))
    assert done.stdout.strip() == f"llama-smart-proxy {__version__}"


def test_help_names_the_commands_and_their_flags() -> None:
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("serve", "check", "schema", "simulate"))
    assert run("help").stdout == done.stdout
    done = run("serve", "--help")
    assert run("help", "serve").stdout == done.stdout
    assert all(flag in done.stdout for flag in ("--config", "--host", "--port", "--log-level"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", command]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: llama-smart-proxy {command} ")
    assert "".join(COMMANDS[command].split()) in "".join(text.split())


@pytest.mark.parametrize(
    "words", [["--nonsense"], ["serve", "--nonsense"], ["fly"], ["--port", "many"], ["help", "fly"], ["pull"]]
)
def test_a_wrong_command_line_is_status_2_and_a_line_that_says_why(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert words[-1] in done.stderr and "usage: llama-smart-proxy" in done.stderr
    assert "Traceback" not in done.stderr


# -- check and schema --------------------------------------------------------------------------------------------------


def test_check_passes_the_shipped_configuration() -> None:
    done = run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "OK: config.yaml (2 models, 0 remotes)\n"


def test_check_reports_every_problem_as_file_path_problem(tmp_path: Path) -> None:
    file = wrong_file(tmp_path)
    done = run("check", "--config", str(file))
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith(f"{file}: ") and line.count(": ") >= 2 for line in lines)
    places = [line.split(": ")[1] for line in lines]
    assert sorted(places) == ["models.m", "models.m.pathh", "models.n", "nonsense", "server.port"]


def test_an_imported_file_passes_the_check(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "config.yaml"
    theirs.write_text(f"models: {{m: {{cmd: '{sys.executable} -m x --port ${{PORT}}', unlisted: true}}}}")
    done = run("import", "llama-swap", str(theirs), "-o", str(ours))
    assert (done.returncode, done.stdout) == (0, "") and f"{theirs}: 1 models" in done.stderr
    assert run("check", "--config", str(ours)).stdout == f"OK: {ours} (1 model, 0 remotes)\n"


def test_serve_refuses_a_wrong_file_with_the_same_lines(tmp_path: Path) -> None:
    file = wrong_file(tmp_path)
    served, checked = run("serve", "--config", str(file)), run("check", "--config", str(file))
    assert served.returncode == 2 and served.stderr == checked.stderr


@pytest.mark.parametrize("command", ["serve", "check", "simulate"])
def test_a_missing_file_is_told_by_name(tmp_path: Path, command: str) -> None:
    done = run(command, "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    file = tmp_path / "none.yaml"
    assert done.stderr == f"{file}: does not exist; `llama-smart-proxy init --config {file}` writes one\n"


def test_check_without_any_file_checks_the_defaults(tmp_path: Path) -> None:
    done = run("check", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "OK: defaults (0 models, 0 remotes)\n"


@pytest.mark.parametrize("command", ["check", "serve"])
def test_what_the_machine_does_not_have_is_reported(tmp_path: Path, command: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("llama_cpp: {server: ./bin/llama-server, models_dir: ./models}\n")
    done = run(command, "--config", str(file))
    lines = [line for line in done.stderr.splitlines() if "INFO" not in line]  # serve logs which file it uses
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(": ")[:2] for line in lines] == [
        [str(file), "llama_cpp.server"],
        [str(file), "llama_cpp.models_dir"],
    ]
    assert str(tmp_path / "bin/llama-server") in lines[0] and str(tmp_path / "models") in lines[1]


@pytest.mark.parametrize(
    "flag",
    [
        "--api_key",
        *(pytest.param(flag, marks=pytest.mark.full) for flag in ("--api-key", "--api_key=x", "--api_key_file")),
    ],
)
@pytest.mark.parametrize("where", ["llama_cpp.args", "models.m.args"])
def test_check_refuses_a_flag_of_ours_in_either_spelling(tmp_path: Path, flag: str, where: str) -> None:
    args = f"args: ['{flag}', x]"
    file = tmp_path / "config.yaml"
    file.write_text(f"llama_cpp: {{{args}}}" if where == "llama_cpp.args" else f"models: {{m: {{path: x, {args}}}}}")
    done = run("check", "--config", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{file}: {where}: must not contain {flag.partition('=')[0]}: ")
    assert "secret" not in done.stderr


def test_a_wrong_variable_is_told_by_its_own_name(tmp_path: Path) -> None:
    done = run("check", env={"LSP_SERVER__PORT": "many", "LSP_SERVER__NONSENSE": "1"})
    assert done.returncode == 2
    assert "LSP_SERVER__PORT" in done.stderr and "LSP_SERVER__NONSENSE" in done.stderr
    assert "Traceback" not in done.stderr


def test_schema_is_the_json_schema_of_the_file() -> None:
    done = run("schema")
    schema = json.loads(done.stdout)
    assert done.returncode == 0 and schema["$schema"].startswith("https://json-schema.org/")
    assert {"server", "server_pool", "llama_cpp", "models", "remotes"} <= schema["properties"].keys()


# -- serving -----------------------------------------------------------------------------------------------------------


def test_serve_is_the_default_command_and_reads_config_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"server: {{port: {free_port()}}}\nmodels: {{here: {{path: x.gguf}}}}\n")
    argv = [sys.executable, "-m", "llama_smart_proxy"]
    with subprocess.Popen(argv, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            first, second = process.stderr.readline(), process.stderr.readline()
            assert first.endswith(f"configuration: {tmp_path / 'config.yaml'}\n")
            port = int(second.rpartition(":")[2])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=TIMEOUT_S) as answer:
                assert [item["id"] for item in json.load(answer)["data"]] == ["here"]
        finally:
            process.terminate()
        assert process.wait(TIMEOUT_S) == 0


def test_a_start_without_a_file_tells_how_to_make_one_and_that_way_works(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:  # so that it ends at once
        words = ["serve", "--port", str(owner.getsockname()[1])]
        assert "`llama-smart-proxy init` writes config.yaml, --config FILE" in run(*words, cwd=tmp_path).stderr
        done = run("init", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("config.yaml: written")
        assert f"configuration: {tmp_path / 'config.yaml'}\n" in run(*words, cwd=tmp_path).stderr


def test_init_writes_the_shipped_file_and_keeps_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    assert main(["init", "--config", str(file)]) == 0
    assert file.read_text() == (ROOT / "config.yaml").read_text()
    file.write_text("mine")
    capsys.readouterr()
    for place, problem in (
        (file, "exists already, and is kept"),
        (tmp_path / "no" / "x.yaml", "cannot be written: No"),
        (tmp_path / "x.json", "the file with examples is YAML: "),
    ):
        assert main(["init", "--config", str(place)]) == 1
        assert capsys.readouterr().err.startswith(f"{place}: {problem}")
    assert file.read_text() == "mine"


def test_of_several_files_one_is_used_and_the_log_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in reversed(CONFIG_FILES):
        Path(name).write_text('{"models": {"m": {"pathh": "x"}}}')
        assert main(["check"]) == 2
        assert capsys.readouterr().err.startswith(f"{name}: models.m.pathh: unknown field")
    with socket.create_server(("127.0.0.1", 0)) as owner:
        Path(CONFIG_FILES[0]).write_text(f"server: {{port: {owner.getsockname()[1]}}}")
        said = run("serve", cwd=tmp_path).stderr
    assert "not in use, as config.yaml is: config.yml, config.json\n" in said


async def test_flags_beat_variables_and_variables_beat_the_file() -> None:
    file, variable, flag = free_port(), free_port(), free_port()
    async with running_proxy({"server": {"port": file}}) as proxy:
        assert proxy.port == file
    async with running_proxy({"server": {"port": file}}, env={"LSP_SERVER__PORT": str(variable)}) as proxy:
        assert proxy.port == variable
    env = {
        "LSP_SERVER__PORT": str(variable),
        "LSP_SERVER__HOST": "0.0.0.0",
        "LSP_SERVER__ALLOW_UNAUTHENTICATED": "true",
    }
    async with running_proxy({"server": {"port": file}}, env=env, args=["--port", str(flag)]) as proxy:
        assert (proxy.host, proxy.port) == ("0.0.0.0", flag)
    async with running_proxy({"log_level": "info"}, args=["--host", "127.0.0.1", "--log-level", "info"]) as proxy:
        assert proxy.host == "127.0.0.1" and (await raw_client.get(proxy.port, "/health")).status == 200


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "[::]", "0::0"])
async def test_every_interface_is_both_families_and_a_url_in_the_log(host: str) -> None:
    async with running_proxy({"server": {"allow_unauthenticated": True}}, args=["--host", host]) as proxy:
        assert proxy.host == "[::]"
        for address in ("127.0.0.1", "[::1]"):
            url = f"http://{address}:{proxy.port}/health"
            assert (await asyncio.to_thread(urllib.request.urlopen, url, timeout=TIMEOUT_S)).status == 200


def test_an_address_that_others_can_reach_without_a_key_is_status_78(tmp_path: Path) -> None:
    done = run("serve", "--host", "0.0.0.0", "--port", str(free_port()), cwd=tmp_path)
    assert done.returncode == 78 and "listening on" not in done.stderr
    for setting in ("server.api_keys", "llama-smart-proxy key new", "server.allow_unauthenticated: true"):
        assert setting in done.stderr
    checked = run("check", cwd=tmp_path, env={"LSP_SERVER__HOST": "0.0.0.0"})
    assert checked.returncode == 2 and "server.host: will not listen on 0.0.0.0 without auth" in checked.stderr


async def test_every_address_is_listened_on_if_a_key_is_required() -> None:
    async with running_proxy({"server": {"host": "0.0.0.0", "api_keys": ["0123456789abcdef"]}}) as proxy:
        assert proxy.host == "0.0.0.0" and (await raw_client.get(proxy.port, "/v1/models")).status == 401


def test_a_variable_may_name_the_file(tmp_path: Path) -> None:
    file = wrong_file(tmp_path)
    done = run("check", env={"LSP_CONFIG": str(file)})
    assert done.returncode == 2 and done.stderr.startswith(f"{file}: ")


def test_a_port_in_use_is_status_1_and_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
        done = run("serve", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}: " in done.stderr and "in use" in done.stderr
    assert "--port, PORT= of make run, or server.port selects another port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_not_ours_is_status_1_and_one_clear_line(tmp_path: Path) -> None:
    env = {"LSP_SERVER__ALLOW_UNAUTHENTICATED": "true"}
    done = run("serve", "--host", "192.0.2.1", "--port", str(free_port()), cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "cannot listen on 192.0.2.1" in done.stderr and "Traceback" not in done.stderr
    assert "--host, HOST= of make run, or server.host selects another address" in done.stderr
