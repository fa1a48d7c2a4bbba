"""The training loop: one step, the run around it, and the command."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from efe_kernels import EFELoss
from efe_train.config import (
    TrainConfig,
    UserError,
    choose_device,
    choose_precision,
    config_from,
    learning_rates,
    parse_train_arguments,
    resumed,
)
from efe_train.data import Batch, Example, collate, epoch_batches, fingerprint, training_examples
from efe_train.interrupt import Interrupted, SignalWatch
from efe_train.monitor import Monitor, RedFlag
from efe_train.planner import Planner
from efe_train.policy import Policy, Rollout, policy_state
from efe_train.qwen import PromptCache, Prompter, build_prompter, load_architecture
from efe_train.report import RunFolder, check_tracker, closing_table, log_line, start_tracker
from efe_train.tasks import evaluates_on_training_tasks, load_tasks

EFE_WEIGHT = 0.7
REWARD_WEIGHT = 0.3
POLICY_RATE = 0.1
"""Learning rate of the policy over that of the planner: a gradient estimated from one reward each is a noisy one."""
LOG_EVERY = 10
"""Batches between two readings of the metrics, which is when the host waits for the device."""
SAVE_EVERY = 50
TRACKED = (
    "loss", "efe", "mask_ratio", "reward", "qwen_grad", "grad_norm", "policy_loss", "agent_lr", "qwen_lr",
    "queries_per_s",
)  # fmt: skip


class NotFinite(Exception):
    """Training met NaN or Inf; the red flag that explains it has been reported."""


def epoch_weight(epoch: int) -> float:
    return 0.6 if epoch == 0 else 0.3


class Trainer:
    """Everything that a run changes, and the step that changes it."""

    def __init__(self, config: TrainConfig, prompter: Prompter, device: torch.device, dtype: torch.dtype) -> None:
        agent_lr, qwen_lr, _ = learning_rates(config)
        self.config = config
        self.device = device
        self.dtype = dtype
        self.prompter = prompter.to(device).train()
        self.planner = Planner().to(device)
        self.efe_loss = EFELoss().to(device)
        self.policy = Policy(POLICY_RATE * agent_lr).to(device)
        self.cache = PromptCache()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [*self.planner.parameters(), *self.efe_loss.parameters()], "lr": agent_lr},
                {"params": [weight for weight in self.prompter.parameters() if weight.requires_grad], "lr": qwen_lr},
            ]
        )
        # Parameters stay float32; fp16 gradients need scaling, and with bf16 and fp32 the same calls do nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.batches_done = 0
        self.qwen_grad = torch.zeros((), device=device)

    def step(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """One training step. Returns its metrics, 0-d tensors on the device: nothing here waits for it."""
        assert batch.target is not None
        refresh = self.refresh_is_due()

        # 1. Qwen's prompts: with gradient on a refresh, from the cache otherwise.
        with self.autocast():
            prompt = self.cache.prompts(self.prompter, batch.queries, refresh=refresh)

        # 2. What the planner would do with the unrefined prompt.
        with torch.no_grad(), self.autocast():
            before = self.planner(batch.views, batch.valid, prompt)[:, -1]

        # 3. The policy refines the prompt. The EFE loss trains Qwen through the refined prompt, but not the policy.
        state = policy_state(prompt, before, batch.views, batch.valid, batch.features)
        refined = self.policy.refine_prompt(prompt, state, self.noise_seed())

        # 4. The plan with the refined prompt. Its logits enter the loss in the dtype that they have.
        with self.autocast():
            logits = self.planner(batch.views, batch.valid, refined.prompt)

        # 5. The loss. The reward shifts its value and has no gradient.
        weight = torch.full((), EFE_WEIGHT * epoch_weight(epoch), device=self.device)
        efe = self.efe_loss(logits, batch.target, prompt=refined.prompt, valid=batch.valid)
        reward = self.policy.compute_reward(before, logits[:, -1], batch.target, batch.valid)
        loss = weight * efe.total - REWARD_WEIGHT * reward.mean()

        # 6. Backward and the step of planner, loss and Qwen.
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if refresh:
            self.qwen_grad = gradient_norm(self.prompter.language_model)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()

        # 7. Then the policy, from the stored state and action: no graph is shared with the loss above.
        policy = self.policy.update(Rollout(state, refined.action.detach(), reward))

        mask_ratio = efe.mask_ratio.mean()
        self.efe_loss.update_target_preference(batch.target, batch.valid, 1 - mask_ratio)
        self.batches_done += 1
        return {
            "loss": loss.detach(),
            "efe": efe.total.detach(),
            "mask_ratio": mask_ratio,
            "reward": reward.mean(),
            "qwen_grad": self.qwen_grad,
            "grad_norm": grad_norm,
            "prompt_norm": prompt.detach().norm(),
            "policy_loss": policy.loss,
            "policy_grad_norm": policy.grad_norm,
        }

    def refresh_is_due(self) -> bool:
        return self.batches_done % self.config.prompt_refresh == 0

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def noise_seed(self) -> int:
        """Of the refinement's noise: a function of seed and batch, so that a resumed run draws the same."""
        return (self.config.seed << 32) + self.batches_done

    def modules(self) -> dict[str, nn.Module]:
        return {"prompter": self.prompter, "planner": self.planner, "efe_loss": self.efe_loss, "policy": self.policy}

    def state_dict(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "batches_done": self.batches_done,
            "modules": {name: module.state_dict() for name, module in self.modules().items()},
            "optimizer": self.optimizer.state_dict(),
            "policy_optimizer": self.policy.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "cache": self.cache.state_dict(),
            "qwen_grad": self.qwen_grad,
            "rng": rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches_done = state["batches_done"]
        for name, module in self.modules().items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.optimizer.load_state_dict(state["policy_optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.cache.load_state_dict(state["cache"], self.device)
        self.qwen_grad = state["qwen_grad"].to(self.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        agent_lr, qwen_lr, _ = learning_rates(self.config)
        for optimizer, rates in (
            (self.optimizer, (agent_lr, qwen_lr)),
            (self.policy.optimizer, (POLICY_RATE * agent_lr,)),
        ):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of the gradients of all parameters, without a look at the device's result."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).detach()


class Run:
    """A run from its first or its next batch to the end: progress, log, metrics, red flags and checkpoints."""

    def __init__(self, trainer: Trainer, examples: Sequence[Example], folder: RunFolder) -> None:
        config = trainer.config
        self.trainer = trainer
        self.examples = examples
        self.folder = folder
        self.qwen_digests = folder.qwen_digests()
        self.tracker: Any | None = None
        self.batches_per_epoch = math.ceil(len(examples) / config.batch_size)
        self.total = min(config.epochs * self.batches_per_epoch, config.max_batches or sys.maxsize)
        self.monitor = Monitor(loss_scaling=trainer.scaler.is_enabled())
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
                if done == 1 or done % LOG_EVERY == 0 or last:
                    row = self.read_metrics()
                    self.folder.say(log_line(row))
                    bar.set_postfix_str(bar_text(row), refresh=False)
                bar.update()
                if last:
                    break
                if done % SAVE_EVERY == 0:
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
            few_shapes=trainer.device.type == "cuda",
        )
        refresh = trainer.refresh_is_due()
        metrics = trainer.step(batch.to(trainer.device), epoch)
        agent_lr, qwen_lr = (group["lr"] for group in trainer.optimizer.param_groups)
        known = {"batch": trainer.batches_done, "epoch": epoch, "queries": len(examples), "refresh": refresh}
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
        self.clock = now
        self.folder.append_metrics(rows)
        for row in rows:
            self.judge(row)
        return rows[-1]

    def judge(self, row: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log({name: row[name] for name in TRACKED}, step=int(row["batch"]))
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


def bar_text(row: Mapping[str, float]) -> str:
    shown = {
        "loss": "loss",
        "mask": "mask_ratio",
        "reward": "reward",
        "Qwen_grad": "qwen_grad",
        "queries/s": "queries_per_s",
    }
    rates = f"lr={row['agent_lr']:g}/{row['qwen_lr']:g}"
    return " ".join([*(f"{label}={row[name]:.3g}" for label, name in shown.items()), rates])


def prepare(argv: Sequence[str]) -> Run:
    """Everything up to the first batch, every mistake of the user included.

    Raises:
        UserError: a mistake. A new run folder is only made when there is none.
    """
    given = parse_train_arguments(argv)
    out = given.get("out")
    folder = RunFolder.find(str(out) if out else None) if given.get("resume") else None
    config = resumed(folder.read_config(), given) if folder else config_from(given)
    device = choose_device(config.device)
    dtype, precision_reason = choose_precision(config.precision, device)
    check_tracker(config.log_with)
    tasks = load_tasks(config.dataset)
    examples = training_examples(tasks)
    torch.manual_seed(config.seed)
    if folder is None:
        prompter, about_qwen = build_prompter(config.qwen_model, config.lora_rank)
        folder, state = RunFolder.create(config.out), None
        prompter.save_architecture(folder.qwen)
    else:
        state = folder.read_checkpoint()
        prompter = load_architecture(folder.qwen, config.qwen_model, config.lora_rank)
        about_qwen = "as the run began with it"
    if config.gradient_checkpointing:
        prompter.recompute_activations()
    trainer = Trainer(config, prompter, device, dtype)
    if state is not None:
        with folder.fitting():
            if state["data"] != fingerprint(examples):
                raise UserError(
                    f"--dataset {config.dataset!r} has changed since {folder.path} was begun: begin a new run."
                )
            trainer.load_state_dict(state)
    run = Run(trainer, examples, folder)
    if trainer.batches_done >= run.total:
        raise UserError(
            f"The run in {folder.path} has done all its {trainer.batches_done} batches: "
            "raise --epochs or --max_batches to go on."
        )
    folder.write_config(config)
    run.tracker = start_tracker(config, folder)
    agent_lr, qwen_lr, rates_reason = learning_rates(config)
    shared = " (the same tasks serve evaluation)" if evaluates_on_training_tasks(config.dataset) else ""
    folder.say(
        f"Data: {len(tasks)} tasks of {config.dataset}{shared}, {len(examples)} training queries, "
        f"{run.batches_per_epoch} batches per epoch, batches {trainer.batches_done + 1} to {run.total}\n"
        f"Device: {device}, precision {str(dtype).removeprefix('torch.')} ({precision_reason})\n"
        f"Qwen: {about_qwen}\n"
        f"Learning rates: agent {agent_lr:g}, Qwen {qwen_lr:g} ({rates_reason})\n"
        f"Run folder: {folder.path}"
    )
    return run


def main(argv: Sequence[str]) -> int:
    """Train as the flags say. Returns the exit code: 1 where training met NaN or Inf, 128 + N where signal N ended it.

    Raises:
        UserError: a mistake in the flags or the data.
    """
    begun = time.perf_counter()
    run = prepare(argv)
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
            run.tracker.end_training()
    run.folder.say(closing_table(run.folder.read_metrics(), time.perf_counter() - begun))
    scored = (
        "tasks that it was trained on" if evaluates_on_training_tasks(run.trainer.config.dataset) else "held-out tasks"
    )
    run.folder.say(f"Score it on the {scored}: efe-train evaluate --checkpoint {run.folder.path}")
    return 0
