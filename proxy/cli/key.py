"""`llama-smart-proxy key new`: makes an API key."""

from __future__ import annotations

import secrets
import sys

from llama_smart_proxy.proxy.config import ApiKeyConfig, hash_of

PREFIX = "sk-lsp-"
"""Some clients accept only keys that begin with `sk-`; the rest shows in a search what a key is for."""
BYTES = 32
"""Random bytes of a key."""


def new_key_command(name: str | None, scope: str) -> int:
    """Print a new key to stdout, which is kept nowhere, and its entry for the configuration to stderr. Returns the exit
    status: 0, or 2 for an invalid name."""
    key = f"{PREFIX}{secrets.token_urlsafe(BYTES)}"
    try:
        entry = ApiKeyConfig.model_validate({"name": name or "", "key": key})
    except ValueError:
        print("--name: a key's name is 1 to 64 of the characters A-Z a-z 0-9 . _ @ -", file=sys.stderr)
        return 2
    scopes = ", scopes: [admin]" if scope == "admin" else ""
    print(key)
    print(
        "This key is shown only here. Its holder sends it; the configuration gets its hash:\n\nserver:\n  api_keys:\n"
        f'    - {{name: {entry.name}, hash: "{hash_of(key)}"{scopes}}}',
        file=sys.stderr,
    )
    return 0
