"""Measures retrieval on real questions: `make eval-rag`. What it is based on is made of Debian packages in
`build/rag-eval`: documents, their pieces, vectors, and questions whose answers are known."""
