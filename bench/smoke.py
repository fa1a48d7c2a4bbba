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

from bench.cases import CASES, Case
from bench.measure import DEVICE, in_parallel, synchronize
from bench.test_ops import check, outcome, problem_of, runnable
from efe_kernels.common.library import INTERPRET

SIZES = {
    "efe_loss": (2, 3, 5, 7, 10),
    "arc_efe": (3, 5, 7, 10),
    "grid_reward": (2, 5, 7, 10),
    "masked_mean_pool": (2, 5, 9),
}
TRITON_BASELINES = ("kernel, grad_scale", "padded tile", "thread per row")
COMPILED = (*TRITON_BASELINES, "compile")


def small(case: Case) -> Case:
    """The case with sizes that are small and divide by nothing. A trace keeps its length, which chooses the kernel."""
    rows = (3, case.sizes[-1]) if case.op in ("gae", "vtrace") else tuple(min(size, 33) for size in case.sizes)
    opponents = tuple(name for name in case.opponents if name in TRITON_BASELINES and (DEVICE == "cuda" or INTERPRET))
    return replace(case, sizes=SIZES.get(case.op, rows), workload="ragged", opponents=opponents, gpu_only=False)


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
    problem = case.problem(DEVICE)
    for name in ("kernel", *(name for name in case.opponents if name in COMPILED)):
        implementation = runnable(problem, name)
        with torch.no_grad():
            implementation(problem.inputs)
        outcome(implementation, problem.inputs, case.passes(name) != ("forward",))
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
