"""Agents around a chat: which take part, their hooks, limits and questions to models."""
