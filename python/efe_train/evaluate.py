"""Scores a checkpoint and writes an ARC-Prize submission: `efe-train evaluate` and `python -m efe_train.evaluate`.

The model sees each task's demonstrations and test input, and nothing else: answers are only compared with afterwards.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from efe_train.adapt import SIDE_BY_SIDE, batches
from efe_train.build import build_agent, build_loss
from efe_train.checkpoint import read_state
from efe_train.commands import EvaluateConfig
from efe_train.config import TrainConfig, UserError
from efe_train.data import evaluation_queries
from efe_train.device import choose_device, choose_precision
from efe_train.files import replaced
from efe_train.folder import RunFolder, make_folder
from efe_train.interrupt import Interrupted, SignalWatch
from efe_train.qwen import restored_prompter
from efe_train.report import write_report
from efe_train.scores import (
    BASELINES,
    Attempts,
    Evaluation,
    Solution,
    append_solutions,
    compare,
    is_solved,
    read_solutions,
    score_table,
    write_evaluation,
    write_solutions,
)
from efe_train.solve import ADAPTED, AGENT, Solver
from efe_train.tasks import Task, evaluates_on_training_tasks, load_tasks, task_json


def load_solver(folder: RunFolder, config: TrainConfig, device: torch.device, steps: int, evaluation: str) -> Solver:
    """What solves tasks with the agent of a checkpoint, and with the loss that trained it.

    Raises:
        UserError: the run folder is damaged, or of another version of the model.
    """
    state = folder.read_checkpoint()
    dtype, _ = choose_precision("auto", device)
    agent = build_agent(config, restored_prompter(folder, config, state), device, dtype)
    efe_loss = build_loss(config)
    for name, module in (("planner", agent.planner), ("policy", agent.policy), ("efe_loss", efe_loss)):
        with folder.fitting():
            module.load_state_dict(state["modules"][name])
    return Solver(agent.eval(), efe_loss.requires_grad_(False).to(device), steps, evaluation)


def solve(solver: Solver, tasks: Sequence[Task], file: Path, most: int | None = None) -> list[list[Solution]]:
    """The solutions of each task. Those that the file holds of the same evaluation are taken from it; others are added
    to it as soon as they are found. most: how many tasks are solved in one batch at most.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the file holds what was solved until then.
    """
    known = [solution for solution in read_solutions(file) if solution.evaluation == solver.evaluation]
    write_solutions(file, known)
    solved = {task.id: found for task in tasks if (found := solutions_of(task, known))}
    pending = [task for task in tasks if task.id not in solved]
    limit, cells = SIDE_BY_SIDE[solver.agent.device.type]
    often = 0.5 if sys.stderr.isatty() else 15.0
    bar = tqdm(total=len(tasks), initial=len(solved), unit="task", mininterval=often, dynamic_ncols=True)
    with SignalWatch() as signals, bar:
        for batch in batches(pending, most or limit, cells):
            for task, found in zip(batch, solver.solve(batch), strict=True):
                append_solutions(file, found)
                solved[task.id] = found
            bar.set_postfix_str(progress([each for found in solved.values() for each in found]), refresh=False)
            bar.update(len(batch))
            if signals.received is not None and len(solved) < len(tasks):
                raise Interrupted(signals.received)
    return [solved[task.id] for task in tasks]


def solutions_of(task: Task, known: Sequence[Solution]) -> list[Solution]:
    """Those of each of the task's test inputs in order; none where one is missing or the task was another one."""
    content = task_json(task)
    found = {each.test: each for each in known if each.task.id == task.id and task_json(each.task) == content}
    return [found[test] for test in sorted(found)] if len(found) == len(task.tests) else []


def progress(solutions: Sequence[Solution]) -> str:
    answered = [(each.answer, each.attempts) for each in solutions if each.answer is not None]
    solved = sum(is_solved(answer, attempts) for answer, attempts in answered)
    return f"{solved} of {len(answered)} test inputs solved" if answered else ""


def judge(dataset: str, split: str, tasks: Sequence[Task], solutions: Sequence[Solution], name: str) -> Evaluation:
    """The scores of the solutions, of the predictors beside them and of the baselines. name: of the solutions' own."""
    queries = [query for task in tasks for query in evaluation_queries(task)]
    predictors: dict[str, Sequence[Attempts]] = {name: [solution.attempts for solution in solutions]}
    for other in solutions[0].others:
        predictors[other] = [solution.others[other] for solution in solutions]
    predictors |= {baseline: [take(query) for query in queries] for baseline, take in BASELINES.items()}
    return compare(dataset, split, [case for task in tasks for case in task.tests], predictors)


def submission(owners: Sequence[str], attempts: Sequence[Attempts]) -> dict[str, list[dict[str, list[list[int]]]]]:
    """ARC Prize's format: for each task, for each test input in order, two attempts. owners: the task of each."""
    answers: dict[str, list[dict[str, list[list[int]]]]] = {}
    for owner, (first, second) in zip(owners, attempts, strict=True):
        answers.setdefault(owner, []).append({"attempt_1": first.tolist(), "attempt_2": second.tolist()})
    return answers


WRITTEN = ("submission.json", "evaluation.json", "solutions.jsonl")


def main(config: EvaluateConfig) -> int:
    """Solve, score, write. Returns the exit code: 128 + N where signal N ended it.

    Raises:
        UserError: a mistake in the checkpoint or the data.
    """
    folder = RunFolder.find(config.checkpoint)
    device = choose_device(config.device)
    trained = folder.read_config()
    dataset = config.dataset or trained.dataset
    tasks = [task for task in load_tasks(dataset, config.split) if task.tests][: config.max_tasks]
    if not tasks:
        raise UserError(f"--dataset {dataset!r} has no test input to solve in its {config.split} tasks.")
    # Whatever changes the solutions of a task.
    about = json.dumps([read_state(folder.checkpoint)[0], config.adapt, dataset, config.split, device.type])
    evaluation = hashlib.sha256(about.encode()).hexdigest()[:16]
    solver = load_solver(folder, trained, device, config.adapt, evaluation)
    out = make_folder(config.out) if config.out else folder.path
    try:
        found = solve(solver, tasks, out / "solutions.jsonl", config.tasks_per_batch)
    except Interrupted as stop:
        print(
            f"Stopped by {stop.received.name}; the tasks solved so far are kept: the same command goes on from there."
        )
        return 128 + stop.received
    solutions = [solution for each in found for solution in each]
    judged = judge(dataset, config.split, tasks, solutions, ADAPTED if config.adapt else AGENT)
    with replaced(out / "submission.json") as file:
        attempts = submission([each.task.id for each in solutions], [each.attempts for each in solutions])
        file.write(json.dumps(attempts).encode())
    write_evaluation(out / "evaluation.json", judged)
    seen = dataset == trained.dataset and (config.split == "train" or evaluates_on_training_tasks(dataset))
    print(f"{len(tasks)} {config.split} tasks of {dataset}{', most of which the run was trained on' if seen else ''}")
    print(score_table(judged))
    print(f"Written: {', '.join(str(out / name) for name in WRITTEN)}")
    if out == folder.path:
        print(f"With the curves of the run: {write_report(folder)}")
    return 0


if __name__ == "__main__":
    from efe_train.__main__ import main as command

    sys.exit(command(["evaluate", *sys.argv[1:]]))
