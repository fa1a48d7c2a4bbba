"""The run folder and what a run says: log lines, metrics, checkpoints and the closing table."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efe_train.config import TrainConfig, UserError, config_from

RUNS = Path("runs")
EDGE = 20
"""Batches at the beginning and at the end of a run whose means the closing table compares."""


def make_folder(path: str | Path) -> Path:
    """The folder of that name, made if need be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(path)!r} cannot be made a folder ({error.strerror}).") from None
    return Path(path)


class RunFolder:
    """A folder with config.json, metrics.jsonl (one line per batch), training.log, checkpoint.pt and qwen/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | None) -> RunFolder:
        """An empty run folder; without a name one under runs/ that tells the time.

        Raises:
            UserError: the folder holds a run already or cannot be made.
        """
        path = Path(out) if out else RUNS / time.strftime("%Y%m%d-%H%M%S")
        if (path / "config.json").exists():
            raise UserError(
                f"--out {str(path)!r} already holds a run: add --resume to continue it, or name another folder."
            )
        return cls(make_folder(path))

    @classmethod
    def find(cls, out: str | None) -> RunFolder:
        """The run folder of that name, or the newest one under runs/.

        Raises:
            UserError: there is none, or it has no checkpoint.
        """
        newest = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)
        if not out and not newest:
            raise UserError(
                f"There is no run with a checkpoint under {RUNS}/ to go on from: name one, or begin a new run."
            )
        path = Path(out) if out else newest[-1].parent
        if not (path / "checkpoint.pt").is_file() or not (path / "config.json").is_file():
            raise UserError(f"{str(path)!r} is not a run folder: it should hold checkpoint.pt and config.json.")
        return cls(path)

    @property
    def qwen(self) -> Path:
        return self.path / "qwen"

    def say(self, text: str) -> None:
        """Print above the progress bar, and keep in training.log."""
        tqdm.write(text)
        with (self.path / "training.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def write_config(self, config: TrainConfig) -> None:
        (self.path / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")

    def read_config(self) -> TrainConfig:
        try:
            return config_from(json.loads((self.path / "config.json").read_text(encoding="utf-8")))
        except (ValueError, AttributeError, TypeError):
            raise UserError(f"{self.path / 'config.json'} cannot be read: it is not what efe-train wrote.") from None

    def append_metrics(self, rows: Iterable[Mapping[str, float]]) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_metrics(self) -> list[dict[str, float]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []

    def cut_metrics(self, last_batch: int) -> list[dict[str, float]]:
        """Drop the rows of batches after a checkpoint, which a resumed run makes again. Returns the others."""
        rows = [row for row in self.read_metrics() if row["batch"] <= last_batch]
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        self.append_metrics(rows)
        return rows

    def write_candidate(self, state: Mapping[str, Any]) -> None:
        """Save a state that only becomes the checkpoint when the next batches show that it is good."""
        torch.save(dict(state), self.path / "candidate.pt")

    def accept_candidate(self) -> None:
        os.replace(self.path / "candidate.pt", self.path / "checkpoint.pt")

    def drop_candidate(self) -> None:
        (self.path / "candidate.pt").unlink(missing_ok=True)

    def read_checkpoint(self) -> dict[str, Any]:
        """The saved state, on the CPU."""
        try:
            state: dict[str, Any] = torch.load(self.path / "checkpoint.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what the broken file happens to break
            raise UserError(
                f"{self.path / 'checkpoint.pt'} cannot be read ({type(error).__name__}): it is damaged."
            ) from None
        return state


def check_tracker(name: str | None) -> None:
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--log_with {name} needs the package {name}, which is not installed: pip install {name}")


def start_tracker(config: TrainConfig, folder: RunFolder) -> Any | None:
    """The Accelerator whose tracker logs the run, or None."""
    if config.log_with is None:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=config.log_with, project_dir=folder.path, cpu=config.device == "cpu")
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    accelerator.init_trackers("efe-train", config=settings)
    return accelerator


def log_line(row: Mapping[str, float]) -> str:
    return (
        f"[Batch {row['batch']:4.0f}] Reward: {row['reward']:7.4f} | Loss: {row['loss']:7.4f} | "
        f"Qwen_grad: {row['qwen_grad']:.2e} | Mask_ratio: {row['mask_ratio']:.4f}"
    )


def closing_table(rows: Sequence[Mapping[str, float]], seconds: float) -> str:
    """First against last batches, and how Qwen fared. rows: metrics of every batch of the run."""
    edge = max(1, min(EDGE, len(rows) // 2))
    first, last = rows[:edge], rows[-edge:]
    lines = [f"{'mean over batches':20s} {f'first {edge}':>12s} {f'last {edge}':>12s} {'last / first':>13s}"]
    for label, name in (
        ("Loss", "loss"),
        ("EFE (unweighted)", "efe"),
        ("Mask ratio", "mask_ratio"),
        ("Reward", "reward"),
    ):
        begin, end = (math.fsum(row[name] for row in part) / edge for part in (first, last))
        ratio = f"{end / begin:13.3f}" if name != "reward" and begin > 0 else f"{'':13s}"
        lines.append(f"{label:20s} {begin:12.4f} {end:12.4f} {ratio}".rstrip())
    refreshes = [row["qwen_grad"] for row in rows if row["refresh"]]
    above = sum(value > 0 for value in refreshes)
    extremes = f"from {min(refreshes):.2e} to {max(refreshes):.2e}"
    lines.append(f"Qwen_grad above 0 at {above} of {len(refreshes)} refreshes, {extremes}")
    lines.append(f"{len(rows)} batches in all; this command took {seconds:.0f} s")
    width = max(map(len, lines))
    return "\n".join(["-" * width, *lines, "-" * width])
