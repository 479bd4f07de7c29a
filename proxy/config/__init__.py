"""The configuration: parsed, validated and complete. No other package reads the file.

`load_config` reads the file, the environment and the command line, in ascending order of precedence, and returns a
`Config` or raises `ConfigError` with every problem found. `schema`, `access`, `agents` and `providers` define the
fields,
`shapes`, `duration` and `command_line` parse single values, `text` parses YAML and JSON, `expansion` replaces `${VAR}`,
`environment` reads variables and flags, `legacy` renames the keys of the two projects that this one replaces, `checks`
validates fields together, `loading` combines them all.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.config.access import ApiKeyConfig, InferenceKeysConfig, digest_of, hash_of
from llama_smart_proxy.proxy.config.agents import AgentConfig, LimitsConfig
from llama_smart_proxy.proxy.config.command_line import missing_paths, spelled, without_secret_values
from llama_smart_proxy.proxy.config.commands import fill
from llama_smart_proxy.proxy.config.duration import Duration, Seconds, parse_duration
from llama_smart_proxy.proxy.config.filters import FiltersConfig
from llama_smart_proxy.proxy.config.loading import Reading, load_config, read_address, read_config
from llama_smart_proxy.proxy.config.providers import (
    BackendName,
    CardConfig,
    LlamaCppConfig,
    ModelConfig,
    OllamaConfig,
    PoolConfig,
    RemoteConfig,
    UpstreamConfig,
)
from llama_smart_proxy.proxy.config.schema import Config, ServerConfig, schema_json
from llama_smart_proxy.proxy.config.section import Section
from llama_smart_proxy.proxy.config.shapes import OWN_VARIABLE, checked_name, is_ollama_name

__all__ = [
    "OWN_VARIABLE",
    "AgentConfig",
    "ApiKeyConfig",
    "BackendName",
    "CardConfig",
    "Config",
    "Duration",
    "FiltersConfig",
    "InferenceKeysConfig",
    "LimitsConfig",
    "LlamaCppConfig",
    "ModelConfig",
    "OllamaConfig",
    "PoolConfig",
    "Reading",
    "RemoteConfig",
    "Seconds",
    "Section",
    "ServerConfig",
    "UpstreamConfig",
    "checked_name",
    "digest_of",
    "fill",
    "hash_of",
    "is_ollama_name",
    "load_config",
    "missing_paths",
    "parse_duration",
    "read_address",
    "read_config",
    "schema_json",
    "spelled",
    "without_secret_values",
]
