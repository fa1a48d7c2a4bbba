"""A run that is killed again and again, at any moment, comes to the end of one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from efe_train.folder import RunFolder
from tests.efe_train.test_cli import assert_same, checkpoint, comparable

ROOT = Path(__file__).parents[2]

KILLS = int(os.environ.get("EFE_KILLS", "6"))

EPOCHS = 10 + 2 * KILLS
"""Of two batches: more than the runs get through before they are killed."""


def start(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "efe_train", *arguments, "--out", str(out)]
    # As many threads as the other runs: the order of sums depends on it.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=alone)


def words(out: Path) -> int:
    log = out / "training.log"
    return log.stat().st_size if log.exists() else 0


def newest(out: Path) -> int:
    """The batch of the last checkpoint, -1 where there is none."""
    return max((int(each.name.removeprefix("batch-")) for each in RunFolder(out).saved()), default=-1)


def wait(run: subprocess.Popen[bytes], until: Callable[[], bool], longest: float = 600) -> None:
    """Until something holds or the run has ended."""
    begun = time.perf_counter()
    while run.poll() is None and not until() and time.perf_counter() - begun < longest:
        time.sleep(0.001)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_never_was(arc_folder: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    settings = ["--epochs", str(EPOCHS), "--prompt_refresh", "4", "--save_every", "1"]
    begin = ["--dataset", str(arc_folder), "--batch_size", "6", "--device", "cpu", *settings]
    begun = time.perf_counter()
    with start(begin, straight) as run:
        wait(run, lambda: words(straight) > 0)
        startup = time.perf_counter() - begun
    assert run.returncode == 0
    batch = (time.perf_counter() - begun - startup) / (2 * EPOCHS)

    generator, reached = random.Random(0), []
    while len(reached) < KILLS and newest(broken) < 2 * EPOCHS:
        said, saved = words(broken), newest(broken)
        with start(["--resume"] if saved >= 0 else begin, broken) as run:
            # One in three is killed while it starts, the others while they train, at any point of a batch.
            if len(reached) % 3 == 0:
                wait(run, lambda said=said: words(broken) > said, generator.uniform(0, 1) * startup)
            else:
                due = saved + generator.randint(0, 3)
                wait(run, lambda said=said, due=due: words(broken) > said and newest(broken) >= due)
                time.sleep(generator.uniform(0, 2) * batch)
            run.kill()
        assert run.returncode in (0, -signal.SIGKILL)
        reached.append(newest(broken))
    print(json.dumps({"kills": len(reached), "batches that were saved by then": reached}))
    assert len(reached) >= 3 and reached[-1] > 0
    if reached[-1] < 2 * EPOCHS:
        with start(["--resume"], broken) as run:
            pass
        assert run.returncode == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    assert comparable(broken) == comparable(straight)
