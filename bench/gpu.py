"""`make gpu`: what only a GPU can tell, from a source tree and without a network, in two runs of ten minutes.

    python -m bench.gpu --stage check     builds, then asks whether everything is right, the quickest answers first
    python -m bench.gpu --stage time      builds, then measures
    python -m bench.gpu                   both, in 18 minutes
                        [--out DIR] [--minutes M] [--only NAME ...]

Needs torch, triton, a C++ compiler, nvcc, pytest and pytest-benchmark; transformers for the parts that train. Whatever
else is missing (compute-sanitizer, the peers, matplotlib) is named and left out. A part that fails does not stop the
next one; the exit code says whether any failed. A part whose time is over is interrupted and keeps what it has; so does
the whole run, whose summary is written after every part. Without a GPU the same parts run as far as the first launch
(the Triton kernels under the interpreter and through the compiler), and what is left out is named.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
CORES = os.cpu_count() or 1
JOBS = min(CORES, 12) if GPU else 1
MINUTES = 8.7  # of a stage
# CUDA's own programs need not be on the PATH.
PATH = os.pathsep.join([os.environ.get("PATH", ""), *([f"{CUDA_HOME}/bin"] if CUDA_HOME else [])])
GRACE = 20  # seconds for a part to write down what it has when its time is over


@dataclass(frozen=True)
class Part:
    """command: on a GPU. dry: without one; None leaves the part out. needs: modules and programs.

    limit: seconds that it may take; least: of them, those that the parts before it leave to it. In a command {minutes}
    stands for the time that the part has. together: runs at the same time as its neighbours that do; what needs the
    whole GPU, to fill its memory or to be timed, runs alone.
    """

    name: str
    command: list[str]
    limit: int
    least: int
    dry: list[str] | None = None
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    together: bool = False

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
    workers = ["-n", str(JOBS)] if importlib.util.find_spec("xdist") and GPU else []
    return python("pytest", "-p", "no:cacheprovider", "--durations=5", *workers, "-m", "not slow", *arguments)


def sanitizer(tool: str) -> list[str]:
    settings = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return ["compute-sanitizer", *settings, *python("bench.smoke")]


def training_run(precision: str, out: Path) -> list[str]:
    tasks, run_folder = str(out / f"tasks-{precision}"), str(out / f"train-{precision}")
    train = python("efe_train", "--device", "cuda", "--precision", precision, "--max_batches", "40")
    write = shlex.join(python("bench.training", "tasks", "--out", tasks))
    return ["sh", "-c", f"{write} && {shlex.join([*train, '--dataset', tasks, '--out', run_folder])}"]


def parts(stages: Sequence[str], out: Path) -> list[Part]:
    """Each stage begins with a build, because it may be the first on its machine."""
    of_stage = {"check": checks, "time": timings}
    return [*preparation(), *(part for stage in stages for part in of_stage[stage](out))]


def preparation() -> list[Part]:
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    serves = python("pytest", "-p", "no:cacheprovider", "tests/common/test_info.py")
    demanded = {"EFE_KERNELS_CUDA": "1"} if GPU else {}
    info = python("efe_kernels.info")
    return [
        Part("build", build, 200, 120, None, ("nvcc",), build_environment()),
        Part("versions", info, 60, 10, info),
        Part("who serves what", serves, 60, 10, serves, ("pytest",), demanded),
    ]


def checks(out: Path) -> list[Part]:
    """From the quickest answer to the slowest."""
    smoke, parity = python("bench.smoke", "--jobs", str(JOBS)), python("bench.training", "parity")
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # Each tensor an allocation of its own, so that memcheck sees an access past its end.
    plain_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest, train, memory = ("pytest",), ("transformers",), ("compute-sanitizer",)
    large = python("pytest", "-p", "no:cacheprovider", "tests/gpu/test_large.py")
    others = (
        "tests/efe_loss",
        "tests/returns",
        "tests/advantage",
        "tests/policy_loss",
        "tests/reward",
        "tests/test_peers.py",
        "tests/arc_efe",
        "tests/common",
    )

    def tested(name: str, limit: int, least: int, *paths: str) -> Part:
        return Part(name, tests(*paths), limit, least, tests(*paths, "--collect-only"), pytest)

    def beside(name: str, command: list[str], dry: list[str] | None) -> Part:
        return Part(name, command, 90, 15, dry, train, together=True)

    return [
        Part("every op once", smoke, 120, 40, smoke, (), {} if GPU else interpreter),
        tested("GPU tests", 120, 50, "tests/gpu"),
        tested("prompt tests", 60, 25, "tests/prompt"),
        tested("tests of the other families", 150, 50, *others),
        Part("memcheck", sanitizer("memcheck"), 120, 40, None, memory, plain_memory),
        Part("racecheck", sanitizer("racecheck"), 90, 30, None, memory),
        beside("parity of training", parity, [*parity, "--devices", "cpu", "cpu"]),
        beside("bf16 training", training_run("bf16", out), None),
        beside("fp16 training", training_run("fp16", out), None),
        Part("large tensors", large, 90, 40, [*large, "--collect-only"], pytest),
    ]


def timings(out: Path) -> list[Part]:
    jobs = ["--jobs", str(JOBS)]
    record = str(out / "latest.json")
    copy, compiled = python("bench.measure"), python("bench.smoke", *jobs, "--full")
    variants = python("bench.variants", *jobs, "--json", str(out / "variants.json"))
    compiler = python("bench.aot", "--arch", "sm_90", "--json", str(out / "aot.json"))
    suite = python("bench", "--out", str(out), "--only", "suite", "--minutes", "{minutes}")
    sweep = python("bench.sweep", *jobs, "--into", record, "--minutes", "{minutes}")
    system = python("bench.training", "--into", record)
    report = python("bench.render", record, "--out", str(out))
    one_batch = [*system, "--batch", "1"]
    return [
        Part("copy roofline", copy, 60, 20, copy),
        Part("compile for benchmarks", compiled, 120, 40),
        Part("benchmarks", suite, 200, 100, [*suite, "-k", "seed and not compile"], ("pytest_benchmark",)),
        Part("kernel variants", variants, 100, 40, compiler),
        Part("training benchmark", [*system, "--precision", "bf16"], 90, 40, one_batch, ("transformers",)),
        Part("sweep over T and B", sweep, 80, 40, [*sweep, "--small"]),
        Part("tables and plots", report, 60, 20, report),
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
    """Interrupt the part and all that it started, so that it can write down what it has; then end what is left."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{'part':<28}{'result':<11}{'seconds':>8}  last line"]
    lines += [f"{found.part.name:<28}{found.status:<11}{found.seconds:>8.1f}  {found.note}" for found in outcomes]
    return "\n".join(lines)


def write_summary(outcomes: list[Outcome], out: Path) -> None:
    results = [
        {"part": found.part.name, "status": found.status, "seconds": round(found.seconds, 1), "note": found.note}
        for found in outcomes
    ]
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "summary.txt").write_text(summary(outcomes) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=("check", "time"), help="only this one")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, help=f"for all parts together, by default {MINUTES} for a stage")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these parts")
    options = parser.parse_args()
    stages = [options.stage] if options.stage else ["check", "time"]
    out = options.out.resolve()
    known = [part.name for part in parts(stages, out)]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only must name parts ({', '.join(known)}), it named {', '.join(sorted(unknown))}.")
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if GPU else "no GPU: a dry run, as far as the first launch"
    print(f"torch {torch.__version__}, {name}. Logs and results: {options.out}", flush=True)
    end = time.monotonic() + 60 * (options.minutes or MINUTES * len(stages))
    outcomes: list[Outcome] = []
    wanted = [part for part in parts(stages, out) if not options.only or part.name in options.only]
    ends = {part.name: end - sum(later.least for later in wanted[i + 1 :]) for i, part in enumerate(wanted)}
    for together, group in itertools.groupby(wanted, key=lambda part: part.together):
        members = list(group)
        with ThreadPoolExecutor(len(members) if together else 1) as pool:
            for found in pool.map(lambda part: run(part, out, ends[part.name]), members):
                outcomes.append(found)
                print(f"{found.status:<11}{found.seconds:>7.1f} s  {found.part.name}", flush=True)
                write_summary(outcomes, out)
    print(f"\n{summary(outcomes)}")
    return 1 if any(found.status in ("FAILED", "TIME OVER") for found in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
