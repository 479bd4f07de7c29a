"""What one client may do, as far as its API key or its place decides."""

from __future__ import annotations

from dataclasses import dataclass

from llama_smart_proxy.proxy.access.limits import Limits
from llama_smart_proxy.proxy.config import ApiKeyConfig, InferenceKeysConfig
from llama_smart_proxy.proxy.http.scopes import Scope
from llama_smart_proxy.proxy.knowledge.base import Viewer
from llama_smart_proxy.proxy.models.permit import Permit

STRANGERS = "*"
"""Owns what clients of other machines without keys make in the knowledge base. No key has that name."""


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """The rights of a client. `client` is the name of its key, empty without one; `permit` are the models that exist
    for it, None for all; `agents` the names of those that it may call, None for all. `keep_alive`: its requests decide
    how long models stay loaded. `collections` are names or patterns of those of the operator that it may search, None
    for all."""

    client: str
    scopes: frozenset[Scope]
    permit: Permit | None = None
    agents: frozenset[str] | None = None
    keep_alive: bool = True
    limits: Limits | None = None
    collections: tuple[str, ...] | None = None

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    @property
    def viewer(self) -> Viewer:
        """Who the client is to the knowledge base: an administrator is the operator, whichever key it has."""
        if self.is_admin:
            return Viewer()
        return Viewer(self.client or STRANGERS, is_admin=False, collections=self.collections)

    @classmethod
    def of(cls, key: ApiKeyConfig, others: InferenceKeysConfig) -> Grant:
        """The rights of a key; `others` are those of all keys without scope admin."""
        scopes = {Scope.PUBLIC, Scope.INFERENCE, *map(Scope, key.scopes)}
        patterns = tuple(key.models) if key.models is not None else None
        limits = Limits(key.requests_per_minute, key.tokens_per_minute, key.concurrent)
        pulls = key.is_admin or others.may_pull
        return cls(
            key.name,
            frozenset(scopes),
            permit=None if pulls and patterns is None else Permit(patterns, pulls),
            agents=frozenset(key.agents) if key.agents is not None else None,
            keep_alive=key.is_admin or others.may_keep_alive,
            limits=limits if limits != Limits() else None,
            collections=tuple(key.collections) if key.collections is not None else None,
        )


ALL = Grant("", frozenset(Scope))
"""Without keys: a client of this machine."""
REMOTE = Grant("", frozenset({Scope.PUBLIC, Scope.INFERENCE}))
"""Without keys: a client of another machine."""
PUBLIC = Grant("", frozenset({Scope.PUBLIC}), permit=Permit((), pulls=False), agents=frozenset(), keep_alive=False)
"""With keys: a client that has sent none."""
