"""`make bench`: the suite, the sweep over T and B, the training benchmark, and their tables and plots.

    python -m bench [--record NAME] [--only PART ...] [-k EXPRESSION] [--minutes M]

Writes build/bench/latest.json, or with --record bench/results/NAME.json; tables and plots go to build/bench.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import record, render
from bench.measure import DEVICE

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("suite", "sweep", "training")


def suite(path: Path, expression: str, minutes: float | None) -> int:
    """Run the suite in a process of its own, which imports bench before anything can hide a module from it."""
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "pytest-benchmark.json")
        command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-p", "no:cacheprovider", "-rs"]
        command += ["--benchmark-quiet", f"--benchmark-json={written}", "-k", expression]
        if minutes is not None:
            command.append(f"--bench-minutes={minutes}")
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # The suite was interrupted too, and is writing down what it has.
            status = process.wait()
        # pytest-benchmark opens the file before it measures anything.
        if written.exists() and written.stat().st_size > 0:
            record.write(path, record.compact(record.read(written)))
    return status


def module(name: str, path: Path, *settings: str) -> int:
    """Run a module that adds its rows to the recording."""
    places = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", name, "--into", str(path), *settings]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": places}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", metavar="NAME", help="keep the recording as bench/results/NAME.json")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    parser.add_argument(
        "-k", dest="expression", default="", help="only cases of the suite whose name this expression of pytest selects"
    )
    parser.add_argument("--minutes", type=float, help="leave out cases that are not begun after so many minutes")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = ROOT / "bench" / "results" / f"{options.record}.json" if options.record else out / "latest.json"
    status = 0
    if "suite" in options.only:
        status = suite(path, options.expression, options.minutes)
    if "sweep" in options.only:
        jobs = os.cpu_count() or 1 if DEVICE == "cuda" else 1
        status = module("bench.sweep", path, "--jobs", str(jobs)) or status
    if "training" in options.only:
        batches = ["--batch", "1", "8", "64"]
        settings = ["--precision", "bf16", *batches, "512"] if DEVICE == "cuda" else batches
        status = module("bench.training", path, *settings) or status
    if not path.exists():
        print("Nothing was measured.", file=sys.stderr)
        return status or 1
    print(render.write_report(record.Record(path), out))
    return status


if __name__ == "__main__":
    sys.exit(main())
