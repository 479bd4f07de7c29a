"""HTTP towards clients: the server, headers, bodies, responses."""
