"""The fields of the configuration that say where models are: processes, files, and other servers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.agents import AgentConfig
from llama_smart_proxy.proxy.config.commands import CommandConfig
from llama_smart_proxy.proxy.config.duration import Duration, Seconds
from llama_smart_proxy.proxy.config.filters import FiltersConfig
from llama_smart_proxy.proxy.config.section import Section

BackendName = Literal["llama.cpp", "ollama"]
RunnerName = Literal["llama.cpp", "ollama", "command"]
EMBEDDING_FLAGS = {"--embedding", "--embeddings"}
RERANKING_FLAGS = {"--rerank", "--reranking"}
Port = Annotated[int, Field(ge=1, le=65535)]


class PoolConfig(Section):
    """The llama-server processes: their number, ports and time limits."""

    size: int = Field(default=2, ge=1, description="Most llama-server processes that live at one time.")
    helpers: int = Field(
        default=1,
        ge=0,
        description="Most processes of helpers (models for embeddings and reranking) that live beside those; neither "
        "makes room for the other. 0: they are like other models.",
    )
    host: str = Field(default="127.0.0.1", description="Loopback address the processes listen on.")
    port_start: Port = Field(default=11600, description="First port given to a process.")
    port_end: Port | None = Field(default=None, description="Last port given to a process; by default port_start + 99.")
    queue_limit: int = Field(
        default=512, ge=0, description="Most requests that wait for a model; beyond it, status 503."
    )
    queue_timeout_s: Seconds = Field(
        default=600.0, gt=0, description="Seconds a request may wait for a model before status 503."
    )
    load_timeout_s: Seconds = Field(
        default=600.0,
        gt=0,
        description="Seconds a starting process may be silent; any line it logs starts the count anew.",
    )
    stop_timeout_s: Seconds = Field(default=5.0, description="Seconds between SIGTERM and SIGKILL for a process.")
    swap_after_s: Seconds = Field(
        default=1.0,
        description="Seconds a request waits for a busy process of another model before that one is drained.",
    )
    keep_alive: Duration = Field(
        default=300.0, description="Seconds an idle model stays loaded; negative is for ever, 0 unloads at once."
    )
    first_byte_timeout_s: Seconds = Field(
        default=600.0, gt=0, description="Seconds a process may take to send the first byte of its answer."
    )
    idle_timeout_s: Seconds = Field(
        default=120.0, gt=0, description="Seconds a process may be silent in the middle of its answer."
    )
    stall_timeout_s: Seconds = Field(
        default=60.0,
        description="Seconds in which a process generates nothing although requests wait, uses no processor time and "
        "reports no work; then it is replaced. 0: never.",
    )
    tasks: Literal["last", "equal"] = Field(
        default="last",
        description="Background prompts of chat UIs (titles, tags, follow-ups): last lets people's requests go first, "
        "and limits them in tokens; equal treats them as people's requests.",
    )
    autoload: bool = Field(
        default=True,
        description="Whether a request loads its model; if not, requests for a model that is not loaded get status "
        "400, and POST /models/load loads it.",
    )
    gpu_layers: int | None = Field(
        default=None, description="Layers to put on the GPU for every model (-ngl); negative leaves it to llama-server."
    )

    @field_validator("host")
    @classmethod
    def _loopback_only(cls, host: str) -> str:
        return shapes.loopback(host)

    @model_validator(mode="after")
    def _fill_port_end(self) -> Self:
        if self.port_end is None:
            self.port_end = min(self.port_start + 99, 65535)
        return self

    @property
    def ports(self) -> range:
        """Every port a process may be given."""
        return range(self.port_start, (self.port_end or self.port_start) + 1)


class CardConfig(Section):
    """What model lists show about a model, in place of what is known of it otherwise."""

    description: str | None = Field(
        default=None, max_length=2000, description="What chat UIs show about it; by default its size and the like."
    )
    suggestions: shapes.Texts = Field(
        default_factory=list, description="Prompts that chat UIs suggest at the start of a chat with it."
    )
    hidden: bool | None = Field(
        default=None,
        description="Whether chat UIs leave it out of the list that users choose from; by default those that generate "
        "no text are left out. Requests are answered in any case.",
    )


class ModelConfig(CardConfig, CommandConfig):
    """One model that the proxy offers by name. Its weights are one of: path, package and file, repo; or `cmd` runs its
    server."""

    path: Path | None = Field(default=None, description="GGUF file on disk.")
    package: str | None = Field(
        default=None, description="Installed Python package that contains the weights named by `file`."
    )
    file: str | None = Field(
        default=None,
        description="File inside `package`: a GGUF, or the .safetensors of a BERT embedding model, of which a GGUF is "
        "made once.",
    )
    repo: str | None = Field(default=None, description="Hugging Face repository, such as org/name-GGUF.")
    variant: str | None = Field(
        default=None,
        description="Which file of `repo`: a quantisation such as Q4_K_M, a file name, or a pattern. What to make of "
        "safetensors: Q8_0 or F16.",
    )
    title: str | None = Field(
        default=None,
        max_length=100,
        description="What chat UIs call it; by default what its file says, and a virtual model by its name.",
    )
    model: str | None = Field(
        default=None, description="Another model that answers under this name, in place of weights: a virtual model."
    )
    filters: FiltersConfig | None = Field(
        default=None, description="Fields of requests that are removed or set before its server gets them."
    )
    agents: Annotated[shapes.Entries[AgentConfig] | None, BeforeValidator(shapes.false_is_none)] = Field(
        default_factory=list, description="Agents that take part in all its chats; false: none, not even when called."
    )
    aliases: Annotated[list[shapes.Name], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list, description="Other names that clients may use for this model."
    )
    args: shapes.Args = Field(default_factory=list, description="Extra llama-server flags, added last.")
    env: shapes.Environment = Field(
        default_factory=dict, description="Environment variables for its process; null removes one."
    )
    ctx: int | None = Field(
        default=None,
        ge=0,
        description="Context size in tokens. With llama.cpp for all slots (-c), 0 is the size the model was trained "
        "with; with Ollama the num_ctx of every request, in place of its client's.",
    )
    parallel: int | None = Field(default=None, ge=1, description="Requests answered at the same time (-np).")
    concurrent: int | None = Field(
        default=None,
        ge=1,
        description="Most requests that its server gets at one time, also if it could answer more; others wait.",
    )
    keep_alive: Duration | None = Field(
        default=None, description="Seconds it stays loaded when idle, in place of server_pool.keep_alive."
    )
    load_timeout_s: Seconds | None = Field(
        default=None,
        gt=0,
        description="Seconds its process may be silent while it starts, in place of server_pool.load_timeout_s.",
    )
    stop_timeout_s: Seconds | None = Field(
        default=None, description="Seconds its process may take to stop, in place of server_pool.stop_timeout_s."
    )
    preload: bool = Field(default=False, description="Load it when the proxy starts.")
    pinned: bool = Field(default=False, description="Never evict it to make room for another model.")
    helper: bool | None = Field(
        default=None,
        description="Whether it has one of the places of server_pool.helpers; by default models for embeddings and "
        "reranking do.",
    )
    resumable_streams: bool = Field(
        default=False,
        description="Let clients resume a stream by X-Conversation-Id and /v1/stream of llama-server, which then "
        "generates to the end after its client has left.",
    )
    backend: BackendName | None = Field(
        default=None, description="What runs it; by default llama.cpp if it has a source, else the top-level backend."
    )

    @property
    def has_source(self) -> bool:
        """Whether any field that names weights is set."""
        return any((self.path, self.package, self.file, self.repo, self.variant))

    @property
    def is_converted(self) -> bool:
        """Whether its GGUF file is made of safetensors, and so is an embedding model's."""
        return self.package is not None and (self.file or "").endswith(".safetensors")

    @property
    def embeds(self) -> bool:
        """Whether its source or its flags show that it makes vectors in place of texts."""
        return self.is_converted or not EMBEDDING_FLAGS.isdisjoint(self.args)

    @property
    def reranks(self) -> bool:
        """Whether its flags show that it ranks documents in place of writing texts."""
        return not RERANKING_FLAGS.isdisjoint(self.args)


class LlamaCppConfig(Section):
    """The program that runs GGUF models, and the models it runs."""

    server: str | None = Field(
        default=None,
        description="Path or name of llama-server, or `embedded` for the built-in one; by default llama-server "
        "if it is on PATH, else embedded.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Accept a server that does not enforce the API key it is given, or that another process than the "
        "one started runs, as in a container; other processes of this machine can use it, too.",
    )
    transport: Literal["tcp", "unix"] = Field(
        default="tcp",
        description="How its processes are reached: tcp at a port of server_pool, or unix at a socket in a folder that "
        "only this user can enter.",
    )
    args: shapes.Args = Field(default_factory=list, description="llama-server flags for every model.")
    env_passthrough: shapes.Passthrough = Field(
        default_factory=list,
        description="Variables of the proxy's environment that every llama-server gets, besides those of GPUs and "
        "drivers: names, or patterns such as MY_*, which match no secrets.",
    )
    models: dict[shapes.Name, ModelConfig] = Field(
        default_factory=dict, description="Models by name; the same as the top-level models."
    )
    models_dir: Path | None = Field(
        default=None,
        description="Folder whose *.gguf files, and those below it, are offered, each by its name without the ending.",
    )
    hf_cache: bool = Field(
        default=True,
        description="Offer every GGUF model of the local Hugging Face cache, as hf.co/org/repo:VARIANT.",
    )


class UpstreamConfig(Section):
    """The settings that all servers not started by the proxy have in common."""

    api_key: SecretStr | None = Field(default=None, description="Key sent to it as `Authorization: Bearer`.")
    models: Annotated[list[str], BeforeValidator(shapes.comma_list)] | None = Field(
        default=None, description="Model names it serves; by default all that it lists."
    )
    connect_timeout_s: Seconds = Field(
        default=5.0, gt=0, description="Seconds to wait for a connection, with the look-up of its name."
    )
    first_byte_timeout_s: Seconds = Field(
        default=600.0, gt=0, description="Seconds it may take to send the first byte of its answer."
    )
    idle_timeout_s: Seconds = Field(
        default=120.0, gt=0, description="Seconds it may be silent in the middle of its answer."
    )

    @field_validator("api_key", mode="before")
    @classmethod
    def _text_only(cls, key: object) -> object:
        return shapes.quoted(key)


class RemoteConfig(UpstreamConfig, CardConfig):
    """An OpenAI-compatible server that requests are forwarded to. Its card is that of each of its models."""

    url: str = Field(
        description="Its base URL, http or https, as other clients take it: http://h:8000/v1, https://h/api/v3. One "
        "without a path gets /v1."
    )
    filters: FiltersConfig | None = Field(
        default=None, description="Fields of requests that are removed or set before it gets them, of all its models."
    )
    concurrent: int | None = Field(
        default=None, ge=1, description="Most requests that it gets at one time; others wait. By default any number."
    )
    responses: bool = Field(default=False, description="Use its own /v1/responses where no agent reads the request.")
    forward_headers: Annotated[list[shapes.Header], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list,
        description="Headers about the user, or with credentials, that it gets from clients, such as "
        "X-OpenWebUI-User-Email; a * at the end stands for any rest. By default it gets none.",
    )

    @field_validator("url")
    @classmethod
    def _base_url(cls, url: str) -> str:
        return shapes.base_url(url)


class OllamaConfig(UpstreamConfig):
    """The Ollama servers (hosts) that run models of backend `ollama`, and whose models are offered."""

    host: shapes.Hosts = Field(
        default=["127.0.0.1"],
        min_length=1,
        description="One host or several, as a list or separated by commas; each a name, an address or a URL, with or "
        "without the port.",
    )
    port: Port | None = Field(default=None, description="Port of hosts given without one, in place of 11434.")
    pull: Literal["auto", "never"] = Field(
        default="auto",
        description="What to do about a model that no host has: auto pulls it at the first request for it, never "
        "returns status 404.",
    )

    @property
    def urls(self) -> list[str]:
        """The base URL of each host, with scheme and port, without a trailing slash and without duplicates."""
        return list(dict.fromkeys(map(self._url, self.host)))

    def _url(self, host: str) -> str:
        parts = urlsplit(shapes.http_url(shapes.with_scheme(host)))
        port = parts.port or self.port or (443 if parts.scheme == "https" else 11434)
        path = re.sub(r"/(v1|api)$", "", parts.path)  # what OpenAI's and Ollama's clients have in their base URL
        return f"{parts.scheme}://{shapes.bracketed(parts.hostname or '')}:{port}{path}"
