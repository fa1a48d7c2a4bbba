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

from efe_train.folder import RunFolder
from tests.efe_train.test_cli import assert_same, checkpoint, comparable

ROOT = Path(__file__).parents[2]

KILLS = int(os.environ.get("EFE_KILLS", "6"))

EPOCHS = 40


def start(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "efe_train", *arguments, "--out", str(out)]
    # As many threads as the other runs: the order of sums depends on it.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=alone)


def wait_for_words(run: subprocess.Popen[bytes], log: Path) -> None:
    """Until the run has said what it is about to do, or has ended."""
    said = log.stat().st_size if log.exists() else 0
    while run.poll() is None and not (log.exists() and log.stat().st_size > said):
        time.sleep(0.001)


def batches_done(out: Path) -> int:
    done: int = checkpoint(out)["batches_done"] if RunFolder(out).saved() else 0
    return done


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_never_was(arc_folder: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["--epochs", str(EPOCHS), "--prompt_refresh", "4", "--save_every", "1"]
    begin = ["--dataset", str(arc_folder), "--batch_size", "6", "--device", "cpu", *settings]
    begun = time.perf_counter()
    with start(begin, straight) as run:
        wait_for_words(run, straight / "training.log")
        startup = time.perf_counter() - begun
    assert run.returncode == 0
    batch = (time.perf_counter() - begun - startup) / (2 * EPOCHS)

    generator, reached = random.Random(0), []
    while len(reached) < KILLS and batches_done(broken) < 2 * EPOCHS:
        with start(["--resume"] if RunFolder(broken).saved() else begin, broken) as run:
            # One in three is killed while it starts, the others while they train.
            if len(reached) % 3 == 0:
                time.sleep(generator.uniform(0.5, 1) * startup)
            else:
                wait_for_words(run, broken / "training.log")
                time.sleep(generator.uniform(0, 8) * batch)
            run.kill()
        assert run.returncode in (0, -9)
        reached.append(batches_done(broken))
    print(json.dumps({"kills": len(reached), "batches that were saved by then": reached}))
    assert len(reached) >= 3 and reached[-1] > 0
    if reached[-1] < 2 * EPOCHS:
        with start(["--resume"], broken) as run:
            pass
        assert run.returncode == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    assert comparable(broken) == comparable(straight)
