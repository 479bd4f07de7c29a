"""Resolves model names to the models of all providers."""
