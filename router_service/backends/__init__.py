"""Where the entries of a layer live: NumPy (the oracle), Qdrant Edge (embedded), a Qdrant server."""
