"""The fields of the configuration about who may use the proxy: API keys, and what each of them may do."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, WithJsonSchema, model_validator

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.section import Section

HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
"""A key in its hashed form."""
SHORTEST_KEY = 16
"""Characters from which on a key is not warned about."""
_KEY = re.compile(r"[!-~]{1,512}")
"""What `Authorization: Bearer` can carry: visible ASCII, without spaces."""
ScopeName = Literal["inference", "admin"]
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key. It needs no salt and no slow function, which protect passwords that can be guessed: keys
    are long and random."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()  # a header may have any bytes


def hash_of(key: str) -> str:
    """The hashed form of a key, for the configuration."""
    return f"sha256:{digest_of(key).hex()}"


def _key_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a key's name is 1 to 64 of the characters A-Z a-z 0-9 . _ @ -")
    return name


def _hash(text: str) -> str:
    if not HASH.fullmatch(text):
        raise ValueError("must be sha256: and 64 hexadecimal digits; `llama-smart-proxy key new` prints a key and that")
    return text.lower()


def _key_entries(value: object) -> object:
    """Keys as a list of mappings, from texts and mappings, or from one of either."""
    value = [value] if isinstance(value, dict) else shapes.comma_list(value)
    return [{"key": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


class ApiKeyConfig(Section):
    """One API key: `key` or `hash`, and what its holder may do. The key itself is not kept, only its digest."""

    name: Annotated[str, AfterValidator(_key_name)] = Field(
        default="", description="Its name in logs, metrics and usage; by default the beginning of its hash."
    )
    key: str | None = Field(
        default=None, repr=False, description="The key, such as ${NAME} of a variable or a systemd credential."
    )
    hash: Annotated[str, AfterValidator(_hash)] | None = Field(
        default=None, repr=False, description="sha256:... of the key, as `llama-smart-proxy key new` prints it."
    )
    scopes: Annotated[list[ScopeName], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=lambda: list[ScopeName](("inference",)),
        min_length=1,
        description="What it may do: inference uses models; admin also manages them, and sees what others do.",
    )
    models: Annotated[list[str], BeforeValidator(shapes.comma_list)] | None = Field(
        default=None, description="Names or patterns (* and ?) of the only models that exist for it; default: all."
    )
    agents: Annotated[list[str], BeforeValidator(shapes.comma_list)] | None = Field(
        default=None, description="Names of the only agents that it may call; those that always run still do."
    )
    collections: Annotated[list[str], BeforeValidator(shapes.comma_list)] | None = Field(
        default=None,
        description="Names or patterns (* and ?) of the only collections of the operator that it may search; default: "
        "all.",
    )
    requests_per_minute: int | None = Field(default=None, ge=1, description="Most requests in a minute; default: any.")
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Most tokens in a minute, of prompts and answers; default: any."
    )
    concurrent: int | None = Field(default=None, ge=1, description="Most requests at one time; default: any.")

    _digest: bytes = PrivateAttr(default=b"")
    _is_short: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _hashed(self) -> Self:
        if (self.key is None) == (self.hash is None):
            raise ValueError("requires a key, or a hash of one" if self.key is None else "has both a key and a hash")
        given, self.key = self.key or "", None
        if HASH.fullmatch(given):
            self.hash = given.lower()
        elif given and not _KEY.fullmatch(given):
            raise ValueError("a key is 1 to 512 visible ASCII characters, without spaces")
        self._is_short = self.hash is None and len(given) < SHORTEST_KEY
        self.hash = self.hash or hash_of(given)
        self._digest = bytes.fromhex(self.hash.removeprefix("sha256:"))
        self.name = self.name or f"key-{self._digest.hex()[:8]}"
        if self.is_admin and self.models is not None:
            raise ValueError("scope admin is for all models; leave out models")
        if self.is_admin and self.collections is not None:
            raise ValueError("scope admin is for all collections; leave out collections")
        return self

    @property
    def digest(self) -> bytes:
        """Its SHA-256."""
        return self._digest

    @property
    def is_short(self) -> bool:
        """Whether it could be guessed, as far as its length shows."""
        return self._is_short

    @property
    def is_admin(self) -> bool:
        return "admin" in self.scopes


class InferenceKeysConfig(Section):
    """What keys of scope inference may do beyond using models that are there."""

    may_keep_alive: bool = Field(
        default=False,
        description="Whether their requests decide how long a model stays loaded; their keep_alive is ignored if not.",
    )
    may_pull: bool = Field(
        default=False, description="Whether their requests may name models that are downloaded for their first use."
    )


ApiKeys = Annotated[
    list[ApiKeyConfig],
    BeforeValidator(_key_entries),
    WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, ApiKeyConfig.model_json_schema()]}}),
]
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _flag(value: object) -> object:
    """The texts of variables that mean true and false as such; other texts in lower case."""
    text = str(value).lower() if isinstance(value, str | int) else value
    return _FLAGS.get(text, text) if isinstance(text, str) else text


Unauthenticated = Annotated[Literal[True, False, "admin"], BeforeValidator(_flag)]
