"""Advantages along trajectories: gae and vtrace."""
