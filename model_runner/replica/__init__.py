"""A copy of a routing memory beside the model, which answers lookups there. Needs torch, nothing of transformers."""
