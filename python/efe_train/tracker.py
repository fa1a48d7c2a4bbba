"""What --log_with adds to a run: its metrics and pictures of its plans, in a tracker that accelerate knows."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder
from efe_train.metrics import METRICS, Row
from efe_train.picture import Picture

PROJECT = "efe-train"

REMEDIES = {"wandb": "run `wandb login`, or set WANDB_MODE=offline"}
"""What lets a tracker begin that could not; for any other one, leaving it out."""


class Tracker:
    """Logs a run to the trackers of an Accelerator."""

    def __init__(self, accelerator: Any) -> None:
        """accelerator: an `accelerate.Accelerator` whose trackers have begun."""
        self.accelerator = accelerator

    def log(self, row: Row, step: int) -> None:
        """Those metrics of a batch that METRICS marks as tracked."""
        tracked = {metric.name: row[metric.name] for metric in METRICS if metric.tracked and metric.name in row}
        self.accelerator.log(tracked, step=step)

    def log_plans(self, images: Mapping[str, Picture], step: int) -> None:
        """Pictures by name, each [H, W, 3]. step: that of the last row or a later one, for wandb takes no earlier."""
        for tracker in self.accelerator.trackers:
            for name, image in images.items():
                show(tracker, f"plans/{name}", image, step)

    def end(self) -> None:
        """Hand over what still waits. Nothing can be logged afterwards."""
        self.accelerator.end_training()


def show(tracker: Any, name: str, image: Picture, step: int) -> None:
    """A picture [H, W, 3] in one of accelerate's trackers, each of which takes pictures in its own way."""
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    else:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: image[None]}, step=step, **layout)


def check_tracker(name: str | None) -> None:
    """
    Raises:
        UserError: a package that the tracker needs is not installed.
    """
    for package in ("accelerate", name, "PIL") if name is not None else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--log_with {name} needs the package {package}, which is not installed: "
                f'pip install "efe-kernels[{name}]"'
            )


def start_tracker(config: TrainConfig, folder: RunFolder) -> Tracker | None:
    """The tracker that the run is logged to, if any.

    Raises:
        UserError: the tracker cannot begin, as where nobody has logged in to it.
    """
    if config.log_with is None:
        return None
    from accelerate import Accelerator

    name = folder.path.resolve().name
    begin = {
        "wandb": {"name": name, "dir": str(folder.path)},
        "trackio": {"name": name, "resume": "allow" if config.resume else "never"},
    }
    settings = {key: value for key, value in asdict(config).items() if value is not None}
    try:
        with no_questions():
            accelerator = Accelerator(log_with=config.log_with, project_dir=folder.path, cpu=config.device == "cpu")
            accelerator.init_trackers(PROJECT, config=settings, init_kwargs=begin)
    except Exception as error:  # a tracker raises what its service or its network happens to break
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        remedy = REMEDIES.get(config.log_with, "leave --log_with out")
        raise UserError(f"--log_with {config.log_with} cannot begin ({reason}): {remedy}.") from None
    return Tracker(accelerator)


@contextmanager
def no_questions() -> Iterator[None]:
    """No terminal to ask at, for wandb would wait for an answer that nobody may be there to give."""
    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = terminal
