"""Where tokens come from. Bytes only: nothing here knows a chat, a dialect or an agent.

The seam to the rest of the program is two types: a `Call` goes in, a `Backend` answers it with an open
`backends.exchange.Response`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.exchange import Response


@dataclass(slots=True)  # not frozen: that costs a microsecond, for every request
class Call:
    """One HTTP request to send upstream.

    `path` holds the query string too. `headers` are ready to send and carry neither `Host`, `Content-Length` nor
    credentials: the connection adds those. `slot` says whether the request generates, and so occupies one of the
    server's parallel slots, or is a mere question (`/props`, `/tokenize`). Without `wait`, a call that would have to
    wait until its model is loaded or has room fails at once (`Overloaded`, code `no_slot_now`).
    """

    method: str
    path: str
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()
    slot: bool = True
    wait: bool = True


class Backend(Protocol):
    """Opens calls to one model.

    `open` finds or makes the server that holds the model, sends the call and yields the response once its headers are
    in. Leaving the context gives everything back, at once, however it is left.

    `speaks` names the families of APIs that its server takes as they are: `openai`, `responses`, `anthropic`, `ollama`,
    and `native` for llama-server's own.

    Raises: `Overloaded`, `StartFailed`, `UpstreamFailed`, `ModelNotFound`.
    """

    speaks: ClassVar[frozenset[str]]

    def open(self, call: Call) -> AbstractAsyncContextManager[Response]: ...
