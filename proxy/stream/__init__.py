"""Transfers answers from model servers to clients."""
