"""The gRPC edge of the service: decode, call once, encode."""
