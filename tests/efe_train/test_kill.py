"""A run that is killed again and again, at any moment, comes to the end of one that never was."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.efe_train.test_cli import assert_same, checkpoint, comparable, train

ROOT = Path(__file__).parents[2]

KILLS = int(os.environ.get("EFE_KILLS", "6"))

LONGEST = 1.5
"""Seconds from the moment that a run has a folder, or goes on in it, to its end by SIGKILL, at most."""


def killed(arguments: list[str], out: Path, after: float) -> bool:
    """Whether a run was killed, and did not come to its end before."""
    command = [sys.executable, "-m", "efe_train", *arguments, "--out", str(out)]
    log = out / "training.log"
    said = log.stat().st_size if log.exists() else 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT) as run:
        # In the middle of being made, or where it goes on, of being read.
        while run.poll() is None and not (log.stat().st_size > said if log.exists() else out.exists()):
            time.sleep(0.001)
        time.sleep(after)
        run.kill()
        _, complaints = run.communicate()
    assert run.returncode in (0, -9), complaints.decode()
    return run.returncode == -9


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_never_was(arc_folder: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["--epochs", "20", "--prompt_refresh", "4", "--save_every", "1"]
    assert train(arc_folder, straight, *settings) == 0
    generator = random.Random(0)
    begin = ["--dataset", str(arc_folder), "--batch_size", "6", "--device", "cpu", *settings]
    kills, reached = 0, []
    while kills < KILLS:
        resume = (broken / "checkpoint.pt").exists()
        if not killed(["--resume"] if resume else begin, broken, generator.uniform(0, LONGEST)):
            break
        kills += 1
        reached.append(len(comparable(broken)) if (broken / "metrics.jsonl").exists() else 0)
    assert kills >= min(KILLS, 3) and reached[-1] > 0
    print(json.dumps({"kills": kills, "batches in the log when killed": reached}))
    if checkpoint(broken)["batches_done"] < checkpoint(straight)["batches_done"]:
        command = [sys.executable, "-m", "efe_train", "--resume", "--out", str(broken)]
        assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=300).returncode == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    assert comparable(broken) == comparable(straight)
