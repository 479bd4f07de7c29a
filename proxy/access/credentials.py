"""The API key in the headers of a request, in every form that clients have.

Source: the references of OpenAI's API (`Authorization: Bearer`), which Ollama's clients send as well, and of
Anthropic's (`x-api-key`, or `Authorization: Bearer` with `ANTHROPIC_AUTH_TOKEN`).
"""

from __future__ import annotations

from multidict import MultiMapping

from llama_smart_proxy.proxy.errors import AccessDenied

_BEARER = "bearer"


def key_in(headers: MultiMapping[str]) -> str:
    """The one key in these headers; empty if there is none. Other schemes than Bearer, and parameters of the query,
    which end up in logs, are no keys. Raises: AccessDenied 401 for two different ones, of which another reader could
    take the other."""
    found = {key.strip() for key in headers.getall("x-api-key", ())}
    for value in headers.getall("Authorization", ()):
        scheme, _, key = value.strip().partition(" ")
        if scheme.lower() == _BEARER:
            found.add(key.strip())
    found.discard("")
    if len(found) > 1:
        raise AccessDenied("the request has several different API keys; send one, in Authorization or x-api-key")
    return found.pop() if found else ""
