"""Whole copies of a memory, all layers at one moment: of files, or kept by a Qdrant server."""
