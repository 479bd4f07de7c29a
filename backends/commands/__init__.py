"""Models whose servers are started by commands of the configuration."""
