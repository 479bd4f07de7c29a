"""The Dockerfile and the compose file fit together, and fit the program: what can be seen without Docker."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from typing import Any

import pytest
import yaml

from llama_smart_proxy.proxy.cli.parsers import parsers
from llama_smart_proxy.proxy.config import load_config
from llama_smart_proxy.proxy.errors import ConfigError
from tests.support.image import FOLDER, KEY, ROOT, argv, instructions, last_stage


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return loaded


def test_what_the_dockerfile_copies_exists_and_is_in_its_context() -> None:
    stages = {rest.split(" AS ")[1] for word, rest in instructions() if word == "FROM" and " AS " in rest}
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied: set[str] = set()
    for word, rest in instructions():
        words = shlex.split(rest)
        if word != "COPY":
            continue
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            copied.update(words[:-1])
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    needed = {path.name for path in (ROOT / "src" / "llama_smart_proxy").iterdir() if path.is_symlink()}
    assert needed <= copied, "what the package links to"


def test_the_image_runs_as_an_account_of_its_own_and_keeps_its_data_in_a_volume() -> None:
    stage = last_stage()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"][-1])
    [volume] = stage["VOLUME"]
    env = dict(word.split("=", 1) for rest in stage["ENV"] for word in shlex.split(rest))
    for name in ("HOME", "HF_HOME", "STATE_DIRECTORY"):
        assert env[name].split("/")[1] == volume.strip("/")
    assert not any("KEY" in name for name in env), "a key in an image is read by all who have it"
    assert stage["STOPSIGNAL"] == ["SIGTERM"] and len(stage["HEALTHCHECK"]) == 1


def test_its_command_line_is_one_of_ours_and_its_configuration_requires_a_key() -> None:
    stage = last_stage()
    words = argv(stage["ENTRYPOINT"][0]) + argv(stage["CMD"][0])
    assert words[0] == "llama-smart-proxy"
    args = parsers()[0].parse_args(words[1:])
    [source] = [rest.split()[0] for rest in stage["COPY"] if rest.endswith(args.config)]
    config = load_config(ROOT / source, env={"API_KEY": KEY})
    assert str(config.server.port) in stage["EXPOSE"] and config.server.host == "0.0.0.0"
    assert [key.is_short for key in config.server.api_keys] == [False]
    with pytest.raises(ConfigError, match="API_KEY is not set"):
        load_config(ROOT / source, env={})


@pytest.mark.full
def test_the_compose_file_is_valid() -> None:
    pytest.importorskip("check_jsonschema")
    jsonschema = pytest.importorskip("jsonschema")
    schemas = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    jsonschema.validate(compose(), json.loads((schemas / "compose-spec.json").read_text()))


def test_its_services_reach_each_other_with_the_key() -> None:
    services = compose()["services"]
    proxy, chat = services["proxy"], services["open-webui"]
    build = proxy["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) == FOLDER / "Dockerfile"
    config = load_config(FOLDER / "config.yaml", env={"API_KEY": KEY})
    assert chat["environment"]["OPENAI_API_BASE_URLS"] == f"http://proxy:{config.server.port}/v1"
    assert chat["environment"]["OPENAI_API_KEYS"] == proxy["environment"]["API_KEY"]
    assert chat["depends_on"]["proxy"]["condition"] == "service_healthy"
    assert (
        float(proxy["stop_grace_period"].removesuffix("s")) > config.server.drain_s + config.server_pool.stop_timeout_s
    )
    text = (FOLDER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+)(..)?", text)) == {("API_KEY", ":?")}, "what is not set is reported"
    published = [port for service in services.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in published)
    volumes = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    for source, target, *_ in volumes:
        assert source in compose()["volumes"] if "/" not in source else (FOLDER / source).is_file()
        assert target in (*last_stage()["VOLUME"], "/app/backend/data") or target.endswith("/config.yaml")


def test_images_have_a_version() -> None:
    images = [service["image"] for service in compose()["services"].values()]
    arguments = dict(rest.split("=") for word, rest in instructions() if word == "ARG")
    bases = [rest.split(" ")[0] for word, rest in instructions() if word == "FROM"]
    images += [re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base) for base in bases]
    assert len(images) == 4
    for image in images:
        assert ":" in image and not image.endswith((":latest", ":main")), image
