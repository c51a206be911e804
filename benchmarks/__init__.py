"""Measurements of the sidecar next to the engines that it could have been. README.md says how to read them."""
