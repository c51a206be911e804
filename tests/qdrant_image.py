"""The Qdrant server that tests and docker/ run: of the minor version of qdrant-client in constraints.txt."""

QDRANT_IMAGE = "qdrant/qdrant:v1.20.0"
