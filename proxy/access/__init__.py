"""Who may use the proxy, and for what: API keys, scopes, limits, and where it may listen without keys."""
