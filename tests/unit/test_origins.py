"""Which origins are pages of this machine or applications, and which spellings of an origin the configuration takes."""

from __future__ import annotations

import pytest

from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.origins import Origins

LOCAL = [
    "http://localhost",
    "http://localhost:5173",
    "https://localhost:8443",
    "http://LocalHost:3000",
    "http://127.0.0.1",
    "http://127.0.0.1:65535",
    "http://127.9.8.7:80",
    "http://0.0.0.0:8000",
    "http://[::1]",
    "http://[::1]:8080",
    "https://[0:0:0:0:0:0:0:1]:8080",
    "http://[::ffff:7f00:1]",
    "http://[::]:3000",
    "http://app.localhost:3000",
    "https://tauri.localhost",
    "localhost",
    "localhost:3000",
]
APPLICATIONS = [
    "app://-",
    "app://obsidian.md",
    "file://",
    "file:///",
    "tauri://localhost",
    "capacitor://localhost",
    "ionic://localhost",
    "vscode-webview://1a2b",
    "vscode-file://vscode-app",
    "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
    "moz-extension://4d1c1c0e-9f0a-4c0e-8f5b-0a1b2c3d4e5f",
    "com.example.app://x",
]
FOREIGN = [
    "null",
    "",
    "http://",
    "https://evil.example",
    "http://evil.example:5173",
    "HTTP://evil.example",
    "evil.example",
    "http://localhost.evil.example",
    "http://evil-localhost",
    "http://localhostx",
    "http://.localhost.evil",
    "http://127.0.0.1.evil.example:80",
    "http://127.0.0.1.nip.io",
    "http://1.2.3.4",
    "http://10.0.0.1:3000",
    "http://192.168.1.5",
    "http://[::2]",
    "http://[fe80::1]",
    "http://[::ffff:a00:1]",
    "http://evil.example/@localhost",
    "http://localhost@evil.example",
    "http://localhost:80@evil.example",
    "http://localhost/x",
    "http://localhost:",
    "http://localhost:123456",
    "http://localhost:5173, http://evil.example",
    "http://localhost http://evil.example",
    "http://localhost#",
    "http://lo\u00e7alhost",
    "app://x y",
    "app://\udcff",
    "//localhost",
]


@pytest.mark.parametrize("origin", LOCAL + APPLICATIONS)
def test_pages_of_this_machine_and_applications_are_served(origin: str) -> None:
    assert Origins([]).allow(origin)
    assert ("access-control-allow-origin", origin) in Origins([]).headers(origin)


@pytest.mark.parametrize("origin", FOREIGN)
def test_all_others_are_foreign_and_get_no_header_but_vary(origin: str) -> None:
    assert not Origins([]).allow(origin)
    assert Origins(["https://chat.example"]).headers(origin) == [("vary", "Origin")]


@pytest.mark.parametrize(
    ("configured", "served", "foreign"),
    [
        ("https://chat.example", ["https://chat.example", "https://Chat.example"], ["http://chat.example"]),
        ("https://chat.example/", ["https://chat.example"], ["https://chat.example:8443", "https://x.chat.example"]),
        ("HTTPS://Chat.Example:443", ["https://chat.example"], ["https://chat.example:80"]),
        ("http://chat.example:80", ["http://chat.example"], ["http://chat.example:81"]),
        ("http://[fd00::1]:3000", ["http://[fd00::1]:3000"], ["http://[fd00::2]:3000"]),
        ("null", ["null"], ["http://evil.example"]),
        ("https://a.example, https://b.example", ["https://a.example", "https://b.example"], ["https://c.example"]),
        (["https://a.example"], ["https://a.example", "http://localhost:1"], ["null"]),
        ("*", ["https://evil.example", "null", "http://localhost:1"], ["app://\udcff", "a b"]),
    ],
)
def test_the_configured_origins_are_served_too(configured: object, served: list[str], foreign: list[str]) -> None:
    origins = Origins(Config.model_validate({"server": {"allow_origins": configured}}).server.allow_origins)
    assert [origin for origin in served if not origins.allow(origin)] == []
    assert [origin for origin in foreign if origins.allow(origin)] == []


@pytest.mark.parametrize(
    "wrong", ["chat.example", "https://chat.example/path", "https://", "http://a b", "https://*.x", 5]
)
def test_what_is_no_origin_is_a_problem_of_the_configuration(wrong: object) -> None:
    with pytest.raises(ValueError, match="allow_origins"):
        Config.model_validate({"server": {"allow_origins": [wrong]}})
