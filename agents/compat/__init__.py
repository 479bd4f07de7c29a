"""Runs plugins of the two replaced projects as agents. This module is not an agent itself.

ollama-smart-proxy's are classes derived from `BaseAgent`, with coroutines `on_request` and `on_response`;
llama-smart-proxy's have plain functions `process_request` and `process_response`. Each is called by a command, as
before. The parts: `standins` (the modules such a plugin imports), `adapter` (the agent that runs its hooks), `views`
(the hooks' view of a chat, and applying their edits).
"""

from __future__ import annotations

from llama_smart_proxy.agents.compat.adapter import Misfit, adapted, manifest
from llama_smart_proxy.agents.compat.standins import standing_in

__all__ = ["Misfit", "adapted", "manifest", "standing_in"]
