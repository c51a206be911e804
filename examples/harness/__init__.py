"""Tasks for lm-evaluation-harness, made from the texts that ship with the package: see docs/evaluation.md."""
