"""Agents: middleware around every chat. `agents.base` is what an agent is; every other module here is one."""
