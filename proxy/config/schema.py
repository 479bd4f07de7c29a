"""Every field of the configuration, with its default, unit and description.

Fields are validated one by one here; `proxy.config.checks` validates them together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from llama_smart_proxy.proxy.config import shapes
from llama_smart_proxy.proxy.config.access import ApiKeys, InferenceKeysConfig, Unauthenticated
from llama_smart_proxy.proxy.config.agents import AgentConfig, LimitsConfig
from llama_smart_proxy.proxy.config.duration import Seconds
from llama_smart_proxy.proxy.config.history import HistoryConfig, PostgresUrl
from llama_smart_proxy.proxy.config.knowledge import KnowledgeConfig
from llama_smart_proxy.proxy.config.problems import Loc
from llama_smart_proxy.proxy.config.providers import (
    BackendName,
    LlamaCppConfig,
    ModelConfig,
    OllamaConfig,
    PoolConfig,
    RemoteConfig,
    RunnerName,
)
from llama_smart_proxy.proxy.config.section import Section


class ServerConfig(Section):
    """The socket for clients, and the limits of one client."""

    host: shapes.Address = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 is every IPv4 interface, :: every interface."
    )
    port: int = Field(default=11555, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: ApiKeys = Field(
        default_factory=list,
        description="The keys of clients, as texts or as mappings; without any, none is required.",
    )
    inference_keys: InferenceKeysConfig = Field(
        default_factory=InferenceKeysConfig, description="What keys of scope inference may do beside inference."
    )
    allow_unauthenticated: Unauthenticated = Field(
        default=False,
        description="Listen beyond loopback without keys on purpose: true lets everyone use models, admin do all.",
    )
    allow_origins: shapes.Origins = Field(
        default_factory=list,
        description="Origins of web pages that may send requests, such as https://chat.example, besides pages on this "
        "machine; * is every one.",
    )
    allow_hosts: shapes.HostNames = Field(
        default_factory=list,
        description="Names of the proxy in the Host header of requests, such as chat.example, besides addresses, names "
        "without a dot and those of this machine; *.chat.example is all below it, * every one.",
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
    early_headers: bool = Field(
        default=True,
        description="Whether a client that waits for a stream gets its headers after a second, and signs of life, "
        "before it is known whether there will be an answer.",
    )
    status_events: Annotated[Literal["auto", "on", "off"], BeforeValidator(shapes.switch)] = Field(
        default="auto",
        description="Who gets status lines while waiting, and events of agents, in /v1/chat/completions: clients with "
        "headers of Open WebUI (auto), all (on), none (off).",
    )
    loading_status: Annotated[Literal["off", "reasoning"], BeforeValidator(shapes.switch)] = Field(
        default="off", description="Whether other clients get the status lines as reasoning, where their API allows."
    )


class TelemetryConfig(Section):
    """Where traces of requests are sent to."""

    otlp: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="URL of an OpenTelemetry collector, such as http://localhost:4318 (OTLP over HTTP); requires "
        "llama-smart-proxy[otel]. The standard OTEL_ variables have an effect, too.",
    )


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
    knowledge: KnowledgeConfig = Field(
        default_factory=KnowledgeConfig, description="Documents that questions are answered from."
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
    env_passthrough: shapes.Passthrough = Field(
        default_factory=list, description="The same as llama_cpp.env_passthrough, to which it is added."
    )
    state_dir: Path | None = Field(
        default=None,
        description="Folder for what is kept over a restart; by default $STATE_DIRECTORY (of systemd), or "
        "llama-smart-proxy in $XDG_STATE_HOME or ~/.local/state.",
    )
    store: PostgresUrl | None = Field(
        default=None,
        description="postgresql:// URL of the database for what is kept over a restart, in place of a file in "
        "state_dir. Requires the extra [postgres].",
    )
    history: HistoryConfig = Field(
        default_factory=HistoryConfig, description="What is kept about requests, none of which is what they said."
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(shapes.lower)] = Field(
        default="info", description="Least important messages to log."
    )
    log_format: Annotated[Literal["auto", "text", "logfmt", "json"], BeforeValidator(shapes.lower)] = Field(
        default="auto",
        description="The form of the log: text for people, logfmt or json for programs; auto is text on a terminal and "
        "logfmt elsewhere.",
    )
    log_content: bool = Field(
        default=False,
        description="Whether the log has prompts and answers: one line for each request, and what exceptions of agents "
        "and errors of servers quote of them.",
    )
    telemetry: TelemetryConfig = Field(
        default_factory=TelemetryConfig, description="Traces of requests, by OpenTelemetry."
    )

    _warnings: list[str] = PrivateAttr(default_factory=list)
    _plugins_dir: Path | None = None
    _old_form: bool = False
    _enabled_dirs: list[Path] = PrivateAttr(default_factory=list)
    _virtual: dict[str, ModelConfig] = PrivateAttr(default_factory=dict)

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
    def is_old_form(self) -> bool:
        """Whether the file is one of a replaced project. It may name agents that do not exist here."""
        return self._old_form

    def set_old_form(self) -> None:
        """For the loading of the file."""
        self._old_form = True

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
    def passthrough(self) -> list[str]:
        """The names and patterns of `env_passthrough`, of either section."""
        return [*self.llama_cpp.env_passthrough, *self.env_passthrough]

    @property
    def uses_ollama(self) -> bool:
        """Whether Ollama servers are used: some field configures them, or some model requires them."""
        named = self.backend == "ollama" or "ollama" in self.model_fields_set
        return named or any(self.backend_of(name) == "ollama" for name in self.models)

    def is_helper(self, name: str, model: ModelConfig) -> bool:
        """Whether the model has a place beside those of other models."""
        if model.helper is not None:
            return model.helper
        used = {(used or "").lower() for used in (self.knowledge.embedder, self.knowledge.reranker)}
        return model.embeds or model.reranks or not used.isdisjoint(own.lower() for own in (name, *model.aliases))

    @property
    def helpers(self) -> int:
        """How many of the places for helpers the configured models can take."""
        found = sum(self.is_helper(name, model) for name, model in self.models.items() if self.is_pooled(name))
        return min(self.server_pool.helpers, found)

    def is_pooled(self, name: str) -> bool:
        """Whether the model runs in a process of the pool."""
        return self.backend_of(name) != "ollama"

    def path_of(self, name: str) -> str:
        """The path of the model in the file: `models.m`, or `llama_cpp.models.m`."""
        return f"llama_cpp.models.{name}" if name in self.llama_cpp.models else f"models.{name}"

    def backend_of(self, name: str) -> RunnerName:
        """What runs the model `name`. Raises: KeyError if it is not configured."""
        model = self.models[name]
        if model.cmd:
            return "command"
        if model.backend is not None:
            return model.backend
        return "llama.cpp" if model.has_source or name in self.llama_cpp.models else self.backend


def is_verbatim(loc: Loc) -> bool:
    """Whether a number or a boolean at this path of the file stands for the text as it is written: `1.10` in the
    environment of a process, or among the arguments of one."""
    if loc[:2] in (("llama_cpp", "models"), ("llama_cpp", "args")):
        loc = ("models", *loc[2:]) if loc[1] == "models" else ("models", "", *loc[1:])
    return len(loc) == 4 and loc[0] == "models" and loc[2] in ("args", "env", "cmd", "cmd_stop")


def schema_json() -> str:
    """The JSON schema of the configuration file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema | {"title": "llama-smart-proxy configuration"}, indent=2, ensure_ascii=False)
