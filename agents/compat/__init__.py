"""Plugins of the two projects that this one replaces, run as agents. No agent itself.

ollama-smart-proxy's are classes derived from `BaseAgent`, with coroutines `on_request` and `on_response`;
llama-smart-proxy's have plain functions `process_request` and `process_response`. Each is called by a command, as it
was there. The parts: `standins` (what such a plugin imports), `adapter` (the class that runs its hooks), `views` (what
these see of a chat, and what becomes of their edits).
"""

from __future__ import annotations

from llama_smart_proxy.agents.compat.adapter import Misfit, adapted, manifest
from llama_smart_proxy.agents.compat.standins import standing_in

__all__ = ["Misfit", "adapted", "manifest", "standing_in"]
