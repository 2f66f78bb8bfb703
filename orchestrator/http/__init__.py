"""OpenAI-compatible HTTP front door, on the event loop of the gRPC one."""
