"""llama-swap's configuration as ours: what is translated, what is remarked on, what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.cli.importing import import_command
from llama_smart_proxy.proxy.cli.importing.llama_swap import Import
from llama_smart_proxy.proxy.cli.importing.reading import Unreadable, read
from llama_smart_proxy.proxy.cli.importing.servers import joined, split
from llama_smart_proxy.proxy.config import Config, load_config
from llama_smart_proxy.proxy.config.command_line import split_command

FULL = Path(__file__).with_name("llama_swap_full.yaml")
ENV = {"HOME": "/home/x", "KEY_ONE": "k" * 40, "PEER_KEY": "p", "PORT": "9"}


def imported(tmp_path: Path, theirs: object) -> Import:
    file = tmp_path / "theirs.yaml"
    file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return Import(read(file))


def loaded(tmp_path: Path, source: Path, env: dict[str, str] | None = None) -> Config:
    """Ours, written by the command and read by our loader."""
    ours = tmp_path / "config.yaml"
    assert import_command(source, ours) == 0
    return load_config(ours, env=ENV if env is None else env)


def model(tmp_path: Path, **fields: object) -> dict[str, Any]:
    """The entry for one model of these fields."""
    entry: dict[str, Any] = imported(tmp_path, {"models": {"m": fields}}).data["models"]["m"]
    return entry


# -- command lines -----------------------------------------------------------------------------------------------------

LLAMA = {
    "llama-server --port ${PORT} -m a.gguf": {"path": "a.gguf"},
    "llama-server -m a.gguf --host 0.0.0.0 --port=${PORT} -ngl 99 -c 4096 -np 2": {
        "path": "a.gguf", "ctx": 4096, "parallel": 2, "args": "-ngl 99",
    },
    "llama-server --model=a.gguf --ctx-size=0 --port ${PORT} --jinja": {"path": "a.gguf", "ctx": 0, "args": "--jinja"},
    "llama-server -hf org/x-GGUF:Q8_0 --port ${PORT}": {"repo": "org/x-GGUF", "variant": "Q8_0"},
    "llama-server -hfr org/x -hff x-Q4.gguf --port ${PORT}": {"repo": "org/x", "variant": "x-Q4.gguf"},
    "env A=1 'B=x y' llama-server -m a.gguf --port ${PORT}": {"path": "a.gguf", "env": {"A": "1", "B": "x y"}},
    "llama-server -m a.gguf --port ${PORT} --alias x --api_key s": {"path": "a.gguf"},
    "llama-server -m 'a b.gguf' --port ${PORT} --chat-template 'x \"y\" # z' -t 4": {
        "path": "a b.gguf", "args": "--chat-template 'x \"y\" # z'\n-t 4\n",
    },
    "llama-server -m ${env.HOME}/a.gguf --port ${PORT} -c ${env.CTX}": {"path": "${HOME}/a.gguf", "args": "-c ${CTX}"},
}  # fmt: skip
OTHERS = {
    "llama-server --port ${PORT} -mu http://x/a.gguf": ["openai", "anthropic", "native"],
    "llama-server --port ${PORT} --models-dir /m": ["openai", "anthropic", "native"],
    "llama-server --port ${PORT}": ["openai", "anthropic", "native"],
    "python -m vllm.x --port ${PORT} --model a": None,
    "docker run --rm -p ${PORT}:8080 llama-server -m a.gguf": None,
    "wrap llama-server -m a.gguf --port ${PORT}": None,
}


@pytest.mark.parametrize("command", LLAMA)
def test_a_command_of_llama_server_is_a_model_with_weights(tmp_path: Path, command: str) -> None:
    assert model(tmp_path, cmd=command) == LLAMA[command]


@pytest.mark.parametrize("command", OTHERS)
def test_any_other_command_stays_one(tmp_path: Path, command: str) -> None:
    entry = model(tmp_path, cmd=command)
    assert split_command(entry["cmd"]) == split(command)
    assert entry.get("apis") == OTHERS[command] and not {"path", "repo", "args"} & set(entry)


@pytest.mark.parametrize(
    "fields",
    [{"proxy": "http://other:9"}, {"proxy": "http://127.0.0.1:9/v"}, {"cmdStop": "docker stop x"}],
)
def test_llama_server_elsewhere_or_stopped_otherwise_is_a_command(tmp_path: Path, fields: dict[str, str]) -> None:
    entry = model(tmp_path, cmd="llama-server -m a.gguf --port ${PORT}", **fields)
    assert "cmd" in entry and entry.get("url") == fields.get("proxy")


def test_a_folded_command_with_a_comment_means_what_it_means_there(tmp_path: Path) -> None:
    """Where it is no comment: folding makes it part of the one line."""
    text = "models:\n  m:\n    cmd: >\n      serve --port ${PORT}\n      # x\n      --temp 1\n"
    entry = imported(tmp_path, text).data["models"]["m"]
    assert split_command(entry["cmd"]) == ["serve", "--port", "${PORT}", "#", "x", "--temp", "1"]


@pytest.mark.parametrize("stop", ["kill ${PID}", "kill -TERM ${PID}", "/bin/kill -s SIGTERM ${PID}", "kill -15 ${PID}"])
def test_a_stop_command_that_is_the_default_here_is_left_out(tmp_path: Path, stop: str) -> None:
    assert model(tmp_path, cmd="llama-server -m a.gguf --port ${PORT}", cmdStop=stop) == {"path": "a.gguf"}
    assert "cmd_stop" not in model(tmp_path, cmd="serve ${PORT}", cmdStop=stop)


def test_most_models_are_run_by_one_program_and_others_by_commands_of_theirs(tmp_path: Path) -> None:
    commands = {"a": "/new/llama-server", "b": "/new/llama-server", "c": "/old/llama-server-b1", "d": "llama-server"}
    theirs = {name: {"cmd": f"{program} -m {name}.gguf --port ${{PORT}}"} for name, program in commands.items()}
    found = imported(tmp_path, {"models": theirs}).data
    assert found["llama_cpp"] == {"server": "/new/llama-server"}
    assert {name: sorted({"path", "cmd"} & set(entry)) for name, entry in found["models"].items()} == {
        "a": ["path"], "b": ["path"], "c": ["cmd"], "d": ["cmd"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["a"],
        ["a", "b c", "--x", ""],
        ["a", "#b", "--c", "it's", '"q"', "\\", "${A}", "é", "a\nb", "-x y", "*", "~", "|"],
    ],
)
def test_what_is_written_is_split_into_the_same_words(words: list[str]) -> None:
    assert split_command(joined(words)) == words


# -- fields ------------------------------------------------------------------------------------------------------------

SERVE = "serve --port ${PORT}"
FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "A", "description": "B", "unlisted": True}, {"title": "A", "description": "B", "hidden": True}),
    ({"name": "A" * 300}, {"title": "A" * 100}),
    ({"ttl": 60}, {"keep_alive": 60}),
    ({"ttl": 0}, {}),
    ({"ttl": -1}, {}),
    ({"unloadTimeout": 30}, {"stop_timeout_s": 30}),
    ({"concurrencyLimit": 3}, {"concurrent": 3}),
    ({"env": ["A=1", "B=x=y", "C="]}, {"env": {"A": "1", "B": "x=y", "C": ""}}),
    ({"useModelName": "org/x"}, {"served_name": "org/x"}),
    ({"checkEndpoint": "none"}, {"check_endpoint": "none"}),
    ({"checkEndpoint": "ready"}, {"check_endpoint": "/ready"}),
    ({"checkEndpoint": "/health"}, {}),
    ({"proxy": "http://localhost:${PORT}"}, {}),
    ({"proxy": "http://localhost:${PORT}/v"}, {"url": "http://localhost:${PORT}/v"}),
    ({"cmdStop": "docker stop ${MODEL_ID} --pid ${PID}"}, {"cmd_stop": "docker stop m\n--pid ${PID}\n"}),
    ({"aliases": ["a", "b"]}, {"aliases": ["a", "b"]}),
    ({"aliases": ["a b", "m", "M"]}, {}),
    ({"filters": {"stripParams": "a, model,b ,a,"}}, {"filters": {"strip": ["a", "b"]}}),
    ({"filters": {"strip_params": "a"}}, {"filters": {"strip": ["a"]}}),
    (
        {"filters": {"setParams": {"a": {"b": [1]}, "model": "x", "stream": True}}},
        {"filters": {"set": {"a": {"b": [1]}}}},
    ),
    ({"filters": {"setParamsByID": {"${MODEL_ID}": {"a": 1}}}}, {"filters": {"set": {"a": 1}}}),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_a_field_of_a_model_is_translated(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    entry = model(tmp_path, cmd=SERVE, **fields)
    assert entry.pop("cmd") == split_command(SERVE)[0] + "\n--port ${PORT}\n"
    assert entry == expected


@pytest.mark.parametrize("command", ["serve --port 9001 -x", "serve --listen-port=9001", "serve -x --listen_port 9001"])
def test_a_fixed_port_is_where_the_server_is(tmp_path: Path, command: str) -> None:
    assert model(tmp_path, cmd=command)["url"] == "http://127.0.0.1:9001"


@pytest.mark.parametrize("fields", [{"cmd": "serve"}, {"cmd": ""}, {"proxy": "http://h:1"}])
def test_a_model_that_cannot_be_started_or_reached_is_left_out_and_listed(
    tmp_path: Path, fields: dict[str, str]
) -> None:
    found = imported(tmp_path, {"models": {"m": fields, "other": {"cmd": SERVE}}})
    assert list(found.data["models"]) == ["other"]
    assert [note.where for note in found.notes if "left out" in note.text] == ["models.m"]


def test_variants_by_name_are_virtual_models(tmp_path: Path) -> None:
    by_name = {"m": {"t": 1, "u": 2}, "m:hot": {"t": 2}, "also": {"t": 3}}
    theirs = {"cmd": SERVE, "aliases": ["also", "other"], "unlisted": True, "filters": {"setParamsByID": by_name}}
    found = imported(tmp_path, {"models": {"m": theirs}})
    assert found.data["models"]["m"]["aliases"] == ["other"]
    assert {name: entry for name, entry in found.data["models"].items() if name != "m"} == {
        "m:hot": {"model": "m", "filters": {"set": {"t": 2}}, "hidden": True},
        "also": {"model": "m", "filters": {"set": {"t": 3}}, "hidden": True},
    }
    assert any("for its variants too" in note.text for note in found.notes), "of u"


def test_names_that_are_impossible_here_are_replaced(tmp_path: Path) -> None:
    names = ["my model", "Same", "same", "/x..y", "a(b)"]
    found = imported(tmp_path, {"models": {name: {"cmd": SERVE} for name in names}})
    assert list(found.data["models"]) == ["my-model", "Same", "same-2", "x.y", "a-b-"]
    renamed = ["models.my model", "models.same", "models./x..y", "models.a(b)"]
    assert [note.where for note in found.notes if "is called" in note.text] == renamed


def test_macros_are_expanded_with_their_types_and_a_models_own_come_first(tmp_path: Path) -> None:
    text = """
        macros:
          bin: |
            # a comment
            serve --port ${PORT}
          both: "${bin} --t ${t}"
          t: 0.5
          on: true
        models:
          m:
            macros: {t: 1}
            # the next one is no macro
            cmd: "${both} --home ${env.HOME} --env-port ${env.PORT} --raw ${x:-y}"
            filters: {setParams: {t: "${t}", text: "t=${t}", on: "${on}"}}
    """
    entry = imported(tmp_path, text).data["models"]["m"]
    assert split(entry["cmd"]) == [
        *("serve", "--port", "${PORT}", "--t", "1", "--home", "${HOME}", "--env-port", "${PORT:-}", "--raw", "$${x:-y}")
    ]
    assert entry["filters"]["set"] == {"t": 1, "text": "t=1", "on": True}


TOP: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"healthCheckTimeout": 500}, {"server_pool": {"load_timeout_s": 500}}),
    ({"healthCheckTimeout": 3}, {"server_pool": {"load_timeout_s": 15}}),
    ({"globalTTL": 60}, {"server_pool": {"keep_alive": 60}}),
    ({"unloadTimeout": 20, "startPort": 9000}, {"server_pool": {"stop_timeout_s": 20, "port_start": 9000}}),
    ({"logLevel": "warn"}, {"log_level": "warning"}),
    ({"sendLoadingState": True}, {"server": {"loading_status": "reasoning"}}),
    ({"apiKeys": ["${env.KEY_ONE}", "b"]}, {"server": {"api_keys": ["${KEY_ONE}", "b"]}}),
    ({"groups": {"g": {"swap": False, "members": ["m"]}}}, {}),
    ({"logTimeFormat": "rfc3339", "macros": {"a": 1}}, {}),
    (
        {"selectors": {"s": {"strategy": "pin", "targets": ["m"], "name": "S"}}},
        {"models": {"s": {"model": "m", "title": "S"}}},
    ),
    ({"selectors": {"s": {"strategy": "warm", "targets": ["m"]}}}, {}),
    (
        {"peers": {"p": {"proxy": "https://h/api/", "models": ["x", "M"], "apiKey": "${env.PEER_KEY}"}}},
        {"remotes": {"p": {"url": "https://h/api/v1", "api_key": "${PEER_KEY}", "models": ["x"]}}},
    ),
    (
        {"peers": {"p": {"proxy": "http://h/v1", "models": ["x"]}}},
        {"remotes": {"p": {"url": "http://h/v1", "models": ["x"]}}},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), TOP)
def test_a_field_of_the_file_is_translated(
    tmp_path: Path, fields: dict[str, Any], expected: dict[str, dict[str, Any]]
) -> None:
    found = imported(tmp_path, {"models": {"m": {"cmd": SERVE}}, **fields}).data
    pool = {"keep_alive": -1, "size": 1, **expected.get("server_pool", {})}
    assert found.pop("server_pool") == pool
    assert found["models"].pop("m") is not None
    assert {key: value for key, value in found.items() if value} == {
        key: value for key, value in expected.items() if key != "server_pool"
    }


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_import_of_everything_loads_and_lists_what_has_no_equivalent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loaded(tmp_path, FULL)
    assert set(config.models) == {"big", "docked", "vllm-model", "embed"} and set(config.virtual) == {
        "big:think",
        "coder",
    }
    assert {name: config.backend_of(name) for name in config.models} == {
        "big": "llama.cpp", "embed": "llama.cpp", "docked": "command", "vllm-model": "command",
    }  # fmt: skip
    assert (config.models["big"].preload, config.server_pool.size, config.llama_cpp.server) == (
        True,
        2,
        "/opt/llama-server",
    )
    assert config.remotes["cloud"].api_key is not None and config.remotes["cloud"].api_key.get_secret_value() == "p"
    assert [key.is_short for key in config.server.api_keys] == [False]
    printed = capsys.readouterr()
    ours = (tmp_path / "config.yaml").read_text()
    assert printed.out == "" and ENV["KEY_ONE"] not in ours and "${KEY_ONE}" in ours
    expected = [
        "profiles",
        "selectors.mixed",
        "routing.scheduler",
        "models.big.metadata",
        "models.big.capabilities",
        "store",
    ]
    commented = ours.replace("\n# ", " ").replace("\n  # ", " ")
    for where in expected:
        [line] = [line for line in printed.err.splitlines() if line.startswith(f"{where}: ")]
        assert line in commented.replace("  ", " ")
    assert "4 models" not in printed.err and f"{FULL}: 6 models, 1 remotes; " in printed.err
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600, "it may contain keys"


def test_it_is_printed_without_an_output_and_a_file_is_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_command(FULL, None) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Imported from llama_swap_full.yaml")
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    assert import_command(FULL, target) == 1
    assert "exists already" in capsys.readouterr().err and target.read_text() == "mine"
    assert import_command(FULL, tmp_path / "none" / "x.yaml") == 1
    assert "cannot be written: No such file" in capsys.readouterr().err


BAD = {
    "": "is no configuration of llama-swap",
    "[1]": "is no configuration of llama-swap",
    "server: {port: 1}": "is no configuration of llama-swap",
    "models: {m: {cmd: 'a": "line 1, column",
    "models: [a]": "models: must be a mapping of names to models",
    "models: {m: 5}": "models.m: must be a mapping of fields to values",
    "models: {m: {cmd: [a]}}": "models.m.cmd: must be a text",
    "models: {m: {cmd: 'a \"b ${PORT}'}}": "models.m.cmd: No closing quotation",
    "models: {m: {cmd: 'a ${x}'}}": "models.m.cmd: unknown macro ${x}",
    "macros: {x: '${x}'}\nmodels: {m: {cmd: 'a ${x}'}}": "the macro x contains itself",
    "macros: {x: [1]}\nmodels: {}": "macros.x: must be a text, a number or a boolean",
    "models: {m: {cmd: 'a ${PORT}', ttl: soon}}": "models.m.ttl: must be an integer of at least -1",
    "models: {m: {cmd: 'a ${PORT}', aliases: x}}": "models.m.aliases: must be a list of texts",
    "models: {m: {cmd: a}, m: {cmd: b}}": "models.m: given twice",
    "peers: {p: {models: [a]}}": "peers.p.proxy: must be an http:// or https:// URL",
    "startPort: no\nmodels: {}": "startPort: must be an integer of at least 1",
}


@pytest.mark.parametrize("text", BAD)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Unreadable) as failed:
        imported(tmp_path, text)
    assert any(BAD[text] in problem for problem in failed.value.problems), failed.value.problems
    assert import_command(tmp_path / "theirs.yaml", tmp_path / "ours.yaml") == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/theirs.yaml: ") and not (tmp_path / "ours.yaml").exists()


def test_a_file_that_is_absent_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("absent", "No such file"), ("theirs.yaml", "not UTF-8")):
        with pytest.raises(Unreadable, match=reason):
            read(tmp_path / name)
