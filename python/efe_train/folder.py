"""The run folder: settings, metrics, checkpoints and what was printed."""

from __future__ import annotations

import hashlib
import json
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
from efe_train.files import REMEDY, read_json, read_lines, replaced, written
from efe_train.metrics import Row

RUNS = Path("runs")


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
        """A folder for a new run; without a name one under runs/ that tells the time. What a run that was killed before
        its first checkpoint left there is written over.

        Raises:
            UserError: the folder holds a run already or cannot be made.
        """
        folder = cls(Path(out) if out else RUNS / time.strftime("%Y%m%d-%H%M%S"))
        # A run writes qwen/ before anything else: without it, a config.json is that of something else.
        foreign = (folder.path / "config.json").exists() and not folder.qwen.exists()
        if foreign or folder.checkpoint.exists() or folder.read_metrics():
            raise UserError(
                f"--out {str(folder.path)!r} already holds a run: add --resume to continue it, or name another folder."
            )
        make_folder(folder.path)
        return folder

    @classmethod
    def find(cls, out: str | None, holding: Sequence[str] = ("checkpoint.pt", "config.json")) -> RunFolder:
        """The run folder of that name, or the newest one under runs/.

        Raises:
            UserError: there is none, or it lacks one of the files that it should be holding.
        """
        newest = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda file: file.stat().st_mtime)
        if not out and not newest:
            raise UserError(
                f"There is no run with a checkpoint under {RUNS}/ to go on from: name one, or begin a new run."
            )
        path = Path(out) if out else newest[-1].parent
        if not all((path / name).is_file() for name in holding):
            raise UserError(f"{str(path)!r} is not a run folder: it should hold {' and '.join(holding)}.")
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


def lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
