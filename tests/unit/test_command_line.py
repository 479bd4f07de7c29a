"""`args` of the configuration: split by the rules of a shell, with absolute paths and without secrets where shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.cli.check import check_command
from llama_smart_proxy.proxy.config import missing_paths, without_secret_values
from llama_smart_proxy.proxy.config.command_line import split_command
from tests.support.config_files import load, model, problems
from tests.support.laws import law

PLAIN = ["--ctx-size", "8192", "--temp", "0.7"]
TEXTS: list[tuple[str, list[str]]] = [
    ("--ctx-size 8192 \\\n  --temp 0.7", PLAIN),
    ("--ctx-size 8192 \\\r\n  --temp 0.7 \\\r\n", PLAIN),
    ("--ctx-size 8192 \\\n  --temp 0.7 \\", PLAIN),  # the last line was taken for one in the middle
    ("--ctx-size 8192 \\  \n\t--temp 0.7\\ \t\n", PLAIN),  # blanks behind the backslash
    ("--ctx-size 8192 \\ --temp 0.7 \\ ", PLAIN),  # as folding a YAML text leaves it
    ("--ctx-size 8192\n--temp 0.7\n", PLAIN),
    ("# all of it\n--ctx-size 8192 # tokens \\\n--temp 0.7   # it's warm", PLAIN),
    ("--ctx\\\n-size 81\\\n92 --temp 0.7", PLAIN),
    ('\'--ctx-size\' 8192 "--temp" 0."7"', PLAIN),
    ("-p a#b '#c' \\#d #e", ["-p", "a#b", "#c", "#d"]),
    ("-r 'it''s' \"a 'b' \\\"c\\\" \\n \\$ \\\\\" a\\ b ''", ["-r", "its", "a 'b' \"c\" \\n $ \\", "a b", ""]),
    ('-j \'{"a": "b\\\\n"}\'', ["-j", '{"a": "b\\\\n"}']),
    ("-r 'two\nlines' \"and\\\n one\"", ["-r", "two\nlines", "and one"]),
    ("-x $HOME `id` $(id) a;b|c>d *.gguf ~", ["-x", "$HOME", "`id`", "$(id)", "a;b|c>d", "*.gguf", "~"]),
    ("-x é\u00a0\u2028ü", ["-x", "é\u00a0\u2028ü"]),
    ("", []),
    (" \n# nothing", []),
]


@pytest.mark.parametrize(("text", "words"), TEXTS)
def test_a_text_is_split_by_the_rules_of_a_shell(text: str, words: list[str]) -> None:
    assert split_command(text) == words


@law(1000)
@given(st.lists(st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]))))
def test_what_is_quoted_for_a_shell_is_read_back(words: list[str]) -> None:
    quoted = ["'" + word.replace("'", "'\\''") + "'" for word in words]
    assert split_command(" \\\n ".join(quoted)) == words
    assert split_command(" # a 'comment\n".join(quoted)) == words


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("|\n  --ctx-size 8192 \\\n  --temp 0.7\n", PLAIN),
        ("|-\n  --ctx-size 8192 # tokens\n  # none\n  --temp 0.7 \\\n", PLAIN),
        (">\n  --ctx-size 8192 \\\n  --temp 0.7\n", PLAIN),
        ("--ctx-size 8192 \\\n  --temp 0.7 # warm\n", PLAIN),
        ('"--ctx-size 8192 \\\n  --temp 0.7"', PLAIN),
        ("[--ctx-size, 8192, --temp, 0.7]", PLAIN),
        ("\n- --ctx-size 8192\n- --temp 0.7 # warm\n", PLAIN),
        ("[--temp, 0.70, --seed, 1e3, --x, true, --y, 010]",
         ["--temp", "0.70", "--seed", "1e3", "--x", "true", "--y", "010"]),
        ("[--reverse-prompt, 'a b', -p, '- a b']", ["--reverse-prompt", "a b", "-p", "- a b"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_form_of_yaml_gives_the_same_arguments(
    tmp_path: Path, block: str, words: list[str], newline: str
) -> None:
    block = block.replace("\n", "\n   ")
    text = f"models:\n m:\n  path: a\n  args: {block}\nllama_cpp:\n  args: {block}\n"
    assert load(tmp_path, text.replace("\n", newline)).models["m"].args == words
    assert load(tmp_path, text.replace("\n", newline)).llama_cpp.args == words


def test_a_variable_may_hold_arguments_of_several_lines(tmp_path: Path) -> None:
    text = model(path="a")
    assert load(tmp_path, text, {"LSP_MODELS__M__ARGS": "--ctx-size 8192 \\\r\n--temp 0.7"}).models["m"].args == PLAIN
    assert load(tmp_path, text, {"LSP_MODELS__M__ARGS": "[--top-p, 0.90]"}).models["m"].args == ["--top-p", "0.90"]


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ("--temp 'x", "models.m.args: has a quote that is not closed"),
        ('--temp "x\\"', "models.m.args: has a quote that is not closed"),
        (["--temp 'x"], "models.m.args: has a quote that is not closed"),
        ("llama-server --temp 1", "models.m.args: must begin with a flag"),
        (["CUDA_VISIBLE_DEVICES=0", "--temp", "1"], "models.m.args: must begin with a flag"),
        (["--temp", None], "models.m.args.1: should be a valid string"),
        (["--temp", "a\0b"], "models.m.args.1: must not contain a NUL character"),
        ("-c 1 \\\n--port 1", "models.m.args: must not contain --port: set server_pool.port_start"),
    ],
)
def test_arguments_that_cannot_be_are_a_problem(tmp_path: Path, args: object, problem: str) -> None:
    assert problems(tmp_path, model(path="a", args=args))[0].startswith(f"config.yaml: {problem}")


def test_a_comment_that_a_folded_text_spreads_over_flags_is_a_problem(tmp_path: Path) -> None:
    text = "models: \n m:\n  path: a\n  args: {mark}\n   --temp 0.7 # warm\n   --top-k 20\n"
    [problem] = problems(tmp_path, text.replace("{mark}", ">"))
    assert problem.startswith("config.yaml: models.m.args: a comment in a folded text hides all flags behind it")
    assert load(tmp_path, text.replace("{mark}", "|")).models["m"].args == ["--temp", "0.7", "--top-k", "20"]


PATHS = [
    ("--mmproj x.gguf", "--mmproj {folder}/x.gguf"),
    ("--mmproj=x.gguf", "--mmproj={folder}/x.gguf"),
    ("-mm ../x.gguf", "-mm {folder}/../x.gguf"),
    ("--chat_template_file ~/t.jinja", "--chat_template_file {home}/t.jinja"),
    ("--chat-template-file=~/t.jinja", "--chat-template-file={home}/t.jinja"),
    ("--slot-save-path cache/", "--slot-save-path {folder}/cache/"),
    ("--lora a.gguf,~/b.gguf,/c.gguf", "--lora {folder}/a.gguf,{home}/b.gguf,/c.gguf"),
    ("--lora-scaled a.gguf:0.5,~/b.gguf:2", "--lora-scaled {folder}/a.gguf:0.5,{home}/b.gguf:2"),
    ("--control-vector-scaled=a.gguf:-1", "--control-vector-scaled={folder}/a.gguf:-1"),
    ("-md d.gguf --grammar-file g -jf s --log-file l", "-md {folder}/d.gguf --grammar-file {folder}/g -jf {folder}/s "
     "--log-file {folder}/l"),
    ("--media-path . --path ''", "--media-path {folder}/. --path "),
    ("--mmproj", "--mmproj"),
    # no paths
    ("--chat-template chatml --temp x.gguf --mmproj-url a/b", "--chat-template chatml --temp x.gguf --mmproj-url a/b"),
    ("--alias-like=x.gguf -ot exps=CPU", "--alias-like=x.gguf -ot exps=CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "expected"), PATHS)
@pytest.mark.parametrize("as_list", [False, True])
def test_paths_start_at_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_: str, expected: str, as_list: bool
) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.chdir("/")
    args = split_command(given_) if as_list else given_
    config = load(tmp_path, json.dumps({"models": {"m": {"path": "a", "args": args}}, "llama_cpp": {"args": args}}))
    wanted = expected.format(folder=tmp_path, home="/home/u")
    assert " ".join(config.models["m"].args) == " ".join(config.llama_cpp.args) == wanted


def test_the_files_of_arguments_are_looked_for_but_not_those_that_the_server_makes(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    there, away = tmp_path / "there", tmp_path / "away"
    assert missing_paths([f"--mmproj={there}", "--lora", f"{there},{away}", "--log-file", str(away)]) == [
        f"--lora: {away}"
    ]
    assert missing_paths(["--media-path", str(there), "--slot-save-path", str(tmp_path)]) == [f"--media-path: {there}"]


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        ("--hf-token abc -hft=abc --temp 1", "--hf-token *** -hft=*** --temp 1"),
        ("--mmproj-url https://u:p@h/x", "--mmproj-url https://***@h/x"),
        ("--mcp_servers_json {}", "--mcp_servers_json ***"),
        ("--image-max-tokens 5 -ctk q8_0 --ssl-key-file k", "--image-max-tokens 5 -ctk q8_0 --ssl-key-file k"),
    ],
)
def test_secrets_of_flags_are_not_shown(args: str, shown: str) -> None:
    assert without_secret_values(args.split()) == shown.split()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("Authorization: Bearer abc d", "Authorization: ***"),
        ("X-Api-Key:abc", "X-Api-Key:***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("PGPASSWORD=a=b", "PGPASSWORD=***"),
        ("tokens=5", "tokens=5"),
        ("what is a key: it opens", "what is a key: it opens"),
    ],
)
def test_secrets_in_headers_and_variables_of_a_command_are_not_shown(value: str, shown: str) -> None:
    assert without_secret_values(["run", "-e", value, "--x"]) == ["run", "-e", shown, "--x"]


# -- check --argv ------------------------------------------------------------------------------------------------------


def argv(folder: Path, config: object, name: str) -> int:
    (folder / "c.json").write_text(json.dumps(config))
    return check_command(folder / "c.json", {}, argv_of=name)


@pytest.mark.parametrize("name", ["m", "short", "virtual", "m:latest", "M"])
def test_check_shows_the_command_line_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    args = "--temp 0.7 \\\n -r 'a b' --hf-token very-secret"
    config = {
        "llama_cpp": {"server": str(server), "args": ["-t", 4], "hf_cache": False},
        "models": {"m": {"path": "m.gguf", "args": args, "aliases": ["short"]}, "virtual": {"model": "m"}},
    }
    assert argv(tmp_path, config, name) == 0
    out, err = capsys.readouterr()
    ours = f"{server} --model {tmp_path}/m.gguf --host 127.0.0.1 --port 11600 --alias m --jinja --metrics --slots"
    assert (out, err) == (f"{ours} --no-webui -t 4 --temp 0.7 -r 'a b' --hf-token '***'\n", "")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ({"path": "none.gguf"}, "{folder}/none.gguf"),
        ({"repo": "org/none-GGUF"}, "hf.co/org/none-GGUF:Q4_K_M"),
        ({"package": "no_such_package", "file": "m.gguf"}, "m.gguf"),
    ],
)
def test_check_shows_it_also_for_files_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: dict[str, str], shown: str
) -> None:
    config = {"llama_cpp": {"server": "embedded", "hf_cache": False}, "models": {"m": {**source, "args": "-x 1"}}}
    assert argv(tmp_path, config, "m") == 0
    out = capsys.readouterr().out
    assert f" --model {shown.format(folder=tmp_path)} --host " in out and out.endswith(" -x 1\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "--argv: model 'none' not found; known models: far, m"), ("far", "--argv: the proxy does not start the")],
)
def test_check_cannot_show_it_for_other_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    remote = {"url": "http://127.0.0.1:9", "models": ["far"]}
    config = {"llama_cpp": {"server": "embedded"}, "models": {"m": {"path": "m.gguf"}}, "remotes": {"r": remote}}
    assert argv(tmp_path, config, name) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{tmp_path}/c.json: {message}" in err


def test_a_path_in_the_arguments_that_is_not_there_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    config = {"models": {"m": {"path": "m.gguf", "args": "--mmproj none.gguf"}}, "llama_cpp": {"args": "--lora l.gguf"}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert check_command(tmp_path / "c.json", os.environ | {}) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: llama_cpp.args: --lora: {tmp_path}/l.gguf: no such file or folder",
        f"warning: models.m.args: --mmproj: {tmp_path}/none.gguf: no such file or folder",
    ]
