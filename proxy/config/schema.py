"""Every field of the configuration, with its default, unit and description.

Fields are validated one by one here; `proxy.config.checks` validates them together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.duration import Duration, Seconds

BackendName = Literal["llama.cpp", "ollama"]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """A mapping in the file. Unknown keys are errors; null and the empty text mean the default."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _unset_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_fields or value not in (None, "")}


class ServerConfig(Section):
    """The socket for clients, and the limits of one client."""

    host: shapes.Address = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 is every IPv4 interface, :: every interface."
    )
    port: int = Field(default=11555, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    allow_unauthenticated: bool = Field(
        default=False,
        description="Listen beyond loopback without authentication on purpose: there is no warning about it.",
    )
    allow_origins: shapes.Origins = Field(
        default_factory=list,
        description="Origins of web pages that may send requests, such as https://chat.example, besides pages on this "
        "machine; * is every one.",
    )
    max_body_mib: int = Field(default=64, ge=1, description="Largest request body, in MiB; larger ones get status 413.")
    drain_s: Seconds = Field(
        default=30.0, description="Seconds that requests in progress may take to finish at shutdown."
    )
    head_timeout_s: Seconds = Field(
        default=10.0, gt=0, description="Seconds a client may take to send a request's headers."
    )
    send_stall_s: Seconds = Field(
        default=60.0, gt=0, description="Seconds a client may go without reading its answer before it is dropped."
    )
    keepalive_timeout_s: Seconds = Field(
        default=75.0, gt=0, description="Seconds an idle client connection stays open between requests."
    )


class PoolConfig(Section):
    """The llama-server processes: their number, ports and time limits."""

    size: int = Field(default=2, ge=1, description="Most llama-server processes that live at one time.")
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


class AgentConfig(Section):
    """One agent that takes part in chats. In the file: its name, or `{name: {option: value}}`; `always`, `required`,
    `on_error` and `timeout_s` are given among its options there."""

    name: str = Field(description="Name of the agent.")
    always: bool | None = Field(
        default=None, description="Whether it runs without being called; by default if it has no command."
    )
    required: bool = Field(
        default=False, description="It cannot be switched off, and requests that it cannot process are refused."
    )
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="Whether its failure fails the chat, or the chat continues without it."
    )
    timeout_s: Seconds | None = Field(default=None, gt=0, description="Seconds, in place of agent_limits.timeout_s.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its own settings, checked by the agent.")

    @model_validator(mode="before")
    @classmethod
    def _split_options(cls, data: Any) -> Any:
        options = data.get("options") if isinstance(data, dict) else None
        if not isinstance(options, dict):
            return data
        own = {
            key: value for key, value in options.items() if key in cls.model_fields and key not in ("name", "options")
        }
        return {**data, **own, "options": {key: value for key, value in options.items() if key not in own}}


class ModelConfig(Section):
    """One model that the proxy offers by name. Its weights are one of: path, package and file, repo."""

    path: Path | None = Field(default=None, description="GGUF file on disk.")
    package: str | None = Field(
        default=None, description="Installed Python package that contains the GGUF named by `file`."
    )
    file: str | None = Field(default=None, description="File name of the GGUF inside `package`.")
    repo: str | None = Field(default=None, description="Hugging Face repository, such as org/name-GGUF.")
    variant: str | None = Field(
        default=None, description="Which file of `repo`: a quantisation such as Q4_K_M, a file name, or a pattern."
    )
    model: str | None = Field(
        default=None, description="Another model that answers under this name, in place of weights: a virtual model."
    )
    agents: Annotated[shapes.Entries[AgentConfig] | None, BeforeValidator(shapes.false_is_none)] = Field(
        default_factory=list, description="Agents that take part in all its chats; false: none, not even when called."
    )
    aliases: Annotated[list[shapes.Name], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list, description="Other names that clients may use for this model."
    )
    args: shapes.Args = Field(default_factory=list, description="Extra llama-server flags, added last.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables for its process.")
    ctx: int | None = Field(
        default=None,
        ge=0,
        description="Context size in tokens. With llama.cpp for all slots (-c), 0 is the size the model was trained "
        "with; with Ollama the num_ctx of every request, in place of its client's.",
    )
    parallel: int | None = Field(default=None, ge=1, description="Requests answered at the same time (-np).")
    keep_alive: Duration | None = Field(
        default=None, description="Seconds it stays loaded when idle, in place of server_pool.keep_alive."
    )
    preload: bool = Field(default=False, description="Load it when the proxy starts.")
    pinned: bool = Field(default=False, description="Never evict it to make room for another model.")
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


class LlamaCppConfig(Section):
    """The program that runs GGUF models, and the models it runs."""

    server: str | None = Field(
        default=None,
        description="Path or name of llama-server, or `embedded` for the built-in one; by default llama-server "
        "if it is on PATH, else embedded.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Accept a server that does not enforce the API key it is given; other processes of this machine "
        "can use it, too.",
    )
    args: shapes.Args = Field(default_factory=list, description="llama-server flags for every model.")
    models: dict[shapes.Name, ModelConfig] = Field(
        default_factory=dict, description="Models by name; the same as the top-level models."
    )
    models_dir: Path | None = Field(
        default=None, description="Folder whose *.gguf files are offered, each by its name without the ending."
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
    connect_timeout_s: Seconds = Field(default=5.0, gt=0, description="Seconds to wait for a connection.")
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


class RemoteConfig(UpstreamConfig):
    """An OpenAI-compatible server that requests are forwarded to."""

    url: str = Field(description="Its base URL, http or https, with or without the final /v1.")
    responses: bool = Field(default=False, description="Use its own /v1/responses where no agent reads the request.")

    @field_validator("url")
    @classmethod
    def _http_url(cls, url: str) -> str:
        return re.sub(r"/v1$", "", shapes.http_url(url))


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
        return f"{parts.scheme}://{shapes.bracketed(parts.hostname or '')}:{port}{parts.path.removesuffix('/v1')}"


class LimitsConfig(Section):
    """The limits of agents for one request."""

    timeout_s: Seconds = Field(
        default=30.0, gt=0, description="Seconds an agent may delay a request, not counting time it waits for models."
    )
    output_kib: int = Field(default=1024, ge=1, description="Most KiB that one agent may add to an answer.")
    side_calls: int = Field(default=32, ge=0, description="Most requests that agents may send to models.")
    side_calls_at_once: int = Field(default=8, ge=1, description="Most of them at one time; others wait.")
    side_tokens: int = Field(default=100_000, ge=0, description="Most tokens generated for them in all.")
    side_call_s: Seconds = Field(default=600.0, gt=0, description="Seconds that each of them may take.")


class Config(Section):
    """The whole configuration. After loading, `models` also contains those of `llama_cpp.models`."""

    backend: BackendName = Field(
        default="llama.cpp", description="What runs models without a backend of their own: llama.cpp or ollama."
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="Where and how the proxy listens.")
    server_pool: PoolConfig = Field(default_factory=PoolConfig, description="The llama-server processes.")
    llama_cpp: LlamaCppConfig = Field(default_factory=LlamaCppConfig, description="How GGUF models are run.")
    models: dict[shapes.Name, ModelConfig] = Field(default_factory=dict, description="Models by name.")
    remotes: dict[shapes.Name, RemoteConfig] = Field(
        default_factory=dict, description="OpenAI-compatible servers to forward to, by a name of your choice."
    )
    ollama: OllamaConfig = Field(default_factory=OllamaConfig, description="The Ollama servers to forward to.")
    agents: shapes.Entries[AgentConfig] = Field(
        default_factory=list,
        description="Agents in the order in which they see a request; left out, all that are in agents_dirs.",
    )
    agent_limits: LimitsConfig = Field(
        default_factory=LimitsConfig, description="The limits of agents for one request."
    )
    slash_commands: bool = Field(
        default=True, description="Whether users can call agents by commands such as /rag in their messages."
    )
    agents_dirs: Annotated[list[Path], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list, description="Folders with further agents."
    )
    modules: Annotated[list[Path], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list, description="Python files that add backends, APIs or observers of requests."
    )
    sections: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings of the backends that `modules` add, by the name of their section."
    )
    state_dir: Path | None = Field(
        default=None,
        description="Folder for what is kept over a restart; by default $STATE_DIRECTORY (of systemd), or "
        "llama-smart-proxy in $XDG_STATE_HOME or ~/.local/state.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(shapes.lower)] = Field(
        default="info", description="Least important messages to log."
    )

    _warnings: list[str] = []
    _plugins_dir: Path | None = None
    _enabled_dirs: list[Path] = []
    _virtual: dict[str, ModelConfig] = {}

    @model_validator(mode="after")
    def _merge_models(self) -> Self:
        merged = {**self.llama_cpp.models, **self.models}
        self._virtual = {name: model for name, model in merged.items() if model.model is not None}
        self.models = {name: model for name, model in merged.items() if model.model is None}
        return self

    @property
    def virtual(self) -> dict[str, ModelConfig]:
        """The virtual models: another model under a different name, with its own agents. `models` has all others."""
        return self._virtual

    @property
    def plugins_dir(self) -> Path | None:
        """The folder `plugins` beside the file, if there is one: llama-smart-proxy had its plugins there."""
        return self._plugins_dir

    def set_plugins_dir(self, folder: Path) -> None:
        """For the loading of the file."""
        self._plugins_dir = folder

    @property
    def enabled_dirs(self) -> list[Path]:
        """Those of `agents_dirs` that come from a setting of a replaced project: all agents in them are enabled, even
        if `agents` does not list them."""
        return self._enabled_dirs

    @property
    def warnings(self) -> list[str]:
        """Problems that do not prevent loading, each as `file: path: warning`."""
        return self._warnings

    def default_args(self) -> list[str]:
        """The llama-server flags that every model gets, before its own."""
        layers = self.server_pool.gpu_layers
        return [*(["-ngl", str(layers)] if layers is not None and layers >= 0 else []), *self.llama_cpp.args]

    @property
    def uses_ollama(self) -> bool:
        """Whether Ollama servers are used: some field configures them, or some model requires them."""
        named = self.backend == "ollama" or "ollama" in self.model_fields_set
        return named or any(self.backend_of(name) == "ollama" for name in self.models)

    def backend_of(self, name: str) -> BackendName:
        """What runs the model `name`. Raises: KeyError if it is not configured."""
        model = self.models[name]
        if model.backend is not None:
            return model.backend
        return "llama.cpp" if model.has_source or name in self.llama_cpp.models else self.backend


def schema_json() -> str:
    """The JSON schema of the configuration file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema | {"title": "llama-smart-proxy configuration"}, indent=2, ensure_ascii=False)
