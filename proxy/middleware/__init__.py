"""Agents around a chat: their selection, hooks, limits and side calls."""
