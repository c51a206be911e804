"""Runs a frozen Mixture-of-Experts model with a routing memory: hooks, client, memory builder, evaluation."""

__all__: list[str] = []
