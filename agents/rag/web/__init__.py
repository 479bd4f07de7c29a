"""Web search: the configured engines in order, their pages fetched and read, and the best pieces of them."""

from llama_smart_proxy.agents.rag.web.engines import WebUnavailable
from llama_smart_proxy.agents.rag.web.options import WebOptions
from llama_smart_proxy.agents.rag.web.search import NONE_CONFIGURED, Web

__all__ = ["NONE_CONFIGURED", "Web", "WebOptions", "WebUnavailable"]
