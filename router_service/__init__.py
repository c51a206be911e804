"""The routing sidecar: routing memories on Qdrant, served over gRPC. Needs no torch."""

__version__ = "0.1.0"
__all__ = ["__version__"]
