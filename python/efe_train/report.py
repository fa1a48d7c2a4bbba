"""The run folder and what a run says: log lines, metrics, checkpoints and the closing table."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efe_train.config import TrainConfig, UserError, config_from_saved
from efe_train.files import REMEDY, parse_json, read_json, replaced, written

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
        if (path / "config.json").exists() or (path / "checkpoint.pt").exists():
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
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def candidate(self) -> Path:
        """A state that only becomes the checkpoint when the next batches show that it is good."""
        return self.path / "candidate.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def qwen(self) -> Path:
        return self.path / "qwen"

    def say(self, text: str) -> None:
        """Print above the progress bar, and keep in training.log."""
        tqdm.write(text)
        sys.stdout.flush()  # a pipe would hold it back
        with written(self.path / "training.log", "ab") as file:
            file.write((text + "\n").encode())

    def write_config(self, config: TrainConfig) -> None:
        with replaced(self.path / "config.json") as file:
            file.write((json.dumps(asdict(config), indent=2) + "\n").encode())

    def read_config(self) -> TrainConfig:
        file = self.path / "config.json"
        values = read_json(file, REMEDY)
        try:
            return config_from_saved(values)
        except UserError as error:
            raise UserError(f"{file} cannot be read as the settings of a run: {error}") from None

    def append_metrics(self, rows: Iterable[Mapping[str, float]]) -> None:
        with written(self.metrics, "ab") as file:
            file.write(lines(rows))

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of the batches, up to the first line that is damaged."""
        rows: list[dict[str, float]] = []
        for line in self.metrics.read_bytes().splitlines() if self.metrics.exists() else []:
            try:
                row = parse_json(line)
            except ValueError:
                break
            if not (isinstance(row, dict) and isinstance(row.get("batch"), int)):
                break
            rows.append(row)
        return rows

    def cut_metrics(self, last_batch: int) -> list[dict[str, float]]:
        """Drop the rows of batches after a checkpoint, which a resumed run makes again. Returns the others."""
        rows = [row for row in self.read_metrics() if row["batch"] <= last_batch]
        with replaced(self.metrics) as file:
            file.write(lines(rows))
        if len(rows) < last_batch:
            self.say(f"{self.metrics} is damaged: of the first {last_batch} batches it keeps {len(rows)}.")
        return rows

    def write_candidate(self, state: Mapping[str, Any]) -> None:
        with written(self.candidate) as file:
            torch.save(dict(state), file)

    def accept_candidate(self) -> None:
        os.replace(self.candidate, self.checkpoint)

    def drop_candidate(self) -> None:
        self.candidate.unlink(missing_ok=True)

    def qwen_digests(self) -> dict[str, str]:
        """SHA-256 of each file of qwen/ by its name. A checkpoint holds them: its weights fit no other Qwen."""
        files = sorted(file for file in self.qwen.rglob("*") if file.is_file())
        return {file.relative_to(self.qwen).as_posix(): digest(file) for file in files}

    def read_checkpoint(self) -> dict[str, Any]:
        """The saved state, on the CPU.

        Raises:
            UserError: it is damaged, or a file of qwen/ is.
        """
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:
                # torch does not look at the checksums: weights that a power cut left as zeros would be taken.
                broken = archive.testzip()
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            qwen = state.get("qwen", {})
        except (OSError, MemoryError) as error:
            raise UserError(f"{self.checkpoint} cannot be read ({error}).") from None
        except Exception as error:  # zipfile and torch raise what the broken file happens to break
            raise UserError(f"{self.checkpoint} is damaged ({type(error).__name__}): {REMEDY}.") from None
        if broken is not None:
            raise UserError(f"{self.checkpoint} is damaged (in {broken}): {REMEDY}.")
        for name, expected in qwen.items():
            file = self.qwen / name
            if not file.is_file() or digest(file) != expected:
                raise UserError(f"{file} is {'damaged' if file.exists() else 'missing'}: {REMEDY}.")
        return state

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Wraps what builds a model from the checkpoint: of another version of the model, it breaks anything."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.checkpoint} does not fit the model of this efe-train ({type(error).__name__}): {REMEDY}."
            ) from None


def lines(rows: Iterable[Mapping[str, float]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_tracker(name: str | None) -> None:
    for package in ("accelerate", name) if name is not None else ():
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--log_with {name} needs the package {package}, which is not installed: pip install {package}"
            )


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
    extremes = f", from {min(refreshes):.2e} to {max(refreshes):.2e}" if refreshes else ""
    lines.append(f"Qwen_grad above 0 at {above} of {len(refreshes)} refreshes{extremes}")
    lines.append(f"{len(rows)} batches in all; this command took {seconds:.0f} s")
    width = max(map(len, lines))
    return "\n".join(["-" * width, *lines, "-" * width])
