"""What the service says of itself: metrics, probes, log lines."""
