"""Generated code of protos/knnmoe/v1; see protos/generate.py."""
