from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from efe_train.__main__ import main
from efe_train.checkpoint import write_checkpoint
from efe_train.config import TrainConfig, UserError
from efe_train.folder import RunFolder
from tests.efe_train.conftest import recolouring_task, write_tasks

OLD, NEW = "checkpoints/batch-000000", "checkpoints/batch-000003"
FILES = ("model.safetensors", "state.json", "training.safetensors")
NEEDED = (
    *(f"{NEW}/{name}" for name in FILES),
    "config.json",
    "qwen/config.json",
    "qwen/tokenizer.json",
    "qwen/tokenizer_config.json",
)
DISPENSABLE = (*(f"{OLD}/{name}" for name in FILES), "metrics.jsonl", "report.html", "training.log")


def zeros_in_the_middle(data: bytes) -> bytes:
    """Nulls can be lost without a harm."""
    middle = len(data) // 2
    at = next(
        at
        for at in (*range(middle, len(data)), *range(middle))
        if all(data[at : at + 9]) and len(set(data[at : at + 9])) > 3
    )
    return data[:at] + bytes(9) + data[at + 9 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "torn": lambda data: data[:-10],
    "blank tail": lambda data: data[:-64] + b" " * 64,
    "zeros": lambda data: bytes(len(data)),
    "zeros in the middle": zeros_in_the_middle,
    "not UTF-8": lambda data: data[:-64] + b"\xff" * 64,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with three batches done."""
    base = tmp_path_factory.mktemp("sound")
    tasks = write_tasks(base / "tasks", {f"task{seed}": recolouring_task(seed) for seed in range(4)})
    out = base / "run"
    arguments = ["--dataset", str(tasks), "--batch_size", "6", "--device", "cpu", "--max_batches", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    of_transformers_4 = {"qwen/special_tokens_map.json"}
    assert found - of_transformers_4 == {*NEEDED, *DISPENSABLE}
    return out


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def resume(folder: Path) -> int:
    return main(["--resume", "--out", str(folder), "--max_batches", "4"])


def evaluate(folder: Path) -> int:
    return main(["evaluate", "--checkpoint", str(folder)])


@pytest.mark.parametrize("command", [resume, evaluate])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*NEEDED, *DISPENSABLE])
def test_a_damaged_file_is_mended_or_named(
    name: str, damage: str, command: Callable[[Path], int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    data = DAMAGES[damage]((folder / name).read_bytes())
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    code = command(folder)
    message = capsys.readouterr().err
    assert code == (2 if name in NEEDED else 0)
    assert "Traceback" not in message
    if code == 2:
        assert message.startswith("efe-train: ") and message.count("\n") == 1
        assert Path(name).name in message
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "tail",
    [b'{"batch": 3, "lo', b"\n\n", b"   ", bytes(100), b"null\n", b"[1]\n", b"[" * 100_000, b"\xff\xfe"],
    ids=["torn", "blank lines", "blanks", "zeros", "null", "list", "nested", "not UTF-8"],
)
def test_the_metrics_before_the_damage_are_kept(tail: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2]
    (folder / "metrics.jsonl").write_bytes(b"".join(good) + tail)
    assert resume(folder) == 0
    kept = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert kept[:2] == good
    assert [json.loads(line)["batch"] for line in kept] == [1, 2, 4]
    assert "is damaged: of the first 3 batches it keeps 2" in capsys.readouterr().out


def test_damage_after_the_checkpoint_costs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"batch": 4, "lo')
    assert resume(folder) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 2, 3, 4]
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("settings", ["5", "[]", '{"epochs": "many"}', '{"epochs": [1]}', '{"lora_rank": true}'])
def test_settings_of_another_kind_are_named(settings: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(settings)
    capsys.readouterr()
    for command in (resume, evaluate):
        assert command(folder) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"{folder / 'config.json'} cannot be read as the settings" in message


def test_the_checkpoint_of_another_model_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = RunFolder(folder).read_checkpoint()
    del state["modules"]["planner"]["head.bias"]
    for content in (state, {"weights": 1, "qwen": []}):
        write_checkpoint(folder / NEW, content)
        capsys.readouterr()
        for command in (resume, evaluate):
            assert command(folder) == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1 and f"{folder / NEW} does not fit" in message


def test_a_run_whose_settings_are_lost_is_not_overwritten(
    sound: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").unlink()
    assert main(["--dataset", str(sound.parent / "tasks"), "--out", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_file_takes_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut between the two calls leaves the file as it was."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda stream: (calls.append("fsync"), fsync(stream)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(f"replace {Path(new).name}"), replace(old, new)))
    run = RunFolder(tmp_path)
    run.write_candidate({"value": torch.tensor(1.0), "scores": None})
    run.accept_candidate(1, keep=1)
    # Three files and their folder, then the folder that holds it under its new name.
    assert calls == ["fsync"] * 4 + ["replace candidate", "fsync", "replace batch-000001", "fsync"]
    calls.clear()
    run.write_config(TrainConfig())
    run.append_metrics([{"batch": 1}])
    run.cut_metrics(1)
    assert calls == ["fsync", "replace config.json", "fsync"] + ["fsync"] * 2 + ["replace metrics.jsonl", "fsync"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("name", ["training.log", "metrics.jsonl"])
def test_a_full_disk_is_explained(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match=rf"{name} cannot be written \(No space left on device\)"):
        run.say("text")
        run.append_metrics([{"batch": 1}])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more to one file fails, as under a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_for_a_checkpoint_is_said_before_training(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = str(sound.parent / "tasks")
    with largest_file((sound / OLD / "model.safetensors").stat().st_size // 2):
        assert main(["--dataset", tasks, "--out", str(tmp_path / "run"), "--max_batches", "3", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "cannot be written" in printed.err
    assert "[Batch" not in printed.out
    assert [*(tmp_path / "run" / "checkpoints").iterdir()] == []


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in (folder / "checkpoints").rglob("*") if file.is_file()}
    capsys.readouterr()
    with largest_file((folder / NEW / "training.safetensors").stat().st_size // 2):
        assert resume(folder) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("efe-train: ") and "cannot be written" in message
    assert {file: file.read_bytes() for file in (folder / "checkpoints").rglob("*") if file.is_file()} == before
    assert resume(folder) == 0
