"""`make gpu`: everything that only a GPU can tell, in one command, from a source tree and without a network.

    python -m bench.gpu [--out DIR] [--minutes 9] [--only NAME ...]

Needs torch, triton, a C++ compiler, nvcc, pytest and pytest-benchmark; transformers for the parts that train. Whatever
else is missing (compute-sanitizer, the peers, matplotlib) is named and left out. A part that fails does not stop the
next one; the exit code says whether any failed. Without a GPU the same parts run as far as the first launch (the Triton
kernels under the interpreter and through the compiler), and what is left out is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
CORES = os.cpu_count() or 1
FAMILIES = ("efe_loss", "advantage", "prompt", "arc_efe")
# CUDA's own programs need not be on the PATH.
PATH = os.pathsep.join([os.environ.get("PATH", ""), *([f"{CUDA_HOME}/bin"] if CUDA_HOME else [])])
GRACE = 20  # seconds for a part to write down what it has when its time is over


@dataclass(frozen=True)
class Part:
    """command: on a GPU. dry: without one; None leaves the part out. limit: seconds. needs: modules and programs.

    together: runs at the same time as its neighbours that do; what is timed runs alone. least: seconds that the parts
    before it leave to it. In a command {minutes} stands for the time that the part has.
    """

    name: str
    command: list[str]
    limit: int
    dry: list[str] | None = None
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    together: bool = False
    least: int = 0

    def missing(self) -> list[str]:
        return [name for name in self.needs if not importlib.util.find_spec(name) and not shutil.which(name, path=PATH)]


@dataclass(frozen=True)
class Outcome:
    part: Part
    status: str  # passed, FAILED, TIME OVER, left out
    seconds: float
    note: str


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def tests(*arguments: str) -> list[str]:
    """Compiling the kernels is most of the time of their tests, so they run in parallel where pytest-xdist is there."""
    workers = ["-n", str(min(CORES, 12))] if importlib.util.find_spec("xdist") and GPU else []
    return python("pytest", "-p", "no:cacheprovider", "--durations=5", *workers, *arguments)


def sanitizer(tool: str) -> list[str]:
    settings = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return ["compute-sanitizer", *settings, *python("bench.smoke")]


def training_run(precision: str, out: Path) -> list[str]:
    tasks, run_folder = str(out / "tasks"), str(out / f"train-{precision}")
    train = python("efe_train", "--device", "cuda", "--precision", precision, "--max_batches", "40")
    write = shlex.join(python("bench.training", "tasks", "--out", tasks))
    return ["sh", "-c", f"{write} && {shlex.join([*train, '--dataset', tasks, '--out', run_folder])}"]


def parts(out: Path) -> list[Part]:
    jobs = ["--jobs", str(min(CORES, 12) if GPU else 1)]
    families = [path for name in FAMILIES if (path := f"tests/{name}") and (ROOT / path).is_dir()]
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    info, copy, smoke = python("efe_kernels.info"), python("bench.measure"), python("bench.smoke", *jobs)
    variants = python("bench.variants", *jobs, "--json", str(out / "variants.json"))
    compiler = python("bench.aot", "--arch", "sm_90", "--json", str(out / "aot.json"))
    record = str(out / "latest.json")
    suite = python("bench", "--out", str(out), "--only", "suite", "--minutes", "{minutes}")
    sweep = python("bench.sweep", *jobs, "--into", record, "--minutes", "{minutes}")
    parity = python("bench.training", "parity")
    system = python("bench.training", "--into", record)
    report = python("bench.render", record, "--out", str(out))
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Each tensor an allocation of its own, so that memcheck sees an access past its end.
    plain_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    train = ("transformers",)

    def beside(*settings: Any) -> Part:
        return replace(Part(*settings), together=True)

    def assured(least: int, *settings: Any) -> Part:
        return replace(Part(*settings), least=least)

    return [
        Part("build", build, 240, None, ("nvcc",), build_environment()),
        Part("what serves what", info, 60, info),
        Part("copy roofline", copy, 60, copy),
        Part("every kernel once", smoke, 150, smoke, (), {} if GPU else interpreter),
        Part("kernel variants", variants, 120, compiler),
        beside("GPU tests", tests("tests/gpu"), 150, tests("tests/gpu"), ("pytest",)),
        beside("kernel tests", tests(*families), 200, tests(*families, "--collect-only"), ("pytest",)),
        beside("memcheck", sanitizer("memcheck"), 150, None, ("compute-sanitizer",), plain_memory),
        beside("racecheck", sanitizer("racecheck"), 150, None, ("compute-sanitizer",)),
        beside("parity of training", parity, 90, [*parity, "--devices", "cpu", "cpu"], train),
        beside("fp16 training", training_run("fp16", out), 90, None, train),
        beside("bf16 training", training_run("bf16", out), 90, None, train),
        beside("compile for benchmarks", [*smoke, "--full"], 150),
        assured(100, "benchmarks", suite, 200, [*suite, "-k", "seed and not compile"], ("pytest_benchmark",)),
        assured(70, "sweep over T and B", sweep, 90, [*sweep, "--small"]),
        assured(80, "training benchmark", [*system, "--precision", "bf16"], 100, [*system, "--batch", "1"], train),
        assured(50, "tables and plots", report, 60, report),
    ]


def build_environment() -> dict[str, str]:
    if not GPU:
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"EFE_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "MAX_JOBS": str(CORES)}


def run(part: Part, out: Path, end: float) -> Outcome:
    """end: when the part must be over, on the monotonic clock."""
    limit = min(part.limit, end - time.monotonic() - GRACE)
    log = out / f"{part.name.replace(' ', '-')}.log"
    command = part.command if GPU else part.dry
    if command is None:
        return Outcome(part, "left out", 0, "needs a GPU")
    if part.missing():
        return Outcome(part, "left out", 0, f"needs {', '.join(part.missing())}")
    if limit < GRACE:
        return Outcome(part, "TIME OVER", 0, "not begun: no time was left")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "PATH": PATH, **part.environment}
    minutes = f"{max(limit - 2 * GRACE, GRACE) / 60:.1f}"
    command = [argument.replace("{minutes}", minutes) for argument in command]
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            stop(process)
    seconds = time.monotonic() - begun
    status = "TIME OVER" if code is None else "passed" if code == 0 else "FAILED"
    return Outcome(part, status, seconds, last_line(log))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the part and all that it started, so that it can write down what it has; then end it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{'part':<24}{'result':<11}{'seconds':>8}  last line"]
    lines += [f"{found.part.name:<24}{found.status:<11}{found.seconds:>8.1f}  {found.note}" for found in outcomes]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these parts")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if GPU else "no GPU: a dry run, as far as the first launch"
    print(f"torch {torch.__version__}, {name}. Logs and results: {options.out}", flush=True)
    end = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    wanted = [part for part in parts(out) if not options.only or part.name in options.only]
    ends = {part.name: end - sum(later.least for later in wanted[i + 1 :]) for i, part in enumerate(wanted)}
    for together, group in itertools.groupby(wanted, key=lambda part: part.together):
        members = list(group)
        with ThreadPoolExecutor(len(members) if together else 1) as pool:
            for found in pool.map(lambda part: run(part, out, ends[part.name]), members):
                outcomes.append(found)
                print(f"{found.status:<11}{found.seconds:>7.1f} s  {found.part.name}", flush=True)
    results = [
        {"part": found.part.name, "status": found.status, "seconds": round(found.seconds, 1), "note": found.note}
        for found in outcomes
    ]
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    text = summary(outcomes)
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if any(found.status in ("FAILED", "TIME OVER") for found in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
