"""llama-smart-proxy: everything between the two sockets. See README.md for how a request flows."""

__version__ = "0.1.0"
