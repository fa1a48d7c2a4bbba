"""The commands of `efe-train` and their flags: parsed before anything is imported that takes long."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from efe_train.config import COUNT, DATASET, LENGTH, Parser, TrainConfig, UserError, flag, settings_from, train_parser


@dataclass(frozen=True)
class EvaluateConfig:
    """What `efe-train evaluate` was asked to do: each field is a flag."""

    checkpoint: str = field(metadata=flag("run folder", metavar="DIR"))
    dataset: str | None = field(default=None, metadata=flag(f"{DATASET} (default: the run's)", metavar="NAME"))
    split: str = field(
        default="eval", metadata=flag("which tasks to solve (default {default})", choices=("eval", "train"))
    )
    adapt: int = field(
        default=0,
        metadata=flag(
            "train a copy of the planner on the demonstrations of each task for N steps before it solves the task "
            "(default {default}); on two CPU cores 60 steps take about three seconds a task",
            type=LENGTH,
            metavar="N",
        ),
    )
    max_tasks: int | None = field(default=None, metadata=flag("solve the first N tasks only", type=COUNT, metavar="N"))
    tasks_per_batch: int | None = field(
        default=None,
        metadata=flag(
            "tasks that are adapted to side by side, at most (default: 8 on the CPU, 32 on a GPU)",
            type=COUNT,
            metavar="N",
        ),
    )
    device: str = field(default="auto", metadata=flag("default {default}", choices=("auto", "cuda", "cpu")))
    out: str | None = field(
        default=None,
        metadata=flag(
            "where submission.json, evaluation.json and solutions.jsonl go (default: the run folder)", metavar="DIR"
        ),
    )


@dataclass(frozen=True)
class ExportConfig:
    """What `efe-train export` was asked to do: each field is a flag."""

    checkpoint: str = field(metadata=flag("run folder", metavar="DIR"))
    out: str = field(metadata=flag("where the files go: a new or an empty folder", metavar="DIR"))


@dataclass(frozen=True)
class ReportConfig:
    """What `efe-train report` was asked to do: each field is an argument."""

    run: str = field(metadata=flag("run folder", named=False, metavar="RUN"))
    out: str | None = field(
        default=None, metadata=flag("the page (default: report.html in the run folder)", metavar="FILE")
    )


@dataclass(frozen=True)
class ShowConfig:
    """What `efe-train show` was asked to do: each field is an argument."""

    task: str = field(metadata=flag("id of a task", named=False, metavar="TASK"))
    checkpoint: str | None = field(
        default=None, metadata=flag("run folder: show its attempts, once it has been evaluated", metavar="RUN")
    )
    dataset: str | None = field(
        default=None,
        metadata=flag(f"{DATASET} (default: the run's, {TrainConfig.dataset} without one)", metavar="NAME"),
    )


class Command(NamedTuple):
    """configuration: the dataclass of its flags."""

    configuration: type
    description: str


COMMANDS = {
    "evaluate": Command(EvaluateConfig, "Score a checkpoint of efe-train."),
    "export": Command(ExportConfig, "Write the Qwen of a run for peft or transformers to load."),
    "report": Command(ReportConfig, "Draw a run on one page, to open in a browser."),
    "show": Command(ShowConfig, "Print a task, and what a run made of it."),
}
"""By the names of the modules that carry them out. Without one, efe-train trains."""


def parse(argv: Sequence[str]) -> tuple[str, object]:
    """The module that carries out a command, and what its `main` takes: the flags.

    Raises:
        UserError: a mistake in the command or in its flags.
    """
    name = argv[0] if argv else ""
    if name in COMMANDS:
        return name, COMMANDS[name].configuration(**vars(parser_of(name).parse_args(argv[1:])))
    if name and not name.startswith("-"):
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(COMMANDS)}; without one, efe-train trains."
        raise UserError(f"{name!r} is not a command of efe-train: {hint}")
    return "run", parse_train_arguments(argv)


def parser_of(name: str) -> Parser:
    """The parser of a command of COMMANDS; for any other name, of training."""
    if name in COMMANDS:
        command = COMMANDS[name]
        return Parser(command.configuration, prog=f"efe-train {name}", description=command.description)
    parser = train_parser()
    about = "settings in YAML or JSON, such as the config.json of a run but for out and resume; flags override them"
    parser.add_argument("--config", metavar="FILE", help=about)
    return parser


def parse_train_arguments(argv: Sequence[str]) -> dict[str, object]:
    """The settings that were given, under the names of TrainConfig's fields: as flags, or else in the file of --config.

    Raises:
        UserError: a mistake in the flags or in the file.
    """
    given = vars(parser_of("train").parse_args(argv))
    file = given.pop("config")
    return {**(read_settings(file) if file is not None else {}), **given}


def read_settings(file: str) -> dict[str, object]:
    import yaml

    try:
        settings = settings_from(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
        # Which run it was is no setting of another one.
        return {name: value for name, value in settings.items() if name not in ("out", "resume")}
    except OSError as error:
        reason = f"{error.strerror}."
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = f"{' '.join(str(error).split())}."
    except UserError as error:
        reason = str(error)
    raise UserError(f"--config {file!r} cannot be read as settings: {reason}")
