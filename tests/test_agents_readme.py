"""`agents/README.md` keeps its word: every agent in it is loaded, and says what is written there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests import raw_client
from tests.agent_clients import WAYS
from tests.e2e_support import Fakes, fakes
from tests.harness import ROOT, environment, running_proxy

__all__ = ["fakes"]
TEXT = (ROOT / "agents" / "README.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
TALKS = re.findall(r"```\n> (.*?)\n< (.*?)\n```", TEXT)
(CONFIG,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


async def test_every_agent_in_it_does_what_it_says(fakes: Fakes) -> None:
    folder = fakes.folder / "my-agents"
    folder.mkdir()
    for name, source in FILES.items():
        if not name.startswith("test_"):
            (folder / name).write_text(source)
    config = fakes.config({"m": fakes.model(fields={"parallel": 4}, ECHO=1)}, keep_alive=-1)
    config |= yaml.safe_load(CONFIG) | {"agents_dirs": [str(folder)]}
    assert len(TALKS) == len(config["agents"]) == len(FILES) - 1 >= 7
    async with running_proxy(config) as proxy:
        for way in WAYS:
            for asked, answer in TALKS:
                said = await way.ask(proxy, way.body(asked))
                assert (said.text, said.error) == (answer, None), (way, asked)
        listed = {item["name"]: item for item in (await raw_client.get(proxy.port, "/plugins")).json()}
        assert all(listed[name.removesuffix(".py")]["status"] == "loaded" for name in FILES if "test_" not in name)
        told = await WAYS[0].ask(proxy, WAYS[0].body("/help"))
        assert "`/polite` Asks nicely." in told.text and "`mark=` What stands in place" in told.text


def test_the_test_in_it_passes(tmp_path: Path) -> None:
    for name in ("brief.py", "test_brief.py"):
        (tmp_path / name).write_text(FILES[name])
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_brief.py"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
