"""What a client must be allowed to do, to use an endpoint."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """The scope of an endpoint, and of an API key. `ADMIN` includes `INFERENCE`."""

    PUBLIC = "public"
    """No key is required: it shows nothing but that the proxy runs."""
    INFERENCE = "inference"
    """It uses models, and changes nothing but what is loaded."""
    ADMIN = "admin"
    """It changes what others use, runs commands, or shows what others do."""
