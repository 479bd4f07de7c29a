"""Counts for Prometheus: kept as plain numbers, and written in its format when they are asked for."""

from __future__ import annotations

from llama_smart_proxy.proxy.metrics.counts import Metrics

__all__ = ["Metrics"]
