"""Every op and every Triton baseline once, forward and backward.

python -m bench.smoke                  small inputs, checked: what compute-sanitizer looks at, and with
                                       TRITON_INTERPRET=1 a check of all Triton kernels without a GPU
python -m bench.smoke --jobs 12        the same in parallel, which fills Triton's cache in a fraction of the time
python -m bench.smoke --jobs 12 --full the benchmarks' own inputs, unchecked, so that the suite finds all compiled
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from bench.check import check, outcome, problem_of, runnable
from bench.measure import DEVICE, in_parallel, synchronize
from bench.ops import CASES, OPS, passes_of, problem
from bench.ops.entry import FORWARD, Case
from efe_kernels.common.library import INTERPRET


def small(case: Case) -> Case:
    """The case with sizes that are small and divide by nothing, and those of its opponents that are Triton kernels."""
    op = OPS[case.op]
    run = DEVICE == "cuda" or INTERPRET
    opponents = tuple(name for name in case.opponents if run and op.peers[name].triton)
    return replace(case, sizes=op.small(case.sizes), workload="ragged", opponents=opponents, gpu_only=False)


def checked(case: Case) -> list[str]:
    """What an implementation of the case computes wrong."""
    wrong = []
    for name in ("kernel", *case.opponents):
        try:
            check(case, name, problem_of(case).implementations[name])
            print(f"right  {name} of {case.name}", flush=True)
        except AssertionError as error:
            wrong.append(str(error))
            print(f"WRONG  {error}", flush=True)
    synchronize()
    return wrong


def once(case: Case) -> list[str]:
    """Run what has to be compiled for the case, each pass as the suite does."""
    given, peers = problem(case, DEVICE), OPS[case.op].peers
    for name in ("kernel", *(name for name in case.opponents if peers[name].triton or peers[name].compiled)):
        implementation = runnable(case, given, name)
        with torch.no_grad():
            implementation(given.inputs)
        outcome(implementation, given.inputs, passes_of(case, name) != FORWARD)
        print(f"ran  {name} of {case.name}", flush=True)
    synchronize()
    return []


def main() -> int:
    """Returns 1 where something computes the wrong thing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--full", action="store_true", help="the benchmarks' own inputs")
    options = parser.parse_args()
    if options.full:
        in_parallel(once, [case for case in CASES if DEVICE == "cuda" or not case.gpu_only], options.jobs)
        return 0
    return 1 if any(in_parallel(checked, list(dict.fromkeys(map(small, CASES))), options.jobs)) else 0


if __name__ == "__main__":
    sys.exit(main())
