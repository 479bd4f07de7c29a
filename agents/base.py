"""What an agent is: a class with hooks around a chat, in a file of its own. `agents/README.md` shows how to write one.

An agent imports these names from `llama_smart_proxy`, and nothing else of this project.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Reply


class Options(BaseModel):
    """Base of an agent's `Config`: unknown keys are errors, and values are checked again when they are set."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Agent:
    """Takes part in chats. One object serves all requests at once, so nothing about a request is kept on `self`: local
    variables of `on_response` and `ctx.state` are for that.

    The docstring of the subclass is what users read about it. Hooks that are not overridden cost nothing; with
    `on_request` alone the answer passes the proxy as untouched bytes.

    A hook that raises ends the chat with an error that names the agent; with `on_error: skip` in the configuration the
    chat goes on without it. `BadRequest` and the other errors of the proxy reach the client as they are raised. Tasks
    that a hook starts are cancelled when the request has ended, or its client has left.
    """

    command: ClassVar[str | None] = None
    """The word that calls it: `/rag` if "rag". An agent without one runs always."""
    per_call: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Config` that a command may set for its request: `/rag top_k=3 What is ...`."""

    class Config(Options):
        """The options behind the agent's name in `config.yaml`; `Field(description=...)` documents one."""

    def __init__(self, config: Any) -> None:
        self.config = config
        """As configured; in a hook `ctx.config` has what its request asked for besides."""

    async def start(self) -> None:
        """Called once, before the first request, and again for the new object after a reload."""

    async def close(self) -> None:
        """Called once, when no request uses it any more."""

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        """Change `request` in place; or answer it by returning a stream, and neither later agents nor the model see it.

        The agents before still see the answer; this one does not.
        """
        return None

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        """Called for each piece of the answer as it arrives: what takes its place, None to drop it."""
        return chunk

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        """The whole answer, as an async generator: hold back, drop, split, inject, stop early.

        State goes into local variables, an end into `finally`. Text that was held back has to be yielded before
        returning. By default it drives `on_chunk`.
        """
        async for chunk in stream:
            passed = await self.on_chunk(chunk, ctx)
            if passed is not None:
                yield passed


@dataclass(frozen=True, slots=True)
class About:
    """The description of an agent for users: its `name`, its `command` (without the slash), its docstring's first
    paragraph, and the `options` that a call may set, each with its description. `running`: it takes part in this
    request."""

    name: str
    command: str | None
    description: str
    options: Mapping[str, str]
    running: bool


class Context(Protocol):
    """What an agent knows of the request at hand, and how it asks models. Its own: agents do not see each other's.

    Side calls (`chat`, `complete`, `embed`) go to any model the proxy offers, through the same queues as every request,
    but without agents. They are read to their end in the background, at a pace of their own, and are broken off
    when the request ends. While the model is answering the request itself, a side call gets a free slot at once or
    fails with `Overloaded`: it might wait for the very slot that the answer holds. All side calls of a request share a
    budget (`agent_limits` in the configuration).
    """

    @property
    def config(self) -> Any:
        """The agent's `Config`, with what this request asked for."""

    @property
    def state(self) -> dict[str, Any]:
        """Values that one hook leaves for a later hook of the same request."""

    @property
    def request_id(self) -> str:
        """As in the log and in the header `X-Request-Id`."""

    @property
    def chat_id(self) -> str:
        """The same for all requests of one chat, another one for other chats; not readable."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The client's headers, names in lower case, without credentials."""

    @property
    def forward_headers(self) -> Mapping[str, str]:
        """Headers for an agent's own HTTP requests to this or another proxy: they end endless recursion."""

    @property
    def api(self) -> str:
        """The path that the client asked, such as `/v1/chat/completions`."""

    @property
    def server(self) -> str:
        """Who runs the request's model: `llama.cpp`, `ollama` or `remote`."""

    @property
    def agents(self) -> Sequence[About]:
        """All agents that are loaded, in alphabetical order."""

    def leave_out(self, *names: str) -> None:
        """For `on_request`: these agents, if they come later, have no part in this request. But they have if it calls
        them itself, or the operator has them run always."""

    def chat(self, request: ChatRequest) -> ChunkStream:
        """Ask a model: the one that `request` names. Starts now; `request` may be changed afterwards.

        With `n` in its body the answers come interleaved, each with its `Chunk.index`; the prompt is evaluated once.
        Raises, while the stream is read: any `ProxyError` (`ModelNotFound`, `Overloaded`, `UpstreamFailed`, ...).
        """

    async def complete(self, request: ChatRequest) -> Reply:
        """The same, as a whole."""

    async def embed(self, texts: Sequence[str], model: str) -> list[list[float]]:
        """A vector for each of `texts`. Raises: as `chat`."""

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """`models` in groups, each of which can be loaded at one time: asked group by group, they need the fewest
        loads. Those loaded now come first. Raises: ModelNotFound."""
