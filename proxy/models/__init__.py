"""Names of models, and the providers that hold them."""
