"""The contract between the routing service and its clients: messages, tensor packing, channel settings."""
