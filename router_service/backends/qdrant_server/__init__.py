"""The Qdrant server and cluster backend: the same collections as the embedded one, behind a URL."""
