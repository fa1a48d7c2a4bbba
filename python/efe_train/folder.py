"""The run folder: settings, metrics, checkpoints and what was printed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from efe_train.checkpoint import digest, read_checkpoint, read_state, write_checkpoint
from efe_train.config import TrainConfig, UserError, config_from_saved
from efe_train.files import REMEDY, flush, read_json, read_lines, replaced, written
from efe_train.metrics import Row
from efe_train.processes import ALONE, Processes, by_first

RUNS = Path("runs")


def make_folder(path: str | Path) -> Path:
    """The folder of that name, made if need be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(path)!r} cannot be made a folder ({error.strerror}).") from None
    return Path(path)


class RunFolder:
    """A folder with config.json, metrics.jsonl (one line per batch), training.log, checkpoints/ and qwen/.

    Several processes share it: the first of them writes, for all.
    """

    def __init__(self, path: Path, processes: Processes = ALONE, chosen: Path | None = None) -> None:
        """chosen: a checkpoint of it; without it the newest one serves."""
        self.path = path
        self.processes = processes
        self.chosen = chosen

    @classmethod
    def create(cls, out: str | None, processes: Processes = ALONE) -> RunFolder:
        """A folder for a new run; without a name one under runs/ that tells the time. What a run that was killed before
        its first checkpoint left there is written over.

        Raises:
            UserError: the folder holds a run already or cannot be made.
        """

        def create() -> Path:
            folder = cls(Path(out) if out else RUNS / time.strftime("%Y%m%d-%H%M%S"))
            # A run writes qwen/ before anything else: without it, a config.json is that of something else.
            foreign = (folder.path / "config.json").exists() and not folder.qwen.exists()
            if foreign or folder.saved() or folder.read_metrics():
                raise UserError(
                    f"--out {str(folder.path)!r} already holds a run: "
                    "add --resume to continue it, or name another folder."
                )
            return make_folder(folder.path)

        return cls(processes.by_first(create), processes)

    @classmethod
    def find(cls, out: str | None, holding: Sequence[str] = ("checkpoints", "config.json")) -> RunFolder:
        """The run folder of that name, or that of a checkpoint in it, or the newest one under runs/.

        Raises:
            UserError: there is none, or it lacks something that it should be holding.
        """
        newest = sorted(RUNS.glob("*/checkpoints/batch-*"), key=lambda file: file.stat().st_mtime)
        if not out and not newest:
            raise UserError(
                f"There is no run with a checkpoint under {RUNS}/ to go on from: name one, or begin a new run."
            )
        path = Path(out) if out else newest[-1].parents[1]
        chosen = path if path in cls(path.parent.parent).saved() else None
        folder = cls(path.parents[1] if chosen else path, chosen=chosen)
        lacking = [name for name in holding if not (folder.path / name).exists()]
        if lacking or ("checkpoints" in holding and not folder.saved()):
            raise UserError(f"{str(path)!r} is not a run folder: it should hold {' and '.join(holding)}.")
        return folder

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def saved(self) -> list[Path]:
        """Its checkpoints, the newest last."""
        named = {each: each.name.removeprefix("batch-") for each in self.checkpoints.glob("batch-*")}
        return sorted((each for each in named if named[each].isdecimal()), key=lambda each: int(named[each]))

    @property
    def checkpoint(self) -> Path:
        return self.chosen or self.saved()[-1]

    @property
    def candidate(self) -> Path:
        """A state that only becomes a checkpoint when the next batches show that it is good."""
        return self.checkpoints / "candidate"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def qwen(self) -> Path:
        return self.path / "qwen"

    @by_first
    def say(self, text: str) -> None:
        """Print above the progress bar, and keep in training.log."""
        tqdm.write(text)
        sys.stdout.flush()  # a pipe would hold it back
        with written(self.path / "training.log", "ab") as file:
            file.write((text + "\n").encode())

    @by_first
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

    @by_first
    def append_metrics(self, rows: Iterable[Row]) -> None:
        with written(self.metrics, "ab") as file:
            file.write(lines(rows))

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of the batches, up to the first line that is damaged."""
        rows: list[dict[str, float]] = []
        for row in read_lines(self.metrics):
            if not (isinstance(row, dict) and isinstance(row.get("batch"), int)):
                break
            rows.append(row)
        return rows

    @by_first
    def cut_metrics(self, last_batch: int) -> list[dict[str, float]]:
        """Drop the rows of batches after a checkpoint, which a resumed run makes again. Returns the others."""
        rows = [row for row in self.read_metrics() if row["batch"] <= last_batch]
        with replaced(self.metrics) as file:
            file.write(lines(rows))
        if len(rows) < last_batch:
            RunFolder(self.path).say(
                f"{self.metrics} is damaged: of the first {last_batch} batches it keeps {len(rows)}."
            )
        return rows

    @by_first
    def write_candidate(self, state: Mapping[str, Any]) -> None:
        """state: `scores` in it are those of the held-out tasks, by which checkpoints are compared, or None."""
        write_checkpoint(self.candidate, state)

    @by_first
    def accept_candidate(self, batch: int, keep: int) -> None:
        """Make it the checkpoint of a batch. The last `keep` stay, and the best of those that were scored."""
        path = self.checkpoints / f"batch-{batch:06d}"
        if path.exists():  # saved before the run was interrupted, and the same
            shutil.rmtree(self.candidate)
        else:
            os.replace(self.candidate, path)
            flush(self.checkpoints)
        best = self.best()
        for each in self.saved()[:-keep]:
            if each != best:
                # A name at once: half of a checkpoint must not pass for one.
                os.replace(each, each.with_name(f".{each.name}.{time.time_ns()}.old"))
        for each in self.checkpoints.glob(".*.old"):
            shutil.rmtree(each, ignore_errors=True)

    def best(self) -> Path | None:
        """Of the checkpoints that were scored, the one with the best scores, and of equals the first."""
        scores = {each: scores_of(each) for each in self.saved()}
        return max((each for each in scores if scores[each]), key=lambda each: scores[each] or [], default=None)

    @by_first
    def drop_candidate(self) -> None:
        shutil.rmtree(self.candidate, ignore_errors=True)

    def qwen_digests(self) -> dict[str, str]:
        """SHA-256 of each file of qwen/ by its name. A checkpoint holds them: its weights fit no other Qwen."""
        files = sorted(file for file in self.qwen.rglob("*") if file.is_file())
        return {file.relative_to(self.qwen).as_posix(): digest(file) for file in files}

    def read_checkpoint(self) -> dict[str, Any]:
        """The saved state, on the CPU.

        Raises:
            UserError: it is damaged, or a file of qwen/ is.
        """
        state = read_checkpoint(self.checkpoint)
        for name, expected in state["qwen"]:
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


def scores_of(checkpoint: Path) -> list[float] | None:
    """Of the held-out tasks, where it has them and can be read."""
    try:
        scores: list[float] | None = read_state(checkpoint)[1].get("scores")
    except UserError:
        return None
    return scores


def lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
