"""Requests and answers in one shape for all APIs: OpenAI's JSON, as parsed. No I/O.

Agents receive a `ChatRequest`, and an answer as a `ChunkStream` of `Chunk`s. `say` makes such a stream from a text,
`fold` makes one `Reply` from a stream.

A request is an OpenAI chat body (`messages`) or text body (`prompt`); an answer is a sequence of chunks, each an OpenAI
`chat.completion.chunk`, and `Fold` makes one `chat.completion` of them. Fields that only the client's own API has are
attached to the same object under `EXTENSIONS`: none is lost on the way back to that API, and none reaches another.
Items that OpenAI's API cannot express at all are `kept` in their place.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.chat.background import BACKGROUND_PROMPTS, BackgroundKind, background_kind
from llama_smart_proxy.proxy.chat.chunk import Chunk, ChunkStream, say
from llama_smart_proxy.proxy.chat.extensions import (
    EXTENSIONS,
    Extensions,
    Json,
    attach,
    extensions_of,
    first_problem,
    is_kept,
    kept,
    own_fields,
    without_extensions,
)
from llama_smart_proxy.proxy.chat.fold import Fold, Reply, fold, replay
from llama_smart_proxy.proxy.chat.passage import Found, Passage
from llama_smart_proxy.proxy.chat.record import Observer, RequestRecord, Timing
from llama_smart_proxy.proxy.chat.request import ChatRequest, first_text_part, last_user_message, text_of
from llama_smart_proxy.proxy.chat.sources import without_sources

__all__ = [
    "BACKGROUND_PROMPTS",
    "EXTENSIONS",
    "BackgroundKind",
    "ChatRequest",
    "Chunk",
    "ChunkStream",
    "Extensions",
    "Fold",
    "Found",
    "Json",
    "Observer",
    "Passage",
    "Reply",
    "RequestRecord",
    "Timing",
    "attach",
    "background_kind",
    "extensions_of",
    "first_problem",
    "first_text_part",
    "fold",
    "is_kept",
    "kept",
    "last_user_message",
    "own_fields",
    "replay",
    "say",
    "text_of",
    "without_extensions",
    "without_sources",
]
