"""What the image runs, without Docker: its health check, and its configuration."""

from __future__ import annotations

import subprocess
import sys

import yaml

from tests.support.harness import environment, free_port, ports, running_proxy
from tests.support.image import FOLDER, KEY, argv, last_stage
from tests.support.raw_client import ask, request


def healthy(port: int) -> bool:
    words = argv(last_stage()["HEALTHCHECK"][0].partition(" CMD ")[2])
    assert words[0] == "python"
    env = environment({"LSP_SERVER__PORT": str(port)})
    return subprocess.run([sys.executable, *words[1:]], env=env, capture_output=True, timeout=60).returncode == 0


def test_the_health_check_fails_where_nothing_listens() -> None:
    assert not healthy(free_port())


async def test_the_images_configuration_serves_those_who_have_the_key() -> None:
    config = yaml.safe_load((FOLDER / "config.yaml").read_text())
    config["server"] |= {"host": "127.0.0.1", "port": 0}
    async with running_proxy(config | {"server_pool": ports()}, env={"API_KEY": KEY}) as proxy:
        assert healthy(proxy.port), "without a key"
        for key, status in ((KEY, 200), ("wrong", 401)):
            asked = request("GET", "/v1/models", headers=[("Authorization", f"Bearer {key}")], close=True)
            assert (await ask(proxy.port, asked, method="GET")).status == status
