"""The embedded backend: Qdrant Edge in this process and in engine processes, one directory per layer."""
