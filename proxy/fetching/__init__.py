"""Pages of the web, fetched by one guarded client: no address of this machine or its network is ever dialled."""

from llama_smart_proxy.proxy.fetching.cache import TimedCache
from llama_smart_proxy.proxy.fetching.fetcher import MEDIA_TYPES, USER_AGENT, Fetcher, FetchError, Limits, Page
from llama_smart_proxy.proxy.fetching.pages import Pages

__all__ = ["MEDIA_TYPES", "USER_AGENT", "FetchError", "Fetcher", "Limits", "Page", "Pages", "TimedCache"]
