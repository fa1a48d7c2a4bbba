"""Several processes on one machine, as torchrun starts them, against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from efe_train.processes import ALONE, Processes
from tests.efe_train.conftest import recolouring_task, write_tasks
from tests.efe_train.test_cli import checkpoint, metrics

ROOT = Path(__file__).parents[2]

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""

# Sums of other parts in another order: some units in the last place of float32, which Adam's first steps, whose size
# hangs on no gradient's, pass on to the next loss. Ten times as much was never seen over twelve batches.
LOSSES_DIFFER = 1e-4


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training queries: batches of ten, the last of an epoch of four, which three processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("processes") / "tasks"
    return write_tasks(folder, {f"task{seed}": recolouring_task(seed, 3 + seed % 2) for seed in range(7)})


def settings(tasks: Path, out: Path, *arguments: str) -> list[str]:
    """12 batches, the last one in the closing phase."""
    given = ["--dataset", str(tasks), "--out", str(out), "--device", "cpu", "--batch_size", "10", "--validation", "0"]
    return [
        *given,
        "--epochs",
        "6",
        "--max_batches",
        "12",
        "--prompt_refresh",
        "3",
        "--policy_samples",
        "3",
        *arguments,
    ]


def start(count: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*torchrun, "-m", "efe_train"] if count > 1 else [sys.executable, "-m", "efe_train"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=alone
    )


def train(count: int, arguments: list[str], **environment: str) -> str:
    with start(count, arguments, **environment) as run:
        said, complaints = run.communicate(timeout=300)
    assert run.returncode == 0, complaints
    return said


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in metrics(out)])


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def alone(tasks: Path) -> Path:
    out = tasks.parent / "alone"
    train(1, settings(tasks, out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "arguments", "environment"),
    [
        (1, ("--accumulate", "3"), {}),
        (2, ("--profile",), {}),
        (2, ("--accumulate", "3"), {}),
        (3, (), {}),
        (2, (), FSDP),
    ],
    ids=["accumulated", "two", "two accumulated", "three", "two sharded"],
)
def test_several_processes_train_as_one_does(
    count: int, arguments: tuple[str, ...], environment: dict[str, str], alone: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    said = train(count, settings(tasks, out, *arguments), **environment)
    assert said.count("Run folder: ") == 1 and said.count("[Batch   12]") == 1
    assert (f"{count} processes" in said, "Qwen sharded over them" in said) == (count > 1, environment == FSDP)
    assert (out / "profile" / "parts.txt").exists() == ("--profile" in arguments)
    assert [row["queries"] for row in metrics(out)] == [row["queries"] for row in metrics(alone)]
    torch.testing.assert_close(losses(out), losses(alone), rtol=LOSSES_DIFFER, atol=0)
    for name in ("reward", "mask_ratio", "acc_after", "qwen_grad", "grad_norm", "policy_loss"):
        found, expected = ([row[name] for row in metrics(each)] for each in (out, alone))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
    assert_close(checkpoint(out)["modules"], checkpoint(alone)["modules"])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "environment"), [(1, 2, FSDP), (2, 1, {})], ids=["sharded", "alone"])
def test_a_run_goes_on_in_another_number_of_processes(
    first: int, second: int, environment: dict[str, str], alone: Path, tasks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(first, [*settings(tasks, out), "--max_batches", "7"])
    train(second, ["--resume", "--out", str(out), "--max_batches", "12"], **environment)
    torch.testing.assert_close(losses(out), losses(alone), rtol=LOSSES_DIFFER, atol=0)


@pytest.mark.slow
def test_a_mistake_is_said_once_and_ends_every_process(tasks: Path, alone: Path) -> None:
    with start(2, settings(tasks, alone)) as run:
        said, complaints = run.communicate(timeout=120)
    assert run.returncode != 0
    lines = [line for line in (said + complaints).splitlines() if line.startswith("efe-train: ")]
    assert len(lines) == 1 and "already holds a run" in lines[0]
    assert "Traceback" not in "\n".join(line for line in complaints.splitlines() if "efe_train" in line)


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_batch(tasks: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start(2, [*settings(tasks, out), "--max_batches", "500", "--epochs", "200"]) as run:
        while not (out / "metrics.jsonl").exists() or not metrics(out):
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=120)
    stopped = [line for line in said.splitlines() if line.startswith("Stopped by SIGTERM after batch ")]
    assert len(stopped) == 1
    done = checkpoint(out)["batches_done"]
    assert f"after batch {done} of 500" in stopped[0]
    assert len(metrics(out)) == done


@pytest.mark.parametrize("total", [1, 4, 5, 6, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_row_is_that_of_one_process_and_all_have_equally_many(total: int, count: int) -> None:
    shares = []
    for index in range(count):
        processes = Processes()
        processes.count, processes.index = count, index
        shares.append(processes.positions(total))
    assert len({len(share) for share in shares}) == 1
    places = [place for share in shares for place in share]
    assert places[:total] == list(range(total))
    assert len(places) < total + count


def test_alone_everything_is_whole() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(ALONE.whole(rows, 3), rows)
    assert ALONE.largest(15) == 15
    assert ALONE.by_first(lambda: json.dumps([1])) == "[1]"
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    ALONE.average_gradients([parameter])
    assert torch.equal(parameter.grad, torch.ones(2))


SHARDS = """
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from efe_train.config import UserError
from efe_train.processes import Processes, leave
from efe_train.qwen import build_prompter
prompter, _ = build_prompter(None)
whole = sum(parameter.numel() for parameter in prompter.parameters())
processes = Processes(Accelerator(cpu=True))
processes.shard(prompter, prompter.language_model)
assert all(isinstance(parameter, DTensor) for parameter in prompter.parameters())
own = sum(parameter.to_local().numel() for parameter in prompter.parameters())
assert own < 0.55 * whole, (own, whole)
blocks = [type(module).__name__ for module in prompter.modules() if hasattr(module, "reshard")]
assert sorted(blocks) == ["FSDPPrompter", "FSDPQwen3DecoderLayer", "FSDPQwen3DecoderLayer"], blocks

def fail_in_second():
    if processes.index == 1:
        raise UserError("no such folder here")

try:
    processes.by_each(fail_in_second)
except UserError as error:
    assert str(error) == "process 1 of 2: no such folder here"
else:
    raise AssertionError("the first process knew nothing of it")
leave()
assert processes.hosts is None, "threads of gloo live on, and may abort Python's end"
"""


@pytest.mark.slow
def test_a_sharded_qwen_lies_in_parts_and_a_mistake_of_one_process_ends_all(tmp_path: Path) -> None:
    (tmp_path / "shards.py").write_text(SHARDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    alone = {**os.environ, **FSDP, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*torchrun, tmp_path / "shards.py"], capture_output=True, text=True, env=alone, timeout=120)
    assert done.returncode == 0, done.stderr
