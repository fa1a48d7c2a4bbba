"""A run from its first or its next batch to its end, and the command `efe-train`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from efe_train.augment import Augmentation
from efe_train.config import TrainConfig, UserError, config_from, learning_rates, resumed
from efe_train.console import bar_text, closing_table, log_line
from efe_train.data import (
    Example,
    collate,
    epoch_batches,
    evaluation_queries,
    fingerprint,
    held_out,
    training_examples,
)
from efe_train.device import choose_device, choose_precision
from efe_train.folder import RunFolder
from efe_train.interrupt import Interrupted, SignalWatch
from efe_train.metrics import Row
from efe_train.monitor import Monitor, RedFlag
from efe_train.qwen import Prompter, build_prompter, load_architecture
from efe_train.report import write_report
from efe_train.scores import score
from efe_train.tasks import Task, evaluates_on_training_tasks, load_tasks
from efe_train.tracker import Tracker, check_tracker, start_tracker
from efe_train.train import Trainer

LOG_EVERY = 10
"""Batches between two readings of the metrics, which is when the host waits for the device."""


class NotFinite(Exception):
    """Training met NaN or Inf; the red flag that explains it has been reported."""


def main(given: dict[str, object]) -> int:
    """Train as the flags say. Returns the exit code: 1 where training met NaN or Inf, 128 + N where signal N ended it.

    given: the flags that were given, by the names of TrainConfig's fields.

    Raises:
        UserError: a mistake in the flags or the data.
    """
    begun = time.perf_counter()
    run = prepare(given)
    try:
        run.train()
    except NotFinite:
        run.folder.say(
            f"Training stopped. {run.folder.path / 'checkpoint.pt'} holds the last state that is known to be good."
        )
        return 1
    except Interrupted as stop:
        done, path = run.trainer.batches_done, run.folder.path
        run.folder.say(
            f"Stopped by {stop.received.name} after batch {done} of {run.total}, which is saved: "
            f"efe-train --resume --out {path} goes on from it."
        )
        return 128 + stop.received
    finally:
        if run.tracker is not None:
            run.tracker.end()
    run.folder.say(closing_table(run.folder.read_metrics(), time.perf_counter() - begun))
    scored = (
        "tasks that it was trained on" if evaluates_on_training_tasks(run.trainer.config.dataset) else "held-out tasks"
    )
    run.folder.say(f"Curves: {write_report(run.folder)}")
    run.folder.say(f"Score it on the {scored}: efe-train evaluate --checkpoint {run.folder.path}")
    return 0


def prepare(given: dict[str, object]) -> Run:
    """Everything up to the first batch, every mistake of the user included.

    Raises:
        UserError: a mistake. A new run folder is only made when there is none.
    """
    out = given.get("out")
    begun = RunFolder.find(str(out) if out else None) if given.get("resume") else None
    config = resumed(begun.read_config(), given) if begun else config_from(given)
    device = choose_device(config.device)
    dtype, precision_reason = choose_precision(config.precision, device)
    check_tracker(config.log_with)
    tasks = load_tasks(config.dataset)
    kept, scored = held_out(tasks, config.validation)
    examples = training_examples(kept)
    torch.manual_seed(config.seed)
    state = begun.read_checkpoint() if begun else None
    folder, prompter, about_qwen = continued(config, begun) if begun else created(config)
    if config.gradient_checkpointing:
        prompter.recompute_activations()
    batches = config.epochs * math.ceil(len(examples) / config.batch_size)
    trainer = Trainer(config, prompter, device, dtype, batches)
    if state is not None:
        restore(trainer, state, examples, folder)
    run = Run(trainer, examples, scored, folder)
    if trainer.batches_done >= run.total:
        raise UserError(
            f"The run in {folder.path} has done all its {trainer.batches_done} batches: "
            "raise --epochs or --max_batches to go on."
        )
    folder.write_config(config)
    run.tracker = start_tracker(config, folder)
    shared = " (the same tasks serve evaluation)" if evaluates_on_training_tasks(config.dataset) else ""
    agent_lr, qwen_lr, rates_reason = learning_rates(config)
    folder.say(
        f"Data: {len(tasks)} tasks of {config.dataset}{shared}, {len(scored)} of them held out, "
        f"{len(examples)} training queries, "
        f"{run.batches_per_epoch} batches per epoch, batches {trainer.batches_done + 1} to {run.total}\n"
        f"Device: {device}, precision {str(dtype).removeprefix('torch.')} ({precision_reason})\n"
        f"Qwen: {about_qwen}\n"
        f"Learning rates: agent {agent_lr:g}, Qwen {qwen_lr:g} ({rates_reason})\n"
        f"Run folder: {folder.path}"
    )
    return run


def created(config: TrainConfig) -> tuple[RunFolder, Prompter, str]:
    """A new run's folder and prompter, and a sentence about the latter."""
    prompter, about = build_prompter(config.qwen_model, config.lora)
    folder = RunFolder.create(config.out)
    prompter.save_architecture(folder.qwen)
    return folder, prompter, about


def continued(config: TrainConfig, folder: RunFolder) -> tuple[RunFolder, Prompter, str]:
    """The same of a run that goes on."""
    prompter = load_architecture(folder.qwen, config.qwen_model, config.lora)
    return folder, prompter, "as the run began with it"


def restore(trainer: Trainer, state: dict[str, Any], examples: Sequence[Example], folder: RunFolder) -> None:
    """Give the trainer the state of a checkpoint.

    Raises:
        UserError: it is of other data or of another version of the model.
    """
    with folder.fitting():
        if state["data"] != fingerprint(examples):
            raise UserError(
                f"--dataset {trainer.config.dataset!r} has changed since {folder.path} was begun: begin a new run."
            )
        trainer.load_state_dict(state)


class Run:
    """A run from its first or its next batch to the end: progress, log, metrics, red flags and checkpoints."""

    def __init__(
        self, trainer: Trainer, examples: Sequence[Example], scored: Sequence[Task], folder: RunFolder
    ) -> None:
        """scored: the tasks that are held out."""
        config = trainer.config
        self.trainer = trainer
        self.examples = examples
        self.cases = [case for task in scored for case in task.tests]
        self.queries = [query for task in scored for query in evaluation_queries(task)]
        self.folder = folder
        self.qwen_digests = folder.qwen_digests()
        self.tracker: Tracker | None = None
        self.batches_per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total = min(config.epochs * self.batches_per_epoch, config.max_batches or sys.maxsize)
        self.monitor = Monitor(loss_scaling=trainer.scaler.is_enabled(), reads=trainer.agent.reads)
        self.unread: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self.clock = time.perf_counter()
        self.candidate: int | None = None

    def train(self) -> None:
        """Train to the end of the run.

        Raises:
            NotFinite: training met NaN or Inf; checkpoint.pt holds the last state that is known to be good.
            Interrupted: SIGINT or SIGTERM came; checkpoint.pt holds the state after the batch that it came in.
        """
        trainer, done = self.trainer, self.trainer.batches_done
        for row in self.folder.cut_metrics(done):
            self.monitor.observe(row)
        if done == 0:
            self.save()
            self.folder.accept_candidate()
        self.clock = time.perf_counter()
        often = 1.0 if sys.stderr.isatty() else 15.0
        bar = tqdm(total=self.total, initial=done, unit="batch", mininterval=often, dynamic_ncols=True)
        with SignalWatch() as signals, bar:
            for epoch, examples in self.upcoming():
                self.train_batch(epoch, examples)
                done = trainer.batches_done
                last = done == self.total or signals.received is not None
                if done == 1 or done % LOG_EVERY == 0 or done % self.batches_per_epoch == 0 or last:
                    row = self.read_metrics()
                    self.folder.say(log_line(row))
                    bar.set_postfix_str(bar_text(row), refresh=False)
                bar.update()
                if last:
                    break
                if done % trainer.config.save_every == 0:
                    self.save()
                    self.candidate = done
            self.finish()
        if done < self.total and signals.received is not None:
            raise Interrupted(signals.received)

    def upcoming(self) -> Iterator[tuple[int, list[Example]]]:
        """Epoch and examples of each batch that is still to come."""
        config, first = self.trainer.config, self.trainer.batches_done
        batches: list[list[Example]] = []
        for number in range(first, self.total):
            epoch, position = divmod(number, self.batches_per_epoch)
            if position == 0 or number == first:
                batches = epoch_batches(self.examples, config.batch_size, config.seed, epoch)
            yield epoch, batches[position]

    def train_batch(self, epoch: int, examples: Sequence[Example]) -> None:
        trainer = self.trainer
        batch = collate(
            [example.query for example in examples],
            [example.answer for example in examples],
            self.augmentations(len(examples)),
            few_shapes=trainer.device.type == "cuda",
        )
        refresh, rate = trainer.refresh_is_due(), trainer.rate()
        metrics = trainer.step(batch.to(trainer.device), epoch)
        agent_lr, qwen_lr = (group["lr"] for group in trainer.optimizer.param_groups)
        known = {
            "batch": trainer.batches_done,
            "epoch": epoch,
            "queries": len(examples),
            "refresh": refresh and rate > 0,
        }
        self.unread.append(({**known, "agent_lr": agent_lr, "qwen_lr": qwen_lr}, metrics))

    def augmentations(self, count: int) -> list[Augmentation] | None:
        """Of the queries of the next batch: a function of seed and batch, so that a resumed run draws the same."""
        config, done = self.trainer.config, self.trainer.batches_done
        if config.augment == "off":
            return None
        generator = np.random.default_rng([config.seed, done, 1])
        return [Augmentation.drawn(generator) for _ in range(count)]

    def validate(self) -> dict[str, float]:
        """The val_ metrics, where tasks are held out and their answers known."""
        grids = self.trainer.agent.predict(self.queries, self.trainer.config.batch_size)
        result = score(self.cases, [(grid, grid) for grid in grids])
        if not result.test_inputs:
            return {}
        found = (result.pixel_accuracy, result.changed_accuracy, result.exact_matches / result.test_inputs)
        named = zip(("val_pixels", "val_changed", "val_exact"), found, strict=True)
        return {name: value for name, value in named if value is not None}

    def read_metrics(self) -> dict[str, float]:
        """Bring the metrics since the last reading to the host in one transfer, and look at them. Returns the last row.

        Raises:
            NotFinite: the monitor found a fatal red flag.
        """
        values = torch.stack([torch.stack([*metrics.values()]).float() for _, metrics in self.unread]).tolist()
        now = time.perf_counter()
        throughput = sum(known["queries"] for known, _ in self.unread) / (now - self.clock)
        rows = [
            {**known, **dict(zip(metrics, numbers, strict=True)), "queries_per_s": round(throughput, 2)}
            for (known, metrics), numbers in zip(self.unread, values, strict=True)
        ]
        self.unread.clear()
        if self.trainer.batches_done % self.batches_per_epoch == 0:
            rows[-1] |= self.validate()
        self.clock = time.perf_counter()
        self.folder.append_metrics(rows)
        for row in rows:
            self.judge(row)
        return rows[-1]

    def judge(self, row: Row) -> None:
        if self.tracker is not None:
            self.tracker.log(row, step=int(row["batch"]))
        for flag in self.monitor.observe(row):
            self.raise_flag(flag)
        # A state is good when the batch after it, which is computed from it, is.
        if self.candidate is not None and row["batch"] > self.candidate:
            self.folder.accept_candidate()
            self.candidate = None

    def raise_flag(self, flag: RedFlag) -> None:
        self.folder.say(f"RED FLAG: {flag.message}")
        if flag.fatal:
            self.folder.drop_candidate()
            raise NotFinite

    def finish(self) -> None:
        """Save the last state. No batch comes after it to show that it is good, so its parameters are looked at."""
        state = [tensor for module in self.trainer.modules().values() for tensor in module.state_dict().values()]
        if not all(bool(tensor.isfinite().all()) for tensor in state):
            message = "the last step left parameters that are not finite. Check the learning rates (lower --agent_lr)."
            self.raise_flag(RedFlag(self.trainer.batches_done, message, fatal=True))
        self.save()
        self.folder.accept_candidate()

    def save(self) -> None:
        about = {"data": fingerprint(self.examples), "qwen": self.qwen_digests}
        self.folder.write_candidate({**self.trainer.state_dict(), **about})
