"""The documentation agrees with the program: its links lead somewhere, and its messages are those of the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.cli.parsers import COMMANDS
from llama_smart_proxy.proxy.config import Config, read_config
from llama_smart_proxy.proxy.config.text import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names by which sections of the page can be linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def literals() -> str:
    """The code, with texts of several parts as one, and `…` where a value is put in."""
    files = [file for folder in ("proxy", "backends") for file in sorted((ROOT / folder).rglob("*.py"))]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_sections_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_the_messages_in_troubleshooting_are_those_of_the_program() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Without a message")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 25
    parts = {part.strip(" .:;") for message in messages for part in message.split("…")}
    assert [part for part in parts if part not in literals()] == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = prose(ROOT / "README.md")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_yaml_are_configurations(page: Path, tmp_path: Path) -> None:
    for language, text in FENCED.findall(page.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        parsed = parse(text)
        assert parsed.problems == [], f"{page.name}:\n{text}"
        if not isinstance(parsed.data, dict) or not set(parsed.data) <= set(Config.model_fields) or "..." in text:
            continue  # another program's, or with something left out
        file = tmp_path / "config.yaml"
        file.write_text(text)
        variables = {name: f"{name}-{'x' * 32}" for name in re.findall(r"\$\{(\w+)", text)}
        problems = read_config(file, env=variables).problems
        wrong = [problem for problem in problems if not problem.endswith("names a model that does not exist")]
        assert wrong == [], f"{page.name}:\n{text}"


def test_commands_in_the_documentation_exist() -> None:
    for page in PAGES:
        for language, text in FENCED.findall(page.read_text(encoding="utf-8")):
            if language == "sh":
                for command in re.findall(r"^(?:\S*/)?llama-smart-proxy (\w+)", text, re.MULTILINE):
                    assert command in COMMANDS, f"{page.name}: {command}"
