"""What one document may use."""

from __future__ import annotations

from dataclasses import dataclass

OUT_OF_MEMORY = 3
"""The exit status of a worker that has no more memory."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory of the worker (address space, in MiB), processor time and time per document in seconds, and the text
    that may come out of one document, in MiB of UTF-8."""

    memory_mib: int = 1024
    processor_s: int = 60
    time_s: float = 180.0
    text_mib: int = 256
    idle_s: float = 60.0
    """After so many seconds without a document the worker is ended."""
