"""Experiments on a frozen model: the paper's, its baselines and its open questions, as JSON rows and a report."""
