"""One process between chat UIs and local models; and what a plugin imports.

The names are imported when they are first used: a program that needs one module of the package, such as the embedded
model server, does not pay for all others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_smart_proxy.agents.base import About, Agent, Context, Options
    from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Reply, fold, say
    from llama_smart_proxy.proxy.errors import (
        AgentError,
        BadRequest,
        ModelNotFound,
        Overloaded,
        ProxyError,
        UpstreamFailed,
    )

__all__ = [
    "About",
    "Agent",
    "AgentError",
    "BadRequest",
    "ChatRequest",
    "Chunk",
    "ChunkStream",
    "Context",
    "ModelNotFound",
    "Options",
    "Overloaded",
    "ProxyError",
    "Reply",
    "UpstreamFailed",
    "fold",
    "say",
]

_MODULES = ("agents.base", "proxy.chat", "proxy.errors")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
