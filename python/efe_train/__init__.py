"""Trains an ARC planner and its language model with the Expected Free Energy loss of `efe_kernels`.

The way in: `__main__` hands the flags (`config`) to `run` or to `evaluate`. `run` reads the data (`tasks`, `data`,
`facts`), and trains batch by batch with `train`, whose step asks the `agent` (`qwen`, `planner`, `policy`) for a plan.
What comes of it goes through `metrics`, `monitor` and `report` into the run `folder`.
"""

import os

# OpenMP's threads spin while they wait, which on a machine that does other work as well makes a step several times
# slower. OpenMP reads this when torch is loaded, so it stands before every import of torch; a setting of the user wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
