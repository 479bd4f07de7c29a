"""Collections of documents that questions are answered from: read, split, embedded, indexed, and searched."""
