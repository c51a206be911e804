"""Retention: which entries of a layer go. Decides only; deleting is the caller's.

Nothing here reads a clock, logs or changes a collection: cut-off times, hit counts and seeds come from the caller.
"""
