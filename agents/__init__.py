"""Agents: middleware around every chat. This package will hold the agent interface and the shipped agents."""
