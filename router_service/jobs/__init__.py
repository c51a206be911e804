"""Long work on a memory: indexing and quantizing, measuring, pruning, and indexing on the service's own account."""
