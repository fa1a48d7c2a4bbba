"""Trains an ARC planner and its language model with the Expected Free Energy loss of `efe_kernels`."""

import os

# OpenMP's threads spin while they wait, which on a machine that does other work as well makes a step several times
# slower. OpenMP reads this when torch is loaded, so it stands before every import of torch; a setting of the user wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
