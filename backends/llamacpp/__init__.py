"""llama.cpp: its command line, its processes, the embedded server."""
