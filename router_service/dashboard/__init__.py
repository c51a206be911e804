"""A page in the browser that shows what a service holds and does: a program of its own, a client of the service."""
