"""Times, `${VAR}`, environment variables and flags: how values are read, and which one wins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.config import parse_duration
from llama_smart_proxy.proxy.config.expansion import expand
from tests.support.config_files import load, model, problems
from tests.support.laws import law


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(0, 0), (1.5, 1.5), ("300", 300), ("5m", 300), ("1h30m", 5400), ("500ms", 0.5), ("1.5h", 5400), (" 90s ", 90)],
)
def test_durations_are_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", [-1, -0.5, "-1", "-1s", "-5m", "-inf", pytest.param(-(10**400), id="huge")])
def test_a_negative_duration_is_never(text: object) -> None:
    assert parse_duration(text) == math.inf


@pytest.mark.parametrize(
    "text", ["", "m5", "5 m", "5d", "1h-3m", "nan", "soon", "inf", pytest.param(10**400, id="huge"), True, None, [], {}]
)
def test_anything_else_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match=r"not a time|longer than a year"):
        parse_duration(text)


@law(1000)
@given(st.integers(0, 5000), st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 10**6))
def test_the_parts_of_a_duration_add_up(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    written = f"{hours}h{minutes}m{seconds}s{milliseconds}ms"
    assert parse_duration(written) == pytest.approx(hours * 3600 + minutes * 60 + seconds + milliseconds / 1000)


@law(1000)
@given(st.floats(0, 366 * 86400))
def test_a_duration_reads_back_what_a_number_writes(seconds: float) -> None:
    assert parse_duration(seconds) == parse_duration(repr(seconds)) == seconds


@law(1000)
@given(st.text() | st.floats() | st.integers())
def test_a_duration_is_a_time_or_a_value_error(value: object) -> None:
    try:
        assert parse_duration(value) >= 0
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${A}", "one"),
        ("x${A}y${A}", "xoneyone"),
        ("${NO:-d}", "d"),
        ("${NO:-}", ""),
        ("${EMPTY}", ""),
        ("${EMPTY:-d}", "d"),
        ("$${A}", "${A}"),
        ("$A {A} $$ $", "$A {A} $$ $"),
        ("${B}", "${A}"),
        ("${NO:-a b:/c}", "a b:/c"),
    ],
)
def test_variables_expand_as_in_a_shell(text: str, expanded: str) -> None:
    assert expand(text, {"A": "one", "EMPTY": "", "B": "${A}"}) == expanded


@law(1000)
@given(st.text())
@example("$${a}")
def test_a_text_whose_references_are_escaped_expands_to_itself(text: str) -> None:
    text = text.replace("$$", "")
    assert expand(text.replace("${", "$${"), {}) == text


@law(1000)
@given(st.text(), st.text(alphabet="xyz "), st.text(alphabet="xyz "))
def test_what_a_variable_holds_is_not_expanded_again(value: str, before: str, after: str) -> None:
    assert expand(f"{before}${{V}}{after}", {"V": value}) == before + value + after


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "${A-b}", "${A:-${B}}"])
def test_a_malformed_reference_is_a_problem(tmp_path: Path, text: str) -> None:
    [problem] = problems(tmp_path, model(path=text))
    assert problem.startswith("config.yaml: models.m.path: '${' begins no ${VAR}")


def test_a_variable_that_is_not_set_may_be_a_credential_of_the_service(tmp_path: Path) -> None:
    for file, text in (("A", "alone\n"), ("credentials_B", "of a folder"), ("SET", "unused")):
        (tmp_path / file).write_text(text)
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path), "SET": "set"}
    assert expand("${A} ${B} ${SET} ${C:-default}", env) == "alone of a folder set default"
    with pytest.raises(ValueError, match="C is not set"):
        expand("${C}", env)


def test_an_expanded_value_takes_the_type_of_its_field(tmp_path: Path) -> None:
    text = """
        server: {port: "${PORT:-11555}", drain_s: "${D}"}
        models: {m: {path: a, preload: "${P}", ctx: "${UNSET:-}"}}
        remotes: {r: {url: http://h, api_key: "${KEY}"}}
    """
    config = load(tmp_path, text, {"D": "1m", "P": "true", "KEY": "0123e4"})
    assert (config.server.port, config.server.drain_s, config.models["m"].preload) == (11555, 60, True)
    assert config.models["m"].ctx is None
    key = config.remotes["r"].api_key
    assert key is not None
    assert key.get_secret_value() == "0123e4"


NO_EFFECT = "has no effect here and can be removed"


def test_an_unset_variable_is_one_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, "server:\n  port: ${NOT_SET}\n") == [
        "config.yaml: server.port: the environment variable NOT_SET is not set; ${NOT_SET:-default} gives it a default"
    ]
    assert len(problems(tmp_path, '{"ollama_port": "${NOT_SET}", "remotes": {"r": {"url": "${NOT_SET}"}}}')) == 2


@pytest.mark.parametrize(
    ("variable", "value", "read"),
    [
        ("LSP_SERVER__PORT", "8080", lambda c: c.server.port == 8080),
        ("LSP_SERVER_POOL__SIZE", "3", lambda c: c.server_pool.size == 3),
        ("LSP_SERVER_POOL__KEEP_ALIVE", "-1", lambda c: c.server_pool.keep_alive == math.inf),
        ("LSP_SERVER", '{"port": 1, "host": "::"}', lambda c: (c.server.port, c.server.host) == (1, "::")),
        ("LSP_LOG_LEVEL", "DEBUG", lambda c: c.log_level == "debug"),
        ("LSP_AGENTS", "[rag, {opt: {n: 1}}]", lambda c: c.agents[1].options == {"n": 1}),
        ("LSP_AGENTS", "rag, opt", lambda c: [a.name for a in c.agents] == ["rag", "opt"]),
        ("LSP_LLAMA_CPP__ARGS", "-t 4", lambda c: c.llama_cpp.args == ["-t", "4"]),
        ("LSP_LLAMA_CPP__SERVER", "null", lambda c: c.llama_cpp.server is None),
        ("LSP_MODELS__CHAT__CTX", "512", lambda c: c.models["Chat"].ctx == 512),
        ("LSP_MODELS__CHAT_EMBED_2B__CTX", "512", lambda c: c.models["chat-embed:2b"].ctx == 512),
        ("LSP_LLAMA_CPP__MODELS__CHAT__ENV__A_B", "0", lambda c: c.models["Chat"].env == {"A_B": "0"}),
        ("LSP_MODELS__NEW", "{path: n.gguf}", lambda c: c.models["new"].path.name == "n.gguf"),
        ("LSP_REMOTES__R__API_KEY", "0x1f", lambda c: c.remotes["r"].api_key.get_secret_value() == "0x1f"),
        ("LSP_OWNER", "anything", lambda c: True),
        ("LSP_CONFIG", "anything", lambda c: True),
        ("OLLAMA_PROXY_OLLAMA_HOST", "http://box", lambda c: c.ollama.urls == ["http://box:1"]),
        ("OLLAMA_PROXY_OLLAMA_PORT", "2", lambda c: c.ollama.urls == ["http://file:2"]),
        ("LSP_OLLAMA__HOST", "a,b:2", lambda c: c.ollama.urls == ["http://a:1", "http://b:2"]),
        ("LSP_OLLAMA__HOST", '["a", "b"]', lambda c: c.ollama.host == ["a", "b"]),
        ("OLLAMA_PROXY_PLUGINS_DIR", "/p", lambda c: c.agents_dirs == [Path("/file"), Path("/p")]),
        ("OLLAMA_PROXY_SERVER_HOST", "::", lambda c: c.server.host == "::"),
        ("OLLAMA_PROXY_SERVER_PORT", "8080", lambda c: c.server.port == 8080),
        ("LLM_PROXY_BACKEND", "ollama", lambda c: c.backend == "ollama" and c.uses_ollama),
        ("OLLAMA_PROXY_REDIS_URL", "x", lambda c: c.warnings == [f"environment: OLLAMA_PROXY_REDIS_URL: {NO_EFFECT}"]),
    ],
)  # fmt: skip
def test_a_variable_overrides_the_file(tmp_path: Path, variable: str, value: str, read: Callable[[Any], bool]) -> None:
    text = """
        server: {port: 1111, host: file}
        ollama: {host: file, port: 1}
        agents_dirs: [/file]
        models: {Chat: {path: a}}
        llama_cpp: {server: /file, models: {"chat-embed:2b": {path: a}}}
        remotes: {r: {url: http://h, api_key: from-file}}
    """
    assert read(load(tmp_path, text, {variable: value, "PATH": "/bin", "LC_ALL": "C"}))


@pytest.mark.parametrize("variable", ["LSP_USE_PLISTS", "LSP_", "LSP_ZED__LOG"])
def test_a_variable_of_another_program_is_a_warning(tmp_path: Path, variable: str) -> None:
    found = load(tmp_path, "server: {port: 1}", {variable: "true"}).warnings
    assert found == [f"environment: {variable}: names no field, so it has no effect here"]


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("LSP_SERVER__PROT", "1", "unknown field; did you mean port?"),
        ("LSP_SERVE", "1", "unknown field; did you mean server?"),
        ("LSP_SERVR__PORT", "1", "unknown field"),
        ("LSP_SERVER____PORT", "1", "unknown field"),
        ("LSP_SERVER__HOST__X", "1", "unknown field"),
        ("LSP_SERVER__PORT", "eighty", "should be a valid integer, unable to parse string as an integer"),
        ("LSP_SERVER__PORT", "[1", "line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("LSP_SERVER", '{"port": -1}', "port: should be greater than or equal to 0"),
        ("LLM_PROXY_BACKEND", "vllm", "should be 'llama.cpp' or 'ollama'"),
        ("OLLAMA_PROXY_OLLAMA_PORT", "x", "should be a valid integer, unable to parse string as an integer"),
    ],
)
def test_a_bad_variable_is_reported_by_its_name(tmp_path: Path, variable: str, value: str, problem: str) -> None:
    assert problems(tmp_path, "server: {port: 1}", {variable: value}) == [f"environment: {variable}: {problem}"]


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    text, env = "server: {port: 1, host: a}\nlog_level: error", {"LSP_SERVER__PORT": "2", "LSP_SERVER__HOST": "b"}
    config = load(tmp_path, text, env, server__port=3, server__host=None, log_level=None)
    assert (config.server.port, config.server.host, config.log_level) == (3, "b", "error")


def test_a_problem_of_the_file_goes_with_the_value_that_replaces_it(tmp_path: Path) -> None:
    text = "server:\n  port: ${NOT_SET}"
    assert load(tmp_path, text, {"LSP_SERVER__PORT": "5"}).server.port == 5
    assert problems(tmp_path, text, server__port="x")[0].startswith(
        "command line: server.port: should be a valid integer"
    )


def test_lsp_variables_win_over_those_of_the_second_seed(tmp_path: Path) -> None:
    env = {"OLLAMA_PROXY_OLLAMA_HOST": "old", "LSP_OLLAMA__HOST": "new"}
    assert load(tmp_path, "", env).ollama.urls == ["http://new:11434"]
    env = {"OLLAMA_PROXY_SERVER_PORT": "1", "LSP_SERVER__PORT": "2"}
    assert load(tmp_path, "", env).server.port == 2


SPELLINGS = """
    1.10 1e3 1.0 +5 -0 0.10 .5 5. 010 0x1F 1_000 12:30 2024-01-01 true False yes on 99999999999999999999999 v1
"""


def test_variables_of_a_process_keep_the_spelling_of_their_values(tmp_path: Path) -> None:
    expected = {f"X{number}": text for number, text in enumerate(SPELLINGS.split())}
    env = "{" + ", ".join(f"{name}: {text}" for name, text in expected.items()) + "}"
    for text in (
        f"models: {{m: {{path: a, env: {env}}}}}",
        f"llama_cpp: {{models: {{m: {{path: a, env: {env}}}}}}}",
        f"sections: {{s: &a {env}}}\nmodels: {{m: {{path: a, env: {{<<: [*a]}}}}}}",
    ):
        assert load(tmp_path, text).models["m"].env == expected, text
    for variable, value in (("ENV", env), ("ENV__X0", "1.10")):
        found = load(tmp_path, model(path="a"), {f"LSP_MODELS__M__{variable}": value}).models["m"].env
        assert found["X0"] == "1.10"


def test_json_keeps_it_too_and_null_and_the_empty_text_are_not_the_same(tmp_path: Path) -> None:
    text = '{"models": {"m": {"path": "a", "env": {"A": 1.10, "B": 1E3, "C": true, "D": null, "E": "", "F": 5}}}}'
    expected = {"A": "1.10", "B": "1E3", "C": "true", "D": None, "E": "", "F": "5"}
    assert load(tmp_path, text, name="c.json").models["m"].env == expected
    assert load(tmp_path, "models: {m: {path: a, env: {D: , E: '', F: ~}}}").models["m"].env == {
        "D": None,
        "E": "",
        "F": None,
    }


def test_other_fields_are_numbers_as_before(tmp_path: Path) -> None:
    config = load(
        tmp_path, "server: {port: 1, drain_s: 1.50}\nsections: {args: {env: {x: 1.50}}}\nmodels: {args: {path: a}}"
    )
    assert (config.server.drain_s, config.sections["args"]["env"]["x"]) == (1.5, 1.5)


def test_passthrough_may_be_one_text_and_in_two_places(tmp_path: Path) -> None:
    config = load(tmp_path, 'llama_cpp: {env_passthrough: [A, "B_*"]}\nenv_passthrough: C, D?')
    assert config.passthrough == ["A", "B_*", "C", "D?"]
