"""Ollama servers."""
