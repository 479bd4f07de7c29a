"""Agents: middleware around chats. `base` defines the interface, `loader` and `compat` load agents; every other module
here is one."""
