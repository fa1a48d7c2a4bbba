"""A run from its first or its next batch to its end, and the command `efe-train`."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from efe_train.ahead import ahead
from efe_train.augment import Augmentation
from efe_train.config import UserError
from efe_train.console import bar_text, closing_table, log_line
from efe_train.data import Example, Share, epoch_batches, fingerprint, share_out
from efe_train.folder import RunFolder
from efe_train.held_out import HeldOut
from efe_train.interrupt import Interrupted, SignalWatch
from efe_train.metrics import Row
from efe_train.monitor import Monitor, RedFlag
from efe_train.processes import full, leave
from efe_train.profile import each_timed, part, profiling
from efe_train.report import write_report
from efe_train.setup import Setup, prepare, total_batches
from efe_train.state import kept_state
from efe_train.tasks import evaluates_on_training_tasks
from efe_train.tracker import Tracker, start_tracker

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
    try:
        run = Run(prepare(given))
        try:
            return finished(run, begun)
        finally:
            if run.tracker is not None:
                run.tracker.end()
    finally:
        leave()


def finished(run: Run, begun: float) -> int:
    """Train and say how it ended. begun: when the command did. Returns the exit code."""
    folder = run.folder
    try:
        run.train()
    except NotFinite:
        good = folder.processes.by_first(lambda: folder.checkpoint)
        folder.say(f"Training stopped. {good} holds the last state that is known to be good.")
        return 1
    except Interrupted as stop:
        done = run.trainer.batches_done
        folder.say(
            f"Stopped by {stop.received.name} after batch {done} of {run.total}, which is saved: "
            f"efe-train --resume --out {folder.path} goes on from it."
        )
        return 128 + stop.received
    table, report = folder.processes.by_first(
        lambda: (closing_table(folder.read_metrics(), time.perf_counter() - begun), write_report(folder))
    )
    seen = evaluates_on_training_tasks(run.config.dataset)
    scored = "tasks that it was trained on" if seen else "held-out tasks"
    folder.say(table)
    folder.say(f"Curves: {report}")
    folder.say(f"Score it on the {scored}: efe-train evaluate --checkpoint {folder.path}")
    return 0


class Run:
    """A run from its first or its next batch to the end: progress, log, metrics, red flags and checkpoints.

    Every process of a run does the same, batch by batch; the folder and the tracker are those of the first.
    """

    def __init__(self, setup: Setup) -> None:
        """
        Raises:
            UserError: the run has done all its batches, or has ended before.
        """
        self.trainer, self.examples, scored, self.folder, about = setup
        self.config = self.trainer.config
        self.processes = self.trainer.processes
        self.held_out = HeldOut(scored)
        self.batches_per_epoch = math.ceil(len(self.examples) / self.config.batch_size)
        self.total = total_batches(self.config, self.batches_per_epoch)
        if self.trainer.batches_done >= self.total:
            raise UserError(
                f"The run in {self.folder.path} has done all its {self.trainer.batches_done} batches: "
                "raise --epochs or --max_batches to go on."
            )
        self.monitor = Monitor(loss_scaling=self.trainer.scaler.is_enabled(), reads=self.trainer.agent.reads)
        for row in self.processes.by_first(self.folder.read_metrics):
            if row["batch"] <= self.trainer.batches_done:
                self.monitor.observe(row)
                self.held_out.note(row)
        if self.held_out.is_over(self.config.patience):
            raise UserError(f"The run in {self.folder.path} has ended by --patience: raise it to go on.")
        self.folder.write_config(self.config)
        # What every checkpoint says of the run, that none may be taken for another's.
        self.identity = {"data": fingerprint(self.examples), "qwen": [*self.folder.qwen_digests().items()]}
        self.tracker: Tracker | None = None
        self.processes.by_first(self.start_tracker)
        self.unread: list[tuple[dict[str, float], dict[str, Tensor]]] = []
        self.clock = time.perf_counter()
        self.candidate: int | None = None
        self.folder.say(about)

    def start_tracker(self) -> None:
        self.tracker = start_tracker(self.config, self.folder)

    def train(self) -> None:
        """Train to the end of the run.

        Raises:
            NotFinite: training met NaN or Inf; the newest checkpoint holds the last state that is known to be good.
            Interrupted: SIGINT or SIGTERM came; the newest checkpoint holds the state after the batch that it came in.
        """
        trainer, done, stopped = self.trainer, self.trainer.batches_done, 0
        self.folder.cut_metrics(done)
        if done == 0:
            self.save()
            self.accept(0)
        self.clock = time.perf_counter()
        often = 1.0 if sys.stderr.isatty() else 15.0
        quiet = self.processes.index > 0
        bar = tqdm(total=self.total, initial=done, unit="batch", mininterval=often, dynamic_ncols=True, disable=quiet)
        # Only the first process is profiled, and speaks of it by itself.
        say = RunFolder(self.folder.path).say
        profiled = profiling(self.folder.path, self.config.profile and not quiet, self.total - done, say)
        with SignalWatch() as signals, bar, ahead(self.upcoming()) as batches, profiled as profile:
            for epoch, share in each_timed("data", batches):
                self.train_batch(epoch, share)
                done = trainer.batches_done
                # A signal reaches the processes at different times; they have to stop after the same batch.
                stopped = self.processes.largest(signals.received or 0)
                last = done == self.total or stopped > 0
                if done == 1 or done % LOG_EVERY == 0 or done % self.batches_per_epoch == 0 or last:
                    with part("metrics"):
                        row = self.read_metrics()
                    self.folder.say(log_line(row))
                    bar.set_postfix_str(bar_text(row), refresh=False)
                bar.update()
                profile.step()
                if last or self.held_out.is_over(self.config.patience):
                    break
                if done % self.config.save_every == 0 or self.held_out.is_best:
                    self.save()
            self.finish()
        if done < self.total and stopped and not self.held_out.is_over(self.config.patience):
            raise Interrupted(signal.Signals(stopped))
        if done < self.total:
            best = self.processes.by_first(self.folder.best)
            self.folder.say(
                f"The held-out tasks were solved no better for {self.config.patience} epochs: training ends early. "
                f"The best state is {best}."
            )

    def upcoming(self) -> Iterator[tuple[int, Share]]:
        """Epoch and this process's share of each batch that is still to come."""
        config, device = self.config, self.trainer.device
        if device.index is not None:
            # This runs in a thread of its own, where pinned memory would be the first GPU's.
            torch.cuda.set_device(device)
        first, batches = self.trainer.batches_done, list[list[Example]]()
        for number in range(first, self.total):
            epoch, position = divmod(number, self.batches_per_epoch)
            if position == 0 or number == first:
                batches = epoch_batches(self.examples, config.batch_size, config.seed, epoch)
            examples = batches[position]
            share = share_out(
                examples,
                self.augmentations(number, len(examples)),
                positions=self.processes.positions(len(examples)),
                parts=config.accumulate,
                few_shapes=self.trainer.agent.few_shapes,
            )
            yield epoch, share.pinned() if device.type == "cuda" else share

    def augmentations(self, number: int, count: int) -> list[Augmentation] | None:
        """Of the queries of a batch: a function of seed and batch, so that a resumed run draws the same."""
        if self.config.augment == "off":
            return None
        generator = np.random.default_rng([self.config.seed, number, 1])
        return [Augmentation.drawn(generator) for _ in range(count)]

    def train_batch(self, epoch: int, share: Share) -> None:
        trainer = self.trainer
        refresh, rate = trainer.refresh_is_due(), trainer.rate()
        share = share.to(trainer.device)
        if trainer.batches_done == 0:
            trainer.meet(share)
        metrics = trainer.step(share, epoch)
        agent_lr, qwen_lr = (group["lr"] for group in trainer.optimizer.param_groups)
        known = {
            "batch": trainer.batches_done,
            "epoch": epoch,
            "queries": len(share.queries),
            "refresh": refresh and rate > 0,
        }
        self.held_out.scores = None  # the planner has moved on
        self.unread.append(({**known, "agent_lr": agent_lr, "qwen_lr": qwen_lr}, metrics))

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
            at_once = max(1, self.config.batch_size // (self.processes.count * self.config.accumulate))
            rows[-1] |= self.held_out.validate(self.trainer.agent, at_once)
        # What processes do together hangs on these numbers, and unlike devices round unlike.
        rows = self.processes.by_first(lambda: rows)
        self.clock = time.perf_counter()
        self.folder.append_metrics(rows)
        self.processes.by_first(lambda: self.track(rows))
        for row in rows:
            self.judge(row)
        return rows[-1]

    def track(self, rows: Sequence[Row]) -> None:
        if self.tracker is None:
            return
        for row in rows:
            self.tracker.log(row, step=int(row["batch"]))
        if "val_exact" in rows[-1]:
            self.tracker.log_plans(self.held_out.pictures(), step=int(rows[-1]["batch"]))

    def judge(self, row: Row) -> None:
        for flag in self.monitor.observe(row):
            self.raise_flag(flag)
        # A state is good when the batch after it, which is computed from it, is.
        if self.candidate is not None and row["batch"] > self.candidate:
            self.accept(self.candidate)
        self.held_out.note(row)

    def raise_flag(self, flag: RedFlag) -> None:
        self.folder.say(f"RED FLAG: {flag.message}")
        if flag.fatal:
            self.folder.drop_candidate()
            raise NotFinite

    def finish(self) -> None:
        """Save the last state. No batch comes after it to show that it is good, so its parameters are looked at."""
        state = [tensor for module in self.trainer.modules().values() for tensor in kept_state(module).values()]
        finite = [bool(full(tensor).isfinite().all()) for tensor in state]
        if self.processes.largest(int(not all(finite))):
            message = "the last step left parameters that are not finite. Check the learning rates (lower --agent_lr)."
            self.raise_flag(RedFlag(self.trainer.batches_done, message, fatal=True))
        self.save()
        self.accept(self.trainer.batches_done)

    def save(self) -> None:
        """Write the state as a candidate, once the candidate before it has been judged."""
        if self.candidate is not None and self.unread:
            self.read_metrics()
        state = {**self.trainer.state_dict(), **self.identity, "scores": self.held_out.scores}
        self.folder.write_candidate(state)
        self.candidate = self.trainer.batches_done

    def accept(self, batch: int) -> None:
        self.folder.accept_candidate(batch, self.config.keep)
        self.candidate = None
