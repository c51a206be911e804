"""Worked examples and pipelines that no user of the packages needs."""
