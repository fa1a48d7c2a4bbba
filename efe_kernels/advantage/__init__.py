"""The advantage of one-step episodes."""
