"""The HTTP client side: connections to model servers and their answers."""
