"""A server of the small model in vLLM whose requests read a memory, or none."""
