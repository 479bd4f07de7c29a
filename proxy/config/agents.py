"""The fields of the configuration about agents."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llama_smart_proxy.proxy.config.duration import Seconds
from llama_smart_proxy.proxy.config.section import Section


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
