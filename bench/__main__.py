"""`make bench`: the suite, the training benchmark, and their table.

    python -m bench [--record NAME] [-k EXPRESSION] [--minutes M] [--no-training]

Writes build/bench/latest.json and plots beside it, or with --record bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench import render
from bench.measure import DEVICE

ROOT = Path(__file__).resolve().parent.parent


def suite(record: Path, expression: str, minutes: float | None) -> int:
    """Run the suite in a process of its own, which imports bench before anything can hide a module from it."""
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-p", "no:cacheprovider", "-rs"]
    command += ["--benchmark-quiet", f"--benchmark-json={record}", "-k", expression]
    if minutes is not None:
        command.append(f"--bench-minutes={minutes}")
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The suite was interrupted too, and is writing down what it has.
        return process.wait()


def training_benchmark(record: Path) -> int:
    settings = ["--precision", "bf16"] if DEVICE == "cuda" else ["--batch", "1", "8", "64"]
    command = [sys.executable, "-m", "bench.training", *settings, "--into", str(record)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", metavar="NAME", help="keep the recording as bench/results/NAME.json")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    parser.add_argument(
        "-k", dest="expression", default="", help="only cases whose name this expression of pytest selects"
    )
    parser.add_argument("--minutes", type=float, help="leave out what is not begun after so many minutes")
    parser.add_argument("--no-training", action="store_true", help="leave out the training benchmark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = ROOT / "bench" / "results" / f"{options.record}.json" if options.record else options.out / "latest.json"
    record.unlink(missing_ok=True)
    status = suite(record, options.expression, options.minutes)
    if not record.exists() or record.stat().st_size == 0:
        print("No case was measured.", file=sys.stderr)
        return status or 1
    if not options.no_training:
        status = training_benchmark(record) or status
    recording = render.Record(record)
    print(render.report(recording))
    try:
        render.plots(recording, options.out)
    except ModuleNotFoundError as error:
        print(f"No plots: {error}.", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
