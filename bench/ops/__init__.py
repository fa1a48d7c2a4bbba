"""The registry of ops, which all measurements and the tests that treat all ops alike are driven from.

An entry is an `Op` (see `entry.py`): inputs, reference, kernel and peers of one op, the tolerances that hold for it,
its cases, and the variants of the compile report. To add an op, write its entry into a file of this folder, name the
entry in `OPS` below, and put what its variants may cost into `bench/aot_budgets.json`. Nothing else lists ops. Entries
are imported where there is no Triton, too: launchers are called in functions alone, and peers are imported there.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.ops import advantage, arc_efe, efe_loss, policy_loss, prompt, returns, reward
from bench.ops.entry import Case, Example, Implementation, Inputs, Op, Passes, Problem

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        efe_loss.OP,
        arc_efe.OP,
        reward.OP,
        advantage.OP,
        returns.GAE,
        returns.VTRACE,
        returns.TD_LAMBDA,
        policy_loss.OP,
        prompt.MASKED_MEAN_POOL,
        prompt.REFINE_PROMPT,
        prompt.SQUASHED_LOG_PROB,
        prompt.REFINE_AND_SCORE,
    )
}
CASES: list[Case] = [case for op in OPS.values() for case in op.headline]
CASES += [case for op in OPS.values() for case in op.cases]
assert len({case.name for case in CASES}) == len(CASES)
EXAMPLES: dict[str, Example] = {example.name: example for op in OPS.values() for example in op.examples}


def passes_of(case: Case, implementation: str) -> Passes:
    op = OPS[case.op]
    peer = op.peers.get(implementation)
    return op.passes if peer is None else tuple(which for which in op.passes if which in peer.passes)


def problem(case: Case, device: str, seed: int | None = 0) -> Problem:
    """The inputs of a case, and what computes on them. seed None: other values at every call."""
    op = OPS[case.op]
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device(device):
        inputs = op.inputs(case)
    forward_reads, backward_reads = op.reads(inputs)
    runs = {"kernel": op.kernel, **{name: peer.run for name, peer in op.peers.items()}}
    implementations: dict[str, Implementation] = {name: partial(run, case) for name, run in runs.items()}
    return Problem(inputs, partial(op.reference, case), implementations, forward_reads, backward_reads)


def example(name: str, device: str) -> tuple[Implementation, Inputs]:
    """What computes an example, and its inputs: other values at every call."""
    given = problem(EXAMPLES[name].case, device, seed=None)
    return given.implementations["kernel"], given.inputs
