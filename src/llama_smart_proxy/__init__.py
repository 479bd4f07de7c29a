"""One process between chat UIs and local models; and what an agent imports.

All that an agent requires of this project has a name here, and these names are stable; where the modules stand is not.
A name is imported when it is first used: a program that requires one module of the package, such as the embedded model
server, does not pay for all others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_smart_proxy.agents.base import About, Agent, Context, Knowledge, Options
    from llama_smart_proxy.agents.substitution import substitute
    from llama_smart_proxy.proxy.chat import (
        BackgroundKind,
        ChatRequest,
        Chunk,
        ChunkStream,
        Found,
        Json,
        Passage,
        Reply,
        background_kind,
        first_text_part,
        fold,
        last_user_message,
        replay,
        say,
        text_of,
        without_sources,
    )
    from llama_smart_proxy.proxy.errors import (
        AgentError,
        BadRequest,
        ModelNotFound,
        Overloaded,
        ProxyError,
        StartFailed,
        UpstreamFailed,
        UpstreamRefused,
    )
    from llama_smart_proxy.proxy.fetching import Fetcher, FetchError, TimedCache
    from llama_smart_proxy.proxy.knowledge.reading.strips import strips

__all__ = [
    "About",
    "Agent",
    "AgentError",
    "BackgroundKind",
    "BadRequest",
    "ChatRequest",
    "Chunk",
    "ChunkStream",
    "Context",
    "FetchError",
    "Fetcher",
    "Found",
    "Json",
    "Knowledge",
    "ModelNotFound",
    "Options",
    "Overloaded",
    "Passage",
    "ProxyError",
    "Reply",
    "StartFailed",
    "TimedCache",
    "UpstreamFailed",
    "UpstreamRefused",
    "background_kind",
    "first_text_part",
    "fold",
    "last_user_message",
    "replay",
    "say",
    "strips",
    "substitute",
    "text_of",
    "without_sources",
]

_MODULES = (
    "agents.base",
    "proxy.chat",
    "proxy.errors",
    "proxy.fetching",
    "proxy.knowledge.reading.strips",
    "agents.substitution",  # last, as it imports the package regex
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                globals()[name] = found[name]  # asked once
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
