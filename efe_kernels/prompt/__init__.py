"""Prompt refinement: masked mean pooling, the squashed-Gaussian refinement and its log-probability."""
