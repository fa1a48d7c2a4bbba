"""Scores a checkpoint and writes an ARC-Prize submission: `efe-train evaluate` and `python -m efe_train.evaluate`.

The model sees each task's demonstrations and test input, and nothing else: answers are only compared with afterwards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from efe_train.agent import Agent
from efe_train.config import COUNT, DATASET, Parser, UserError, choose_device, choose_precision, flag
from efe_train.data import Query, by_longer_side, collate, evaluation_queries
from efe_train.files import replaced
from efe_train.folder import RunFolder, make_folder
from efe_train.planner import Planner
from efe_train.policy import Policy
from efe_train.qwen import load_architecture
from efe_train.tasks import Grid, evaluates_on_training_tasks, load_tasks


def load_agent(folder: RunFolder, device: torch.device, dtype: torch.dtype) -> Agent:
    """The agent of a checkpoint.

    Raises:
        UserError: the run folder is damaged, or of another version of the model.
    """
    state, config = folder.read_checkpoint(), folder.read_config()
    prompter = load_architecture(folder.qwen, config.qwen_model, config.lora_rank)
    agent = Agent(prompter, Planner(), Policy(), device, dtype)
    for name, module in agent.named_children():
        with folder.fitting():
            module.load_state_dict(state["modules"][name])
    return agent.eval()


@torch.no_grad()
def attempt(agent: Agent, queries: Sequence[Query]) -> list[tuple[Grid, Grid]]:
    """Two grids for each query: the most probable one, and the most probable of all others."""
    batch = collate(queries, few_shapes=agent.device.type == "cuda").to(agent.device)
    # Without a seed the policy's mean refines, where training draws a sample to learn from.
    logits = agent.plan(batch, seed=None).logits[:, -1].float().cpu()
    return [two_best(cells[: query.size[0], : query.size[1]]) for query, cells in zip(queries, logits, strict=True)]


def two_best(logits: Tensor) -> tuple[Grid, Grid]:
    """The two most probable grids under logits [H, W, C]: the second one differs in the cell that is least certain."""
    scores, colours = logits.topk(2, dim=-1)
    cell = int((scores[..., 0] - scores[..., 1]).argmin())
    first = colours[..., 0].contiguous()
    second = first.clone()
    second.view(-1)[cell] = colours[..., 1].reshape(-1)[cell]
    return first.numpy(), second.numpy()


@dataclass(frozen=True)
class Score:
    """Of the test inputs whose answers are known. A prediction of the wrong size has no right pixel."""

    test_inputs: int
    pixel_accuracy: float | None  # of the first attempt, the mean over test inputs
    exact_matches: int  # test inputs that one of the two attempts solves
    right_sizes: int


def score(answers: Sequence[Grid | None], attempts: Sequence[tuple[Grid, Grid]]) -> Score:
    pixels, exact, sizes = [], 0, 0
    for answer, pair in zip(answers, attempts, strict=True):
        if answer is not None:
            right_size = pair[0].shape == answer.shape
            sizes += right_size
            pixels.append(float((pair[0] == answer).mean()) if right_size else 0.0)
            exact += any(np.array_equal(attempt, answer) for attempt in pair)
    return Score(len(pixels), float(np.mean(pixels)) if pixels else None, exact, sizes)


def solve(agent: Agent, queries: Sequence[Query], batch_size: int) -> list[tuple[Grid, Grid]]:
    """Attempts in the order of the queries; grids of about one size are solved together."""
    order = sorted(range(len(queries)), key=lambda index: by_longer_side(queries[index]))
    attempts: dict[int, tuple[Grid, Grid]] = {}
    for first in tqdm(range(0, len(order), batch_size), unit="batch", desc="evaluate"):
        part = order[first : first + batch_size]
        attempts.update(zip(part, attempt(agent, [queries[index] for index in part]), strict=True))
    return [attempts[index] for index in range(len(queries))]


def submission(
    owners: Sequence[str], attempts: Sequence[tuple[Grid, Grid]]
) -> dict[str, list[dict[str, list[list[int]]]]]:
    """ARC Prize's format: for each task, for each test input in order, two attempts. owners: the task of each."""
    answers: dict[str, list[dict[str, list[list[int]]]]] = {}
    for owner, (first, second) in zip(owners, attempts, strict=True):
        answers.setdefault(owner, []).append({"attempt_1": first.tolist(), "attempt_2": second.tolist()})
    return answers


@dataclass(frozen=True)
class EvaluateConfig:
    """What `efe-train evaluate` was asked to do: each field is a flag."""

    checkpoint: str = field(metadata=flag("run folder", metavar="DIR"))
    dataset: str | None = field(default=None, metadata=flag(f"{DATASET} (default: the run's)", metavar="NAME"))
    split: str = field(
        default="eval", metadata=flag("which tasks to solve (default {default})", choices=("eval", "train"))
    )
    device: str = field(default="auto", metadata=flag("default {default}", choices=("auto", "cuda", "cpu")))
    batch_size: int = field(default=32, metadata=flag("default {default}", type=COUNT))
    out: str | None = field(
        default=None,
        metadata=flag("where submission.json and evaluation.json go (default: the run folder)", metavar="DIR"),
    )


def parse_arguments(argv: Sequence[str]) -> EvaluateConfig:
    parser = Parser(EvaluateConfig, prog="efe-train evaluate", description="Score a checkpoint of efe-train.")
    return EvaluateConfig(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> int:
    """Solve, score, write. Returns the exit code.

    Raises:
        UserError: a mistake in the flags, the checkpoint or the data.
    """
    config = parse_arguments(argv)
    folder = RunFolder.find(config.checkpoint)
    device = choose_device(config.device)
    dtype, _ = choose_precision("auto", device)
    trained_on = folder.read_config().dataset
    dataset = config.dataset or trained_on
    tasks = load_tasks(dataset, config.split)
    queries = [query for task in tasks for query in evaluation_queries(task)]
    answers = [answer for task in tasks for _, answer in task.tests]
    owners = [task.id for task in tasks for _ in task.tests]
    if not queries:
        raise UserError(f"--dataset {dataset!r} has no test input to solve in its {config.split} tasks.")
    attempts = solve(load_agent(folder, device, dtype), queries, config.batch_size)
    result = score(answers, attempts)
    out = make_folder(config.out) if config.out else folder.path
    with replaced(out / "submission.json") as file:
        file.write(json.dumps(submission(owners, attempts)).encode())
    with replaced(out / "evaluation.json") as file:
        file.write(
            (json.dumps({"dataset": dataset, "split": config.split, **asdict(result)}, indent=2) + "\n").encode()
        )
    seen = dataset == trained_on and (config.split == "train" or evaluates_on_training_tasks(dataset))
    print(f"{len(tasks)} {config.split} tasks of {dataset}{', which the run was trained on' if seen else ''}")
    print(score_table(result, len(queries)))
    print(f"Written: {out / 'submission.json'}, {out / 'evaluation.json'}")
    return 0


def score_table(result: Score, test_inputs: int) -> str:
    if result.pixel_accuracy is None:
        return f"The answers to the {test_inputs} test inputs are unknown: nothing is scored."
    return (
        f"{result.test_inputs} of {test_inputs} test inputs have a known answer\n"
        f"Pixel accuracy  {result.pixel_accuracy:.4f}  (0 where the size is wrong)\n"
        f"Right sizes     {result.right_sizes}\n"
        f"Exact matches   {result.exact_matches}  (with two attempts)"
    )


if __name__ == "__main__":
    from efe_train.__main__ import main as command

    sys.exit(command(["evaluate", *sys.argv[1:]]))
