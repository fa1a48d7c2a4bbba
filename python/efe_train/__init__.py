"""Trains an ARC planner and its language model with the Expected Free Energy loss of `efe_kernels`.

The way in: `__main__` hands the flags (`commands`, `config`) to `run`, `evaluate`, `report` or `show`. `run` reads the
data (`tasks`, `data`, `augment`) and trains batch by batch with `train`, whose step asks the `agent` (`qwen`,
`planner`, `policy`) for a plan. What is known of a query comes from its demonstrations and its input: `size` and
`facts`, and for the planner `views` of the input and what a `lookup` finds. What comes of a run goes through `metrics`,
`monitor` and `console` into its `folder`. `evaluate` lets the agent `solve` tasks, for which it can `adapt` to each of
them, and `scores` says what the attempts are worth. `report` and `show` only read: they draw a run and a task.
"""

import os

# OpenMP's threads spin while they wait, which on a machine that does other work as well makes a step several times
# slower. OpenMP reads this when torch is loaded, so it stands before every import of torch; a setting of the user wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
