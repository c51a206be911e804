"""Console script `model-runner`."""

from model_runner.cli.app import main

__all__ = ["main"]
