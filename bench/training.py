"""The whole system: training episodes per second with the kernels, with the reference and in several processes, and the
parts of a step.

    python -m bench.training [--into RECORD.json] [--batch 1 8 64 512] [--precision fp32] [--processes 2]
    python -m bench.training parity      # one run of training on the CPU and one on the GPU, step by step

Tasks are made up, of 30 x 30 cells, and Qwen is the small one built from a config: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efe_train.data import Example, Share
    from efe_train.train import Trainer

SIDE = 30
REFRESH = 10
PARITY_STEPS = 12
# Adam turns a gradient whose sign float32 leaves open into a whole step, so two devices drift apart; a wrong kernel
# shows from the first steps on. Relative, of the loss.
PARITY_TOLERANCE = 1e-3
LONGEST_STEP = 5.0


def hide_kernels() -> None:
    """Let efe_kernels find neither its extension nor Triton, so that the reference serves every op."""
    sys.modules["efe_kernels._C"] = sys.modules["triton"] = None  # type: ignore[assignment]
    warnings.filterwarnings("ignore", "efe_kernels: the C")  # which says that they are missing


def made_up_examples(count: int, side: int) -> list[Example]:
    """Queries of recolouring tasks with two demonstrations each."""
    import numpy as np

    from efe_train.data import training_examples
    from efe_train.tasks import Pair, Task

    generator = np.random.default_rng(0)
    tasks = []
    for number in range((count + 1) // 2):
        grids = [generator.integers(0, 9, size=(side, side)) for _ in range(2)]
        tasks.append(Task(f"task{number}", tuple(Pair(grid, grid + 1) for grid in grids), ()))
    return training_examples(tasks)[:count]


def make(batch_size: int, device: str, precision: str, side: int = SIDE) -> tuple[Trainer, Share]:
    import torch

    from efe_train.config import TrainConfig
    from efe_train.data import share_out
    from efe_train.device import choose_precision
    from efe_train.processes import join
    from efe_train.qwen import build_prompter
    from efe_train.train import Trainer

    torch.manual_seed(0)
    processes, where = join(torch.device(device))
    dtype, _ = choose_precision(precision, where)
    config = TrainConfig(batch_size=batch_size, prompt_refresh=REFRESH)
    trainer = Trainer(config, build_prompter(None)[0], where, dtype, processes=processes)
    examples = made_up_examples(batch_size, side)
    return trainer, share_out(examples, positions=processes.positions(len(examples))).to(where)


class Parts:
    """Wraps what a step calls and adds up the time of the outermost calls, waiting for the device after each."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = False

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            self.wait()
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.wait()
                self.seconds[part] += time.perf_counter() - begun
                self.inside = False

        setattr(owner, name, timed)

    def watch(self, trainer: Trainer) -> None:
        import torch

        from efe_train import agent, policy

        self.wrap(trainer.agent, "ask", "Qwen")
        self.wrap(trainer.agent.planner, "forward", "planner")
        self.wrap(agent, "policy_state", "policy state")
        self.wrap(trainer.agent.policy, "refine_prompt", "refine_prompt")
        self.wrap(trainer.efe_loss, "forward", "efe_loss")
        self.wrap(policy, "grid_reward", "grid_reward")
        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(trainer.optimizer, "step", "optimizer")
        self.wrap(trainer.agent.policy, "update", "policy update")


def step_seconds(trainer: Trainer, share: Share, wait: Callable[[], None], *, refresh: bool) -> float:
    """Median time of a step with or without a refresh of the prompts."""
    times: list[float] = []
    # Processes have to agree on how often they take a step together.
    while trainer.processes.largest(len(times) < 2 or (len(times) < 12 and sum(times) < LONGEST_STEP)):
        trainer.batches_done = 0 if refresh else 1
        wait()
        begun = time.perf_counter()
        trainer.step(share, 0)
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure(batch_size: int, precision: str) -> dict[str, Any]:
    from bench.measure import DEVICE, synchronize

    trainer, share = make(batch_size, DEVICE, precision)
    refresh = step_seconds(trainer, share, synchronize, refresh=True)
    plain = step_seconds(trainer, share, synchronize, refresh=False)
    parts = Parts(synchronize)
    parts.watch(trainer)
    trainer.batches_done = 1
    begun = time.perf_counter()
    trainer.step(share, 0)
    synchronize()
    total = time.perf_counter() - begun
    return {
        "batch": batch_size,
        "processes": trainer.processes.count,
        "precision": precision,
        "episodes_per_s": REFRESH * batch_size / (refresh + (REFRESH - 1) * plain),
        "step_seconds": plain,
        "refresh_step_seconds": refresh,
        "parts": {**parts.seconds, "other": total - sum(parts.seconds.values())},
    }


def default_processes() -> int:
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def measure_all(batches: list[int], precision: str, processes: int) -> Iterator[dict[str, Any]]:
    """With the kernels, in one process and in several, and with the reference, each time in processes of their own."""
    for served_by, count in dict.fromkeys([("kernels", 1), ("kernels", processes), ("reference", 1)]):
        start = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"] if count > 1 else []
        command = [sys.executable, "-m", *start, "bench.training", "one"]
        command += ["--served-by", served_by, "--precision", precision, "--batch", *map(str, batches)]
        threads = str(max(1, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)) // count))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                row = {"served_by": served_by, **json.loads(line)}
                print(
                    f"{served_by:<10} batch {row['batch']:>4}  processes {row['processes']}  "
                    f"{row['episodes_per_s']:>9.1f} episodes/s",
                    flush=True,
                )
                yield row
        if process.returncode != 0:
            raise RuntimeError(f"Training with the {served_by} failed, exit code {process.returncode}.")


def parity(first: str, second: str, side: int) -> int:
    """Train on two devices from the same state with the same noise; compare every step's loss."""
    import torch

    # cuDNN may round the operands of a convolution to the 10 bits of TF32, which alone exceeds the tolerance.
    torch.backends.cudnn.allow_tf32 = False
    losses = []
    for device in (first, second):
        trainer, share = make(8, device, "fp32", side)
        losses.append([float(trainer.step(share, 0)["loss"]) for _ in range(PARITY_STEPS)])
    worst = 0.0
    for step, (a, b) in enumerate(zip(*losses, strict=True)):
        error = abs(a - b) / max(abs(a), 1e-12)
        worst = max(worst, error)
        print(f"step {step:>2}  {first} {a:.6f}  {second} {b:.6f}  relative difference {error:.1e}")
    print(f"largest relative difference {worst:.1e}, allowed {PARITY_TOLERANCE:.0e}")
    return 0 if worst <= PARITY_TOLERANCE else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("all", "one", "parity", "tasks"), default="all")
    parser.add_argument("--into", type=Path, metavar="RECORD.json", help="add the rows to a recording of the suite")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--processes", type=int, default=None, help="default: one for each GPU, two on the CPU")
    parser.add_argument("--served-by", default="kernels", choices=("kernels", "reference"))
    parser.add_argument("--devices", nargs=2, default=("cpu", "cuda"), help="what parity compares")
    parser.add_argument("--side", type=int, default=8, help="side of the grids that parity trains on")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where `tasks` writes ARC JSON files to train on")
    options = parser.parse_args()
    if options.what == "parity":
        return parity(options.devices[0], options.devices[1], options.side)
    if options.what == "tasks":
        return write_tasks(options.out)
    if options.what == "one":
        if options.served_by == "reference":
            hide_kernels()
        for batch in options.batch:
            row = measure(batch, options.precision)
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(row), flush=True)
        return 0
    rows = []
    for row in measure_all(options.batch, options.precision, options.processes or default_processes()):
        rows.append(row)
        if options.into is not None:  # after each row, so that an interruption costs no other
            from bench.measure import add_to_record

            add_to_record(options.into, "training", rows)
    return 0


def write_tasks(folder: Path, count: int = 16, side: int = 10) -> int:
    """Made-up ARC tasks as files, for `efe-train --dataset`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(made_up_examples(2 * count, side)[::2]):
        pairs = [
            {"input": pair.input.tolist(), "output": pair.output.tolist()} for pair in example.query.demonstrations
        ]
        pairs.append({"input": example.query.source.tolist(), "output": example.answer.tolist()})
        (folder / f"task{number}.json").write_text(json.dumps({"train": pairs, "test": pairs[:1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
