"""The clipped surrogate with value and entropy terms."""
