"""Standard tasks by lm-evaluation-harness: a model with a memory for it, and reference text from the tasks' own sets.

`sets` and `reference` need neither lm_eval nor torch; `model`, whose import registers "knn-moe", needs both.
"""
