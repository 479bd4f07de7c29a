"""Web search: the configured engines in order, their pages fetched and read, and the best pieces of them."""

from llama_smart_proxy.agents.rag.web.engines import WebUnavailable
from llama_smart_proxy.agents.rag.web.options import WebOptions
from llama_smart_proxy.agents.rag.web.search import Web

__all__ = ["Web", "WebOptions", "WebUnavailable"]
