"""Turn reference texts into routing memories: gradients, assignments, upload."""
