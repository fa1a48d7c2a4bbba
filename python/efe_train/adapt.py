"""Adaptation at evaluation: a planner of its own for each task, trained on the task's demonstrations by the EFE loss.

Each demonstration is a query held out of its own demonstrations, as in training; the answers of the test inputs take no
part. The planners of several tasks are trained side by side, with their weights stacked, and none of them depends on
the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from efe_kernels import EFELoss
from efe_train.agent import Agent
from efe_train.augment import Augmentation
from efe_train.data import Example, Observation, collate
from efe_train.planner import Planner
from efe_train.tasks import Task

RATE = 5e-3
WARMUP = 5
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0

RECOLOURED = 1 / 3
"""Share of the steps in which the colours are permuted."""

SIDE_BY_SIDE = {"cpu": (8, 4000), "cuda": (32, sys.maxsize)}
"""By device, how many tasks share a batch at most, and how many cells it has with all their demonstrations.

On the CPU a batch spares small grids the cost of calling each operation, and large ones nothing.
"""

Weights = dict[str, Tensor]
"""Of a planner, by the names of its parameters."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the planner of one task is trained on. prompts: [len(examples), D] without a graph, what it plans with."""

    examples: Sequence[Example]
    prompts: Tensor


def batches(tasks: Sequence[Task], most: int, cells: int) -> list[list[Task]]:
    """Tasks of about one size together, at most so many with at most so many cells; small ones first."""

    def extent(task: Task) -> tuple[int, int]:
        sides = (side for pair in task.demonstrations for side in pair.output.shape)
        return max(sides, default=1), len(task.demonstrations)

    found: list[list[Task]] = []
    for task in sorted(tasks, key=extent):
        together = [*found[-1], task] if found else [task]
        side, rows = (max(values) for values in zip(*map(extent, together), strict=True))
        if found and len(together) <= most and len(together) * rows * side**2 <= cells:
            found[-1] = together
        else:
            found.append([task])
    return found


def adapt(agent: Agent, efe_loss: EFELoss, lessons: Sequence[Lesson], steps: int) -> list[Weights]:
    """The weights of each lesson's planner after that many steps. All of them begin with those of the agent's planner.

    Every other plan is one step longer: such plans have a vote too, and would fall apart if they were not trained.
    efe_loss: the run's, with reduction "none". It is not trained.
    """
    planner, tasks, rows = agent.planner, len(lessons), max(len(lesson.examples) for lesson in lessons)
    weights = {
        name: parameter.detach().expand(tasks, *parameter.shape).clone().requires_grad_()
        for name, parameter in planner.named_parameters()
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=WEIGHT_DECAY, fused=True)
    # A lesson with fewer examples than another is filled up with some that have no valid cell and do not count.
    examples = [lesson.examples[row % len(lesson.examples)] for lesson in lessons for row in range(rows)]
    queries, answers = [example.query for example in examples], [example.answer for example in examples]
    prompts = torch.stack([lesson.prompts[torch.arange(rows) % len(lesson.examples)] for lesson in lessons])
    counts = torch.tensor([[row < len(lesson.examples) for row in range(rows)] for lesson in lessons])
    counts = counts.to(agent.device)
    share = counts / counts.sum(1, keepdim=True)
    for step, change in enumerate(changes(steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        batch = collate(queries, answers, [change] * len(queries), few_shapes=agent.few_shapes)
        batch = batch.to(agent.device)
        valid = batch.valid & counts.view(-1, 1, 1)
        seen = Observation(*(part.unflatten(0, (tasks, rows)) for part in batch.observation._replace(valid=valid)))
        with agent.autocast():
            logits = plan_side_by_side(planner, weights, seen, prompts, planner.num_steps + step % 2).flatten(0, 1)
        losses = efe_loss(logits, batch.target, prompt=prompts.flatten(0, 1), valid=valid).total
        optimizer.zero_grad(set_to_none=True)
        (losses * share.flatten()).sum().backward()
        clip([weight.grad for weight in weights.values() if weight.grad is not None])
        optimizer.step()
    return [{name: weight[task].detach() for name, weight in weights.items()} for task in range(tasks)]


def plan_side_by_side(planner: Planner, weights: Weights, seen: Observation, prompts: Tensor, steps: int) -> Tensor:
    """The plans [G, B, T, H, W, C] of G planners, each for the B queries of its own task."""
    return vmap(lambda *task: functional_call(planner, task[0], (*task[1:], steps)))(weights, seen, prompts)


def changes(steps: int) -> Iterator[Augmentation]:
    """What the queries are turned into in each step: the same for every task, whichever tasks are beside it."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        change = Augmentation.drawn(generator)
        yield change if generator.random() < RECOLOURED else Augmentation.turned(change.orientation)


def clip(gradients: Sequence[Tensor]) -> None:
    """Scale the gradients [G, ...] of each of G tasks to a norm of at most MAX_GRAD_NORM, over all its parameters."""
    squares = torch.stack([gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients]).sum(0)
    factors = (MAX_GRAD_NORM / (squares.sqrt() + 1e-6)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
