"""What the operator wrote, checked and complete: the one place that knows the configuration file.

`load_config` reads the file, the environment and the command line, in rising order of authority, and returns a
`Config` or raises `ConfigError` with every problem it found. `schema` names the fields, `shapes` and `duration` read
single values, `text` reads YAML and JSON, `expansion` fills in `${VAR}`, `environment` lays variables over the file,
`legacy` translates the keys of the two projects this one replaces, `checks` looks at fields together, `loading` runs
them all.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.config.duration import Duration, Seconds, parse_duration
from llama_smart_proxy.proxy.config.loading import Reading, load_config, read_config
from llama_smart_proxy.proxy.config.schema import (
    AgentConfig,
    BackendName,
    Config,
    LimitsConfig,
    LlamaCppConfig,
    ModelConfig,
    OllamaConfig,
    PoolConfig,
    RemoteConfig,
    Section,
    ServerConfig,
    UpstreamConfig,
    schema_json,
)
from llama_smart_proxy.proxy.config.shapes import checked_name

__all__ = [
    "AgentConfig",
    "BackendName",
    "Config",
    "Duration",
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
    "load_config",
    "parse_duration",
    "read_config",
    "schema_json",
]
