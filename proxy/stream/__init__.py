"""Answers on their way from a model's server to a client."""
