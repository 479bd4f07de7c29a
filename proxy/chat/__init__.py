"""The values of a chat, in one shape for all APIs: OpenAI's JSON, kept as parsed. No I/O.

Agents see these: `ChatRequest`, and an answer as a `ChunkStream` of `Chunk`s. `say` makes such a stream of a text, and
`fold` one `Reply` of a stream.

A request is an OpenAI chat body (`messages`) or text body (`prompt`); an answer is a sequence of chunks, each an OpenAI
`chat.completion.chunk`, and `Fold` makes one `chat.completion` of them. What a client's own API says beyond that stands
in the same object, set aside under `KEPT`: no field is lost on the way back into that API, and none gets into another.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.chat.chunk import Chunk, ChunkStream, say
from llama_smart_proxy.proxy.chat.extensions import KEPT, Json, Kept, bare, keep, kept
from llama_smart_proxy.proxy.chat.fold import Fold, Reply, fold
from llama_smart_proxy.proxy.chat.record import Observer, RequestRecord, Timing
from llama_smart_proxy.proxy.chat.request import ChatRequest, first_text_part, last_user_message, text_of

__all__ = [
    "KEPT",
    "ChatRequest",
    "Chunk",
    "ChunkStream",
    "Fold",
    "Json",
    "Kept",
    "Observer",
    "Reply",
    "RequestRecord",
    "Timing",
    "bare",
    "first_text_part",
    "fold",
    "keep",
    "kept",
    "last_user_message",
    "say",
    "text_of",
]
