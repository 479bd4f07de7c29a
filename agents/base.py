"""The agent interface: a class with hooks around a chat, in its own file. `agents/README.md` shows how to write one.

An agent imports these names from `llama_smart_proxy`, and nothing else of this project.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Found, Json, Passage, Reply

T = TypeVar("T")


class Options(BaseModel):
    """Base of an agent's `Config`: unknown keys are errors, and values are checked again when they are set."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Agent:
    """Base class of agents. One object serves all requests concurrently, so nothing about a request may be stored on
    `self`: use local variables of `on_response`, and `ctx.state`.

    Users read the docstring of the subclass. Hooks that are not overridden cost nothing; with `on_request` alone the
    answer is relayed as unchanged bytes.

    A hook that raises ends the request with an error that names the agent; with `on_error: skip` in the configuration
    the request continues without the agent. `BadRequest` and the other errors of the proxy are passed to the client.
    Tasks that a hook starts are cancelled when the request ends or its client disconnects.
    """

    command: ClassVar[str | None] = None
    """The command that calls the agent: "rag" for `/rag`. An agent without one always runs."""
    per_call: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Config` that a command may set for its request: `/rag top_k=3 What is ...`."""
    tools: ClassVar[Sequence[Callable[..., Any]]] = ()
    """Functions that the model may call in a chat. The proxy describes them to the model by name, docstring and
    annotated parameters, calls them, and asks the model again with their results; clients see no more than the text.
    A parameter `self` is the agent, `ctx` the context. Plain functions run in threads."""

    class Config(Options):
        """The agent's options in `config.yaml`; `Field(description=...)` documents one."""

    def __init__(self, config: Any) -> None:
        self.config = config
        """As configured; in a hook, `ctx.config` also has the options of its request."""

    async def start(self) -> None:
        """Called once, before the first request, and again for the new object after a reload."""

    async def close(self) -> None:
        """Called once, when no request uses the object any more."""

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        """Modify `request` in place; or return a stream to answer it, so that no later agent and no model gets it.

        The answer still passes through the agents before this one, but not through this one.
        """
        return None

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        """Called for each chunk of the answer as it arrives. Returns its replacement, None to drop it."""
        return chunk

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        """Transform the whole answer, as an async generator: delay, drop, split or insert chunks, or stop early.

        Keep state in local variables and clean up in `finally`. Yield delayed text before returning. With `n` > 1 it is
        called for each choice, one after the other. By default it calls `on_chunk`.
        """
        async for chunk in stream:
            passed = await self.on_chunk(chunk, ctx)
            if passed is not None:
                yield passed

    async def on_reply(self, reply: Reply, ctx: Context) -> None:
        """Called after the end of a request with the answer as the client got it: whole, streamed, or broken off (not
        `reply.complete`). The client does not wait for it. Side calls have a budget of their own.
        """


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


class KeyValues(Protocol):
    """A small persistent store of texts and of what JSON can express. It is bounded: what was written longest ago is
    removed first."""

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""

    async def set(self, key: str, value: Any) -> None:
        """Set the value of `key`. Raises: ValueError for a key over 512 characters and a value over 256 KiB of JSON,
        TypeError for a value that JSON cannot express."""

    async def delete(self, key: str) -> None:
        """Remove `key`, if it is there."""

    async def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""


class Knowledge(Protocol):
    """The collections of documents that the client of the request may search."""

    async def collections(self) -> list[str]:
        """The names of those with any document; empty if there is no knowledge base."""

    async def search(self, query: str, collections: Sequence[str], *, limit: int = 10) -> Found:
        """The passages that answer `query` best, at most `limit`, of these collections, and how certain it is that they
        have the answer. `Passage.collection` is a name here. Raises: ProxyError for a collection that does not exist
        for the client, for a failure of the embedding model, and if there is no knowledge base."""

    async def grade(self, query: str, texts: Sequence[str]) -> list[float]:
        """How probable it is that each of `texts` answers `query`, as `Passage.relevance`. Raises: as `search`."""


class Context(Protocol):
    """The current request, and access to models. Each agent has its own: agents do not see each other's.

    Side calls (`chat`, `complete`, `embed`) go to any model of the proxy, through the same queues as every request, but
    without agents. They are read to their end in the background, independently of the agent's pace, and are cancelled
    when the request ends. While the request's own answer is generated, a side call gets a free slot at once or fails
    with `Overloaded`: it could wait for the very slot that the answer holds. All side calls of a request share a budget
    (`agent_limits` in the configuration).
    """

    @property
    def config(self) -> Any:
        """The agent's `Config`, including the options of this request."""

    @property
    def state(self) -> dict[str, Any]:
        """Values passed from one hook to later hooks of the same request."""

    @property
    def request(self) -> ChatRequest:
        """The request; in hooks for answers as it was sent to the model."""

    @property
    def asked_model(self) -> str:
        """The name of the model that the client asked for, which may be an alias or a virtual model."""

    @property
    def user(self) -> str:
        """Who asks: a hash of the API key, else the field `user` or `metadata.user_id`, else the header
        `X-OpenWebUI-User-Id`; empty if the client says nothing of that."""

    @property
    def store(self) -> KeyValues:
        """Keys and values of this agent that outlive a restart, if the state directory can be written."""

    @property
    def knowledge(self) -> Knowledge:
        """The documents that the client may search. Time in which the agent waits for it does not count towards its
        time limit."""

    @property
    def required(self) -> bool:
        """Whether the operator requires this agent: an answer without its work would be none."""

    @property
    def request_id(self) -> str:
        """As in the log and in the header `X-Request-Id`."""

    @property
    def chat_id(self) -> str:
        """A hash that is the same for all requests of one chat, and different for other chats."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The client's headers, names in lower case, without credentials."""

    @property
    def forward_headers(self) -> Mapping[str, str]:
        """Headers for an agent's own HTTP requests to this or another proxy: they prevent endless recursion."""

    @property
    def api(self) -> str:
        """The path of the client's request, such as `/v1/chat/completions`."""

    @property
    def server(self) -> str:
        """The kind of server of the request's model: `llama.cpp`, `ollama` or `remote`."""

    @property
    def agents(self) -> Sequence[About]:
        """All agents that are loaded, in alphabetical order."""

    async def status(self, text: str) -> None:
        """Show `text`, such as "Asking 3 models", to the user while nothing of the answer comes; empty for nothing.

        It stands above the answer in Open WebUI, once the user has waited for a second, until the next piece of the
        answer, which removes it. Other clients get it as reasoning with `server.loading_status: reasoning`, else not.
        It is no part of the answer: no agent, no model and no later request gets it.
        """

    async def event(self, kind: str, data: Json) -> None:
        """Send an event beside the answer to a client that shows events, at this place of the stream; others get
        nothing. `kind` and `data` are those of Open WebUI:

            source (or citation)  {"source": {"name": "Title", "url": "https://..."}, "document": ["text"],
                                   "metadata": [{"source": "Title"}]}: a chip below the answer
            status                {"description": "Searching", "done": False}: a line above the answer, until one with
                                   {"done": True, "hidden": True}; `ctx.status` is simpler
            notification          {"type": "info", "content": "..."}: shown for a moment

        An event before the answer waits for its headers. Like the answer of an agent, events are limited by
        `output_kib`. Raises: ValueError for another kind, TypeError for data that JSON cannot express.
        """

    def note(self, step: str, **details: Any) -> None:
        """Note for the operator what was done, to be seen in `GET /admin/why/{id}`: values that JSON can express, no
        texts of users. Of one request the first 40 are kept."""

    def leave_out(self, *names: str) -> None:
        """For `on_request`: exclude these agents from this request if they come later. No effect on agents that the
        request itself calls, or that the operator configured to run always."""

    def chat(self, request: ChatRequest) -> ChunkStream:
        """Send `request` to the model that it names. Starts at once; `request` may be modified afterwards.

        With `n` in its body the answers are interleaved, each with its `Chunk.index`; the prompt is evaluated once.
        Raises, while the stream is read: any `ProxyError` (`ModelNotFound`, `Overloaded`, `UpstreamFailed`, ...).
        """

    async def complete(self, request: ChatRequest) -> Reply:
        """As `chat`, with the complete answer."""

    async def embed(self, texts: Sequence[str], model: str) -> list[list[float]]:
        """One vector per text. Raises: as `chat`."""

    async def rerank(self, query: str, texts: Sequence[str], model: str) -> list[float]:
        """One score per text, by a reranking model: the higher, the better it answers `query`. Raises: as `chat`."""

    async def room(self, request: ChatRequest) -> int | None:
        """How many tokens are left for the answer to `request` in the context of its model, negative if its prompt is
        too long; None if that is unknown. Counted by the model's server where an estimate is not clear. Raises: any
        `ProxyError`."""

    async def page(self, url: str) -> list[Passage]:
        """The page of the web at `url`, which may come from anywhere: only public addresses are connected to, within
        limits of time and size, and its robots.txt is respected. Its text is not to be trusted. Raises: FetchError.
        """

    async def aside(self, steps: Generator[Any, None, T]) -> T:
        """Do long work beside the answers of others: runs the generator `steps` in a thread, a few milliseconds at a
        time with pauses, and returns its return value. Between two `yield` should pass a few milliseconds at most.
        """

    async def slots(self, model: str) -> int | None:
        """How many answers the server of `model` generates at the same time: the largest `n` that it accepts. Loads the
        model; None if that is unknown. Raises: any `ProxyError`."""

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """`models` in groups whose models can be loaded at the same time: used group by group, they need the fewest
        loads. Loaded models come first. Raises: ModelNotFound."""
