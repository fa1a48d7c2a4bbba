"""The reward of a prediction that replaces another."""
