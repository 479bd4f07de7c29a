"""Decides for each request whose it is, and whether it may use its endpoint."""

from __future__ import annotations

import hmac

from aiohttp import web

from llama_smart_proxy.proxy.access.credentials import key_in
from llama_smart_proxy.proxy.access.grants import ALL, PUBLIC, REMOTE, Grant
from llama_smart_proxy.proxy.access.peers import is_local
from llama_smart_proxy.proxy.config import ServerConfig, digest_of
from llama_smart_proxy.proxy.errors import AccessDenied
from llama_smart_proxy.proxy.http.headers import RECORD
from llama_smart_proxy.proxy.http.scopes import Scope

CHALLENGE = 'Bearer realm="llama-smart-proxy"'
"""The header `WWW-Authenticate` of every 401 (RFC 9110 11.6.1)."""


class Access:
    """The keys and rules of one configuration. A key that a later configuration does not have is unknown to its own."""

    def __init__(self, server: ServerConfig) -> None:
        self._keys = [(key.digest, Grant.of(key, server.inference_keys)) for key in server.api_keys]
        self._everyone = ALL if server.allow_unauthenticated == "admin" else None

    @property
    def grants(self) -> list[Grant]:
        """All that `admit` may return."""
        return [ALL, REMOTE, PUBLIC, *(grant for _, grant in self._keys)]

    def successor(self, grant: Grant) -> Grant:
        """What is left of a grant of an earlier configuration: that of the key with its name now, or no rights."""
        if not grant.client:
            return grant if not self._keys else PUBLIC
        return next((found for _, found in self._keys if found.client == grant.client), PUBLIC)

    def admit(self, http: web.BaseRequest, scope: Scope) -> Grant:
        """What the client of `http`, which uses an endpoint of this scope, may do. Its record gets the key's name, also
        if that lacks the scope. Raises: AccessDenied."""
        if not self._keys:
            if scope is Scope.INFERENCE and http.method == "POST":
                return REMOTE  # it requires no more; where the client is would take as long as all the rest
            grant = self._everyone or (ALL if is_local(http) else REMOTE)
        elif scope is Scope.PUBLIC:
            grant = self._public(http)
        else:
            grant = self._of_key(http)
        http[RECORD].client = grant.client
        if scope not in grant.scopes:
            raise AccessDenied(self._missing(grant, scope), status=403)
        return grant

    def placed(self, http: web.BaseRequest, grant: Grant) -> Grant:
        """`grant`, as `admit` returned it, where it matters whether the client is of this machine."""
        return grant if self._keys else self._everyone or (ALL if is_local(http) else REMOTE)

    def _public(self, http: web.BaseRequest) -> Grant:
        """For an endpoint that everyone may use: a key shows more there, and a wrong one is none."""
        try:
            return self._of_key(http)
        except AccessDenied:
            return PUBLIC

    def _of_key(self, http: web.BaseRequest) -> Grant:
        key = key_in(http.headers)
        if not key:
            raise AccessDenied("an API key is required, as Authorization: Bearer KEY or x-api-key: KEY")
        digest = digest_of(key)
        found = None
        for known, grant in self._keys:  # all of them, in constant time
            if hmac.compare_digest(known, digest):
                found = grant
        if found is None:
            raise AccessDenied("the API key is not valid: server.api_keys does not list it")
        return found

    def _missing(self, grant: Grant, scope: Scope) -> str:
        if self._keys:
            return f"this requires the scope {scope}, which the API key {grant.client} does not have"
        return (
            f"this requires the scope {scope}, which only clients on this machine have: give others a key in "
            "server.api_keys, or set server.allow_unauthenticated: admin"
        )
