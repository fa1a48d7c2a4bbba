"""What a run needs before its first batch: settings, data, Qwen, the trainer and the folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from efe_train.config import TrainConfig, UserError, config_from, learning_rates, resumed
from efe_train.data import Example, fingerprint, held_out, training_examples
from efe_train.device import choose_device, choose_precision
from efe_train.folder import RunFolder
from efe_train.processes import join
from efe_train.qwen import Prompter, build_prompter, check_base, load_architecture
from efe_train.tasks import Task, evaluates_on_training_tasks, load_tasks
from efe_train.tracker import check_tracker
from efe_train.train import Trainer


class Setup(NamedTuple):
    """scored: the tasks that are held out. about: what is said of the run before it begins."""

    trainer: Trainer
    examples: Sequence[Example]
    scored: Sequence[Task]
    folder: RunFolder
    about: str


class Material(NamedTuple):
    """What a process reads for itself. scored: the tasks that are held out. state: of a checkpoint, to go on from.
    about_qwen: a phrase on the prompter.
    """

    tasks: Sequence[Task]
    scored: Sequence[Task]
    examples: Sequence[Example]
    state: dict[str, Any] | None
    prompter: Prompter
    about_qwen: str


def prepare(given: dict[str, object]) -> Setup:
    """Everything up to the first batch, every mistake of the user included.

    given: the flags that were given, by the names of TrainConfig's fields.

    Raises:
        UserError: a mistake. A new run folder is only made when there is none.
    """
    out = str(given["out"]) if given.get("out") else None
    begun = RunFolder.find(out) if given.get("resume") else None
    if begun is not None and begun.chosen is not None:
        raise UserError(f"--out {out!r} is one checkpoint of a run: name the run, {str(begun.path)!r}, to resume it.")
    config = resumed(begun.read_config(), given) if begun else config_from(given)
    device = choose_device(config.device)
    dtype, precision_reason = choose_precision(config.precision, device)
    check_tracker(config.log_with)
    processes, device = join(device)
    if processes.shards and dtype == torch.float16:
        raise UserError("--precision fp16 scales a loss of whole gradients: where FSDP splits them, use bf16.")
    if begun is not None:
        # Of the checkpoints that the processes may see, all take the one that the first sees.
        own = begun
        newest = processes.by_first(lambda: own.checkpoint)
        begun = RunFolder(newest.parents[1], chosen=newest)
    torch.manual_seed(config.seed)
    material = processes.by_each(lambda: read(config, begun))
    examples, state, prompter = material.examples, material.state, material.prompter
    folder = RunFolder(begun.path, processes) if begun else RunFolder.create(config.out, processes)
    if begun is None:
        processes.by_first(lambda: prompter.save_architecture(folder.qwen))
    if config.gradient_checkpointing:
        prompter.recompute_activations()
    batches = math.ceil(len(examples) / config.batch_size)
    trainer = Trainer(config, prompter, device, dtype, config.epochs * batches, processes)
    if state is not None:
        processes.by_each(lambda: check(trainer, state, examples, folder))
        with folder.fitting():
            trainer.load_state_dict(state)
    agent_lr, qwen_lr, rates_reason = learning_rates(config)
    shared = " (the same tasks serve evaluation)" if evaluates_on_training_tasks(config.dataset) else ""
    several = "" if processes.count == 1 else f", {processes.count} processes"
    several += ", Qwen sharded over them" if processes.shards else ""
    about = (
        f"Data: {len(material.tasks)} tasks of {config.dataset}{shared}, {len(material.scored)} of them held out, "
        f"{len(examples)} training queries, {batches} batches per epoch, "
        f"batches {trainer.batches_done + 1} to {total_batches(config, batches)}\n"
        f"Device: {device}{several}, precision {str(dtype).removeprefix('torch.')} ({precision_reason})\n"
        f"Qwen: {material.about_qwen}\n"
        f"Learning rates: agent {agent_lr:g}, Qwen {qwen_lr:g} ({rates_reason})\n"
        f"Run folder: {folder.path}"
    )
    return Setup(trainer, examples, material.scored, folder, about)


def total_batches(config: TrainConfig, batches_per_epoch: int) -> int:
    batches = config.epochs * batches_per_epoch
    return min(batches, config.max_batches or batches)


def read(config: TrainConfig, begun: RunFolder | None) -> Material:
    tasks = load_tasks(config.dataset)
    kept, scored = held_out(tasks, config.validation)
    examples = training_examples(kept)
    if begun is None:
        return Material(tasks, scored, examples, None, *build_prompter(config.qwen_model, config.lora))
    state = begun.read_checkpoint()
    prompter = load_architecture(begun.qwen, config.qwen_model, config.lora)
    return Material(tasks, scored, examples, state, prompter, "as the run began with it")


def check(trainer: Trainer, state: dict[str, Any], examples: Sequence[Example], folder: RunFolder) -> None:
    """
    Raises:
        UserError: the state of a checkpoint is of other data, of another Qwen or of another version of the model.
    """
    with folder.fitting():
        if state["data"] != fingerprint(examples):
            raise UserError(
                f"--dataset {trainer.config.dataset!r} has changed since {folder.path} was begun: begin a new run."
            )
        check_base(trainer.base, state)
