"""The memories of a service: which there are, how they are stored, read, written and swapped."""
