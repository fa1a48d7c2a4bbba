from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efe_train.config import TrainConfig
from efe_train.data import Example, training_examples
from efe_train.planner import Planner
from efe_train.qwen import Prompter, build_prompter
from efe_train.tasks import Pair, Task
from efe_train.train import Trainer


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The grids here are tiny: a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Also where the tests run in a shell's background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def recolouring_task(seed: int, pairs: int = 3) -> dict[str, list[dict[str, list[list[int]]]]]:
    """An ARC task as its JSON: each colour becomes the next one; grids of 3 to 6 cells a side."""
    generator = np.random.default_rng(seed)

    def pair() -> dict[str, list[list[int]]]:
        grid = generator.integers(0, 9, size=generator.integers(3, 7, size=2))
        return {"input": grid.tolist(), "output": (grid + 1).tolist()}

    return {"train": [pair() for _ in range(pairs)], "test": [pair()]}


def unshown_task(seed: int) -> dict[str, list[dict[str, list[list[int]]]]]:
    """As above, but no two pairs of it have a colour in common: its demonstrations do not tell what becomes of one."""
    generator = np.random.default_rng(seed)

    def pair(colours: list[int]) -> dict[str, list[list[int]]]:
        grid = generator.choice(colours, size=generator.integers(3, 7, size=2))
        return {"input": grid.tolist(), "output": (grid + 1).tolist()}

    return {"train": [pair([0, 2]), pair([4, 6]), pair([1, 8])], "test": [pair([3, 5])]}


def write_tasks(folder: Path, tasks: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        (folder / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture
def arc_folder(tmp_path: Path) -> Path:
    """A folder of four small ARC tasks: twelve training queries, four test inputs."""
    return write_tasks(tmp_path / "tasks", {f"task{seed}": recolouring_task(seed) for seed in range(4)})


@pytest.fixture
def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    tasks = []
    for number in range(4):
        grids = [generator.integers(0, 9, size=generator.integers(2, 6, size=2)) for _ in range(3)]
        tasks.append(Task(f"task{number}", tuple(Pair(grid, grid + 1) for grid in grids), ()))
    return training_examples(tasks)


@pytest.fixture(scope="package")
def pristine_prompter() -> Prompter:
    torch.manual_seed(0)
    return build_prompter(None)[0]


@pytest.fixture
def prompter(pristine_prompter: Prompter) -> Prompter:
    """A small Qwen of its own for each test, always with the same weights."""
    return copy.deepcopy(pristine_prompter)


def stirred(planner: Planner) -> Planner:
    """The planner with small random weights where an untrained one has zeros, which let no gradient through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in planner.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return planner


@pytest.fixture
def trainer(prompter: Prompter) -> Trainer:
    torch.manual_seed(0)
    return Trainer(TrainConfig(prompt_refresh=4), prompter, torch.device("cpu"), torch.float32)
