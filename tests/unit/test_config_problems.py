"""What is refused, in which words, and that all of it is said at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.config import load_config
from llama_smart_proxy.proxy.config.text import parse
from llama_smart_proxy.proxy.errors import ConfigError
from tests.support.config_files import load, model, problems
from tests.support.laws import law

MANY_PROBLEMS = """
        sever: {port: 1}
        server: {port: 1, prot: 1, max_body_mib: 0, port: 2}
        server_pool: {keep_alive: soon, size: 0, port_start: 65530}
        backend: vllm
        models:
          a: {path: a.gguf, repo: b/c, ctx: -1}
          b: {path: b.gguf, aliases: [A], args: [--port, "1"], pined: true}
          "b c": {path: b.gguf}
          d: {variant: Q4}
          e: 5
        remotes: {r: {url: "ftp://x"}, s: {api_key: k}}
        agents: [5]
        log_level: "${LEVEL}"
    """
THEIR_REPORT = [
    "server.port: given twice (lines 3 and 3)",
    "sever: unknown field; did you mean server?",
    "server.max_body_mib: should be greater than or equal to 1",
    "server.prot: unknown field; did you mean port?",
    "server_pool.keep_alive: not a time",
    "server_pool.size: should be greater than or equal to 1",
    "backend: should be 'llama.cpp' or 'ollama'",
    "models.a: has more than one source (path, repo); keep one",
    "models.a.ctx: should be greater than or equal to 0",
    "models.b.aliases: the alias A is also the name of the model a",
    "models.b.args: must not contain --port: set server_pool.port_start and port_end instead",
    "models.b.pined: unknown field; did you mean pinned?",
    "models.b c: a name is 1 to 255",
    "models.d: variant requires repo",
    "models.e: should be a mapping of fields to values",
    "remotes.r.url: must be an http:// or https:// URL with a host",
    "remotes.s.url: is required",
    "agents.0: should be a mapping of fields to values",
    "log_level: the environment variable LEVEL is not set",
]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, MANY_PROBLEMS, {"LSP_SERVER__HSOT": "x"})
    expected = [f"config.yaml: {line}" for line in THEIR_REPORT]
    expected.append("environment: LSP_SERVER__HSOT: unknown field; did you mean host?")
    assert [line for line in expected if not any(problem.startswith(line) for problem in found)] == []
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (model(), "models.m: has no source; give one of: path, package and file, repo (and variant)"),
        (model(path="a", package="p", file="f"), "models.m: has more than one source (path, package); keep one"),
        (model(package="p"), "models.m: package requires file, the name of the GGUF in it"),
        (model(path="a", file="f"), "models.m: file requires package, the installed package that contains it"),
        (model(backend="ollama", path="a"), "models.m: a model of backend ollama has no path"),
        (model(path="a", args=["--api-key=x"]), "models.m.args: must not contain --api-key: the proxy gives"),
        (model(path="a", args=["-m", "x"]), "models.m.args: must not contain -m: use path instead"),
        (model(path="a", args=["--alias", "x"]), "models.m.args: must not contain --alias: use the model's name and"),
        ("llama_cpp: {args: [--host, h]}", "llama_cpp.args: must not contain --host: set server_pool.host instead"),
        ("llama_cpp: {models: {m: {}}}", "llama_cpp.models.m: has no source"),
        (
            "models: {m: {path: a}}\nllama_cpp: {models: {m: {path: a}}}",
            "models.m: is also given as llama_cpp.models.m",
        ),
        ("models: {m: {path: a}, M: {path: a}}", "models.M: differs only in case from the model m"),
        ("models: {m: {path: a, aliases: [x, X]}}", "models.m.aliases: the alias X is also an alias of the model m"),
        ("models: {m: {path: a, aliases: [1.10]}}", "models.m.aliases.0: reads as a number or a boolean; put it in"),
        (
            "models: {m: {path: a, aliases: [x]}}\nremotes: {r: {url: http://h, models: [X]}}",
            "models.m.aliases: the alias x is also a model of the remote r",
        ),
        (
            "models: {m: {path: a}}\nremotes: {r: {url: http://h, models: [m]}}",
            "models.m: is also a model of the remote",
        ),
        ("server_pool: {size: 5, port_end: 11602}", "server_pool: 3 ports (11600-11602) are too few for 5 processes"),
        ("server_pool: {port_end: 80}", "server_pool.port_end: is less than port_start (11600)"),
        ("server_pool: {host: 0.0.0.0}", "server_pool.host: must be a loopback address"),
        ("server_pool: {queue_timeout_s: -1}", "server_pool.queue_timeout_s: must not be negative"),
        ("server_pool: {load_timeout_s: 0}", "server_pool.load_timeout_s: should be greater than 0"),
        (
            "server_pool: {size: 1}\nmodels: {a: {path: a, pinned: true}, b: {path: b}}",
            "server_pool.size: 1 pinned models take all 1 processes and leave no room for the models that are not",
        ),
        (
            "server_pool: {size: 1}\nmodels: {a: {path: a, pinned: true}, b: {path: b, pinned: true}}",
            "server_pool.size: 2 pinned models take all 1 processes",
        ),
        ("remotes: {r: {url: http://u:secret@h}}", "remotes.r.url: must not contain a user name or password"),
        ("remotes: {r: {url: http://h, api_key: 12}}", "remotes.r.api_key: reads as a number or a boolean; put it in"),
        ("remotes: {r: {url: 'http://h/v1/chat/completions'}}", "remotes.r.url: must be the base URL, without /chat/c"),
        ("remotes: {r: {url: 'http://[x'}}", "remotes.r.url: is not a valid URL"),
        ("remotes: {r: {url: 'http://h?a'}}", "remotes.r.url: must not contain '?', '#' or white space"),
        ("ollama: {host: 'ftp://h'}", "ollama.host.0: must be an http:// or https:// URL with a host"),
        ("ollama: {host: [h, 'http://u:p@h']}", "ollama.host.1: must not contain a user name or password"),
        ("ollama: {host: ' , '}", "ollama.host: List should have at least 1 item"),
        ("ollama: {pull: always}", "ollama.pull: should be 'auto' or 'never'"),
        ("models: {m: {backend: ollama, ctx: 0}}", "models.m: ctx 0 has no meaning for Ollama"),
        ("models: {m: {backend: ollama, path: a}}", "models.m: a model of backend ollama has no path"),
        (
            "llama_cpp: {env_passthrough: [A B]}",
            "llama_cpp.env_passthrough.0: must be the name of a variable",
        ),
        (
            "llama_cpp: {env_passthrough: [LLAMA_API_KEY]}",
            "llama_cpp.env_passthrough.0: is set or kept back by the proxy",
        ),
        ("env_passthrough: [A, 'LSP_*']", "env_passthrough.1: is set or kept back by the proxy itself"),
        ("models: {m: {path: a, env: {'A=B': c}}}", "models.m.env.A=B: a variable has a name, without '='"),
        ("models: {m: {path: a, env: {'': c}}}", "models.m.env.: a variable has a name, without '='"),
        ('models: {m: {path: a, env: {A: "\\0"}}}', "models.m.env.A: must not contain a NUL character"),
        ("models: {m: {path: a, env: {A: [1]}}}", "models.m.env.A: should be a valid string"),
        ("agents: [{rag: {}, opt: {}}]", "agents.0.name: is required"),
        ("agents: [{name: rag, optoins: {}}]", "agents.0.optoins: unknown field; did you mean options?"),
        ("- a", "must be a mapping of fields to values"),
        ("server:\n  port: [1\nx: 2", "line 3, column 2: expected ',' or ']', but got ':'"),
        (
            "server: {port: ${PORT}}",
            "line 1, column 17: expected ',' or '}', but got '{'; put a text with ${...} in quotes",
        ),
        ("server: {port: !env PORT}", "server.port: the tag !env has no meaning here"),
        ("? [a]\n: 1", "line 1: a key must be text"),
        ("a: \x01", "line 1: a character that YAML does not allow"),
        ("a: &a [*a]", "is nested too deeply"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
    ],
)
def test_a_problem_says_where_and_what(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text)[0].startswith(f"config.yaml: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"server": {"port": 1,\n // why\n "port": 2}}', "server.port: given twice"),
        ('{\n"a": 1 /* x\n y */\n"b": 2}', "line 4, column 1: Expecting ',' delimiter"),
        ('{"a": NaN}', "NaN is not a JSON value"),
        ("[" * 100_000, "is nested too deeply"),
        ("server: 1", "line 1, column 1: Expecting value"),
    ],
)
def test_a_problem_in_json_says_where_and_what(tmp_path: Path, text: str, problem: str) -> None:
    assert problems(tmp_path, text, name="config.json") == [f"config.json: {problem}"]


@pytest.mark.parametrize("name", ["a b", "../a", "a/../b", "/a", "", "a" * 256, "ä", "a\n", "a?b"])
def test_a_name_is_safe_in_a_url_and_a_command_line(tmp_path: Path, name: str) -> None:
    assert "a name " in problems(tmp_path, json.dumps({"models": {name: {"path": "a"}}}))[0]


@pytest.mark.parametrize("name", ["smollm2:135m", "org/name-GGUF:Q4_K_M", "a.b_c+d@e", "3.10", "on", "1e5"])
def test_names_of_the_wild_are_kept_to_the_letter(tmp_path: Path, name: str) -> None:
    assert list(load(tmp_path, f"models:\n  {name}: {{path: a}}").models) == [name]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, env={"LSP_MODELS__M__CTX": "1"})
    assert re.fullmatch(rf"{path}: (is not UTF-8 text|does not exist).*", str(caught.value))


def test_secrets_are_never_echoed(tmp_path: Path) -> None:
    text = "remotes: {r: {url: '${KEY}', api_key: [x], models: 5}}\nserver: {port: '${KEY}', host: ['${KEY}']}"
    assert "canary" not in "".join(problems(tmp_path, text, {"KEY": "canary-1", "LSP_LOG_LEVEL": "canary-2"}))
    config = load(tmp_path, "remotes: {r: {url: http://h, api_key: canary-3}}")
    assert "canary" not in repr(config) + config.model_dump_json()


def test_a_merge_key_is_not_a_duplicate(tmp_path: Path) -> None:
    config = load(tmp_path, "models:\n  a: &a {path: a, ctx: 1}\n  b: {<<: *a, ctx: 2}")
    assert (config.models["b"].path, config.models["b"].ctx) == (config.models["a"].path, 2)


WITHOUT_EFFECT: dict[str, Any] = {
    "args": ["-ngl", "1"],
    "env": {"A": "b"},
    "parallel": 2,
    "keep_alive": "10m",
    "preload": True,
    "pinned": True,
}


def test_every_setting_that_ollama_would_not_get_is_a_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, model(backend="ollama", aliases=["x"], ctx=1024, **WITHOUT_EFFECT)) == [
        f"config.yaml: models.m.{field}: has no effect on a model of backend ollama; leave it out"
        for field in WITHOUT_EFFECT
    ]


def test_settings_at_their_defaults_and_those_of_llama_cpp_are_none(tmp_path: Path) -> None:
    load(tmp_path, model(backend="ollama", preload=False, args=[], keep_alive=None))
    load(tmp_path, model(path="a.gguf", **WITHOUT_EFFECT))


@law(1000)
@given(st.text(alphabet="{}[]:,-#&*!|>'\"%@`?$ \nab1/\\", max_size=60))
def test_no_text_makes_the_reader_raise(text: str) -> None:
    parsed = parse(text)
    assert parsed.problems or parsed.data is None or isinstance(parsed.data, dict | list | str | int | float | bool)


@law(400)
@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip  # noqa: E501
def test_json_reads_back_with_comments_and_trailing_commas(value: object) -> None:
    text = re.sub(r"\n(?=\s*[\]}])", ", // }\n/* , ] */", json.dumps(value, indent=1))
    assert parse(text, json_only=True).data == value


def test_cards_are_for_every_model_and_for_all_of_a_remote(tmp_path: Path) -> None:
    card = {"description": "a, b", "suggestions": "Why, please?", "hidden": False}
    models = {"m": {"path": "a", "title": "M", **card}, "v": {"model": "m", "title": "V", **card}}
    models["o"] = {"backend": "ollama", **card}
    config = load(tmp_path, json.dumps({"models": models, "remotes": {"r": {"url": "http://h", **card}}}))
    for entry in (config.models["m"], config.virtual["v"], config.models["o"], config.remotes["r"]):
        assert (entry.description, entry.suggestions, entry.hidden) == ("a, b", ["Why, please?"], False)
    assert load(tmp_path, "models: {m: {path: a}}").models["m"].hidden is None
    [problem] = problems(tmp_path, '{"remotes": {"r": {"url": "http://h", "title": "T"}}}')
    assert problem.startswith("config.yaml: remotes.r.title: unknown field")


COMMAND_PROBLEMS = {
    "cmd: serve": "cmd must have its server listen at ${PORT}, or url must say where it listens",
    "cmd: 'serve ${PORT} \"'": "cmd: has a quote that is not closed",
    "cmd: 'serve ${PORT}', path: m.gguf": "has more than one source (cmd, path); keep one",
    "cmd: 'serve ${PORT} ${PID}'": "${PID} has a value in cmd_stop only",
    "cmd: 'serve ${PORT} ${ABSENT}'": "cmd: the environment variable ABSENT is not set",
    "cmd: 'serve ${PORT}', args: [--jinja]": "args: has no effect on a model with cmd; leave it out",
    "cmd: 'serve ${PORT}', ctx: 4": "ctx: has no effect on a model with cmd; leave it out",
    "cmd: 'serve ${PORT}', parallel: 4": "parallel: has no effect on a model with cmd; leave it out",
    "cmd: 'serve ${PORT}', backend: ollama": "backend: has no effect on a model with cmd; leave it out",
    "cmd: 'serve ${PORT}', url: 'ftp://h'": "url: must be an http:// or https:// URL with a host",
    "cmd: 'serve ${PORT}', check_endpoint: health": "check_endpoint: must be a path such as /health, or none",
    "cmd: 'serve ${PORT}', apis: [ollama]": "apis.0: should be 'openai', 'responses', 'anthropic' or 'native'",
    "cmd: 'serve ${PORT}', concurrent: 0": "concurrent: should be greater than or equal to 1",
    "cmd: 'serve ${PORT}', load_timeout_s: 0": "load_timeout_s: should be greater than 0",
    "path: m.gguf, cmd_stop: stop": "cmd_stop: has no effect on a model without cmd; leave it out",
    "path: m.gguf, url: 'http://h'": "url: has no effect on a model without cmd; leave it out",
    "backend: ollama, concurrent: 1": "concurrent: has no effect on a model of backend ollama; leave it out",
    "path: m.gguf, env: {A: '${PORT}'}": "env.A: the environment variable PORT is not set",
}


@pytest.mark.parametrize("fields", COMMAND_PROBLEMS)
def test_a_model_with_a_command_is_checked_as_a_whole(tmp_path: Path, fields: str) -> None:
    [problem] = problems(tmp_path, f"models: {{m: {{{fields}}}}}")
    message = COMMAND_PROBLEMS[fields]
    at = "" if re.match(r"[a-z_.0-9A]+: ", message) else ": "
    assert problem.startswith(f"config.yaml: models.m{at or '.'}{message}")


def test_a_command_keeps_its_placeholders_and_starts_at_the_file(tmp_path: Path) -> None:
    text = """
        models:
          m:
            cmd: |
              ./serve --port ${PORT} --at ${HOST} --name ${MODEL_ID}  # a comment
                --dir "${DIR}/a b" --pid
            cmd_stop: [stop, "${PID}", 1.10]
            url: "http://${HOST}:${PORT}/v"
            env: {KEY: "${API_KEY}", DIR: "${DIR}"}
          n: {cmd: serve, url: "http://h:1"}
    """
    config = load(tmp_path, text, {"DIR": "/data", "PORT": "1", "HOST": "h", "API_KEY": "k", "PID": "2"})
    m = config.models["m"]
    assert m.cmd == [f"{tmp_path}/serve", "--port", "${PORT}", "--at", "${HOST}", "--name", "${MODEL_ID}",
                     "--dir", "/data/a b", "--pid"]  # fmt: skip
    assert (m.cmd_stop, m.url, m.env) == (
        ["stop", "${PID}", "1.10"],
        "http://${HOST}:${PORT}/v",
        {"KEY": "${API_KEY}", "DIR": "/data"},
    )
    assert [config.backend_of(name) for name in config.models] == ["command", "command"]
