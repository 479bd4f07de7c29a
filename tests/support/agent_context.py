"""The context that the proxy makes for an agent, for what an agent does outside a chat."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from pydantic import BaseModel

from llama_smart_proxy import Agent
from llama_smart_proxy.agents.loader import AgentSource
from llama_smart_proxy.proxy.config import AgentConfig, LimitsConfig
from llama_smart_proxy.proxy.fetching import Pages
from llama_smart_proxy.proxy.middleware.chain import ActiveAgent, Selection
from llama_smart_proxy.proxy.middleware.context import AgentContext, RequestFacts
from llama_smart_proxy.proxy.middleware.loaded import LoadedAgent
from llama_smart_proxy.proxy.middleware.plugins import Plugin
from llama_smart_proxy.proxy.middleware.scope import Scope


def agent_context(pages: Pages | None = None, options: BaseModel | None = None) -> AgentContext:
    """The context of an agent with these options, in a proxy without models and knowledge that reads these pages."""
    settings = AgentConfig(name="scripted")
    plugin = Plugin("scripted", settings, AgentSource("scripted"), True)
    agent = Agent(Agent.Config())
    active = ActiveAgent(plugin, LoadedAgent(agent), options or agent.config, settings, explicit=True)
    calls = cast(Any, SimpleNamespace(limits=LimitsConfig()))
    return AgentContext(active, RequestFacts({}, "", "", "", Selection(), pages=pages), Scope(), calls)
