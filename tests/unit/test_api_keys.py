"""API keys: where they are read, what is kept of them, and where the proxy listens without any (A1, A3)."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from multidict import CIMultiDict
from pydantic import ValidationError

from llama_smart_proxy.proxy.access.credentials import key_in
from llama_smart_proxy.proxy.access.peers import exposure, is_loopback
from llama_smart_proxy.proxy.access.policy import Access
from llama_smart_proxy.proxy.cli.key import new_key_command
from llama_smart_proxy.proxy.config import Config, ServerConfig, hash_of, read_config
from llama_smart_proxy.proxy.errors import AccessDenied

ROOT = Path(__file__).resolve().parents[2]
KEY, OTHER = "k3y-canary-0123456789abcdef", "other-canary-0123456789abcdef"
NO_SECRETS = {
    "backends/weights/hub.py",  # digests of files
    "backends/weights/hub_cache.py",
    "proxy/knowledge/sources.py",
    "proxy/log/redaction.py",  # what is blanked in a line of the log
    "proxy/config/checks.py",  # two keys of the operator's own configuration
}
HASH = f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"


def server(**fields: object) -> ServerConfig:
    return ServerConfig.model_validate(fields)


def reading(tmp_path: Path, text: str, env: Mapping[str, str] | None = None) -> Any:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return read_config(file, env=env or {})


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], ""),
        ([("Authorization", f"Bearer {KEY}")], KEY),
        ([("authorization", f"BEARER   {KEY} ")], KEY),
        ([("x-api-key", f" {KEY}")], KEY),
        ([("x-api-key", KEY), ("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")], KEY),
        ([("Authorization", "Bearer ")], ""),
        ([("Authorization", "Bearer")], ""),
        ([("Authorization", f"Basic {KEY}")], ""),
        ([("Authorization", KEY), ("Proxy-Authorization", f"Bearer {KEY}"), ("Cookie", f"key={KEY}")], ""),
    ],
)
def test_a_key_is_read_in_every_form_that_clients_have(headers: list[tuple[str, str]], key: str) -> None:
    assert key_in(CIMultiDict(headers)) == key


@pytest.mark.parametrize("second", [("x-api-key", OTHER), ("Authorization", f"bearer {OTHER}")])
def test_two_different_keys_are_none_in_any_form_and_in_no_message(second: tuple[str, str]) -> None:
    for first in (("Authorization", f"Bearer {KEY}"), ("X-API-Key", KEY)):
        for headers in ([first, second], [second, first]):
            with pytest.raises(AccessDenied) as failure:
                key_in(CIMultiDict(headers))
            assert failure.value.status == 401
            assert KEY not in str(failure.value) and OTHER not in str(failure.value)


@pytest.mark.parametrize(
    "keys",
    [KEY, [KEY], HASH, [HASH.upper().replace("SHA256", "sha256")], {"key": KEY}, [{"hash": HASH}], [{"key": HASH}]],
)
def test_a_key_and_its_hash_configure_the_same(keys: object) -> None:
    [entry] = server(api_keys=keys).api_keys
    assert entry.digest == hashlib.sha256(KEY.encode()).digest()
    assert (entry.name, entry.scopes) == (f"key-{HASH[7:15]}", ["inference"])


def test_a_key_itself_is_not_kept_and_its_hash_is_not_shown() -> None:
    config = Config.model_validate({"server": {"api_keys": [KEY, {"name": "a", "key": OTHER}]}})
    shown = repr(config) + repr(Access(config.server).__dict__) + json.dumps(config.model_dump(mode="json"))
    assert KEY not in shown and OTHER not in shown
    assert HASH not in repr(config)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("[{name: a}]", "server.api_keys.0: requires a key, or a hash of one"),
        (f"[{{key: {KEY}, hash: '{HASH}'}}]", "server.api_keys.0: has both a key and a hash"),
        ("[{hash: 'sha256:00'}]", "server.api_keys.0.hash: must be sha256: and 64 hexadecimal digits"),
        ("[{key: ''}]", "server.api_keys.0: requires a key, or a hash of one"),
        ("['']", "server.api_keys.0: requires a key, or a hash of one"),
        (f"['{KEY} ü']", "server.api_keys.0: a key is 1 to 512 visible ASCII characters"),
        (f"[{{key: {KEY}, name: 'a b'}}]", "server.api_keys.0.name: a key's name is"),
        (f"[{{key: {KEY}, scopes: [root]}}]", "server.api_keys.0.scopes.0: should be 'inference' or 'admin'"),
        (f"[{{key: {KEY}, scopes: []}}]", "server.api_keys.0.scopes: "),
        (f"[{{key: {KEY}, scopes: admin, models: [a]}}]", "server.api_keys.0: scope admin is for all models"),
        (f"[{{key: {KEY}, concurrent: 0}}]", "server.api_keys.0.concurrent: should be greater than or equal to 1"),
        (f"[{{key: {KEY}, model: [a]}}]", "server.api_keys.0.model: unknown field; did you mean models?"),
        (f"[{KEY}, '{HASH}']", "server.api_keys.1: is the same key as an earlier one"),
        (f"[{{name: a, key: {KEY}}}, {{name: a, key: {OTHER}}}]", "server.api_keys.1.name: is also the name"),
        ("['${NO_SUCH_KEY}']", "server.api_keys.0: the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_an_invalid_key_is_a_problem_at_its_place_and_never_shown(tmp_path: Path, entry: str, problem: str) -> None:
    found = reading(tmp_path, f"server: {{api_keys: {entry}}}")
    assert found.config is None and any(problem in line for line in found.problems), found.problems
    assert not any(KEY in line or OTHER in line for line in found.problems)


def test_a_short_key_is_warned_about_and_not_shown(tmp_path: Path) -> None:
    found = reading(tmp_path, "server: {api_keys: ['${SHORT}', '${LONG}']}", {"SHORT": "s3cr3t", "LONG": KEY})
    assert found.config is not None and len(found.warnings) == 1
    assert "server.api_keys.0: has under 16 characters" in found.warnings[0] and "s3cr3t" not in found.warnings[0]


def test_keys_come_from_variables_too(tmp_path: Path) -> None:
    env = {"LSP_SERVER__API_KEYS": KEY, "LSP_SERVER__ALLOW_UNAUTHENTICATED": "Admin"}
    config = reading(tmp_path, "", env).config
    assert [key.digest for key in config.server.api_keys] == [hashlib.sha256(KEY.encode()).digest()]
    assert config.server.allow_unauthenticated == "admin"
    with pytest.raises(ValidationError):
        server(allow_unauthenticated="everyone")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST", "::ffff:127.0.0.1", "[::1]"]
)
def test_this_machine_alone_may_be_served_without_keys(host: str) -> None:
    assert exposure(server(host=host)) is None and is_loopback(server(host=host).host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "192.0.2.1", "10.0.0.1", "fe80::1", "::ffff:192.0.2.1"])
def test_other_addresses_require_keys_or_a_setting_that_permits_it(host: str) -> None:
    found = exposure(server(host=host))
    assert found is not None and "server.api_keys" in found and "server.allow_unauthenticated" in found
    for fields in ({"api_keys": [KEY]}, {"allow_unauthenticated": True}, {"allow_unauthenticated": "admin"}):
        assert exposure(server(host=host, **fields)) is None


def test_secrets_are_compared_in_constant_time_and_in_one_place() -> None:
    """A3: nothing of ours compares a key, a digest or the like by `==` or by a look-up, but those of no secrets."""
    secret = re.compile(r"(api_?key|digest|secret|password|credential|hash|signature)s?")
    wrong, compared = [], []
    for file in sorted(file for package in ("proxy", "backends", "agents") for file in (ROOT / package).rglob("*.py")):
        name, source = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if secret.search(source) else ():
            if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
                names = [getattr(part, "id", getattr(part, "attr", "")) for part in (node.left, *node.comparators)]
                if any(map(secret.search, names)) and name not in NO_SECRETS:
                    wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("compare_digest"):
                compared.append(name)
    assert wrong == [] and compared == ["proxy/access/policy.py"]


def test_the_hash_that_is_configured_is_no_key() -> None:
    [entry] = server(api_keys=[KEY]).api_keys
    assert entry.hash == HASH and hash_of(HASH) != HASH


@pytest.mark.parametrize("scope", ["inference", "admin"])
def test_a_new_key_is_printed_once_with_an_entry_that_admits_it(capsys: pytest.CaptureFixture[str], scope: str) -> None:
    assert new_key_command("alice", scope) == 0
    out, err = capsys.readouterr()
    key = out.removesuffix("\n")
    assert re.fullmatch(r"sk-lsp-[A-Za-z0-9_-]{43}", key) and key not in err
    entry = yaml.safe_load(err.partition("\n\n")[2])["server"]["api_keys"]
    [known] = server(api_keys=entry).api_keys
    assert (known.name, known.scopes, known.hash, known.is_short) == ("alice", [scope], hash_of(key), False)
    assert new_key_command("alice", scope) == 0
    assert capsys.readouterr().out != out


def test_a_new_key_with_an_invalid_name_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert new_key_command("a b", "inference") == 2
    assert "--name: a key's name is" in capsys.readouterr().err


def test_the_threat_model_names_tests_that_exist() -> None:
    named = re.findall(
        r"`((?:unit|integration|system)/\w+\.py)(?:::(\w+))?`", (ROOT / "THREAT_MODEL.md").read_text("utf-8")
    )
    assert len(named) > 20
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (path := ROOT / "tests" / file).is_file() or (test and f"def {test}(" not in path.read_text("utf-8"))
    ]
    assert missing == []
