"""Compiles programs that run CUDA sources on the emulator, plainly or under sanitizers, and runs them. No torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.emulated.translate import join, translate

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = join(CSRC)
COMPILER = os.environ.get("CXX", "c++").split()
# nvcc takes a comparison of signed with unsigned without a word.
FLAGS = [
    "-std=c++20", "-g1", "-Wall", "-Wno-unknown-pragmas", "-Wno-sign-compare",
    f"-I{HERE}", f"-I{HERE / 'include'}", f"-I{CSRC}",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
TIMEOUT_S = 300
# The line of an output that says what is wrong: ours, UBSan's, AddressSanitizer's or ThreadSanitizer's.
COMPLAINT = re.compile(r"^.*?((?:driver|cuda_emulator|runtime error|(?:Address|Thread)Sanitizer): .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Mode:
    """A way to run kernels; `rounds` of the driver catch every mutation that is this mode's to catch."""

    name: str
    sanitizers: str
    rounds: int

    @property
    def flags(self) -> list[str]:
        return [f"-fsanitize={self.sanitizers}", "-fno-sanitize-recover=all"] if self.sanitizers else []


# The cheapest first.
PLAIN, THREAD, ADDRESS = Mode("plain", "", 4), Mode("thread", "thread", 1), Mode("address", "address,undefined", 4)
MODES = (PLAIN, THREAD, ADDRESS)


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def complaint(program: Path, *arguments: str) -> str:
    """What a program complains about: one line, empty where it ends well."""
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    found = COMPLAINT.search(done.stderr)
    return found[1] if found else f"exit code {done.returncode}: {done.stderr[-200:].strip()}"


@cache
def missing(mode: Mode) -> str | None:
    """Why this machine cannot run a mode, None where it can."""
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler ({COMPILER[0]})"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), Path(folder, "empty")
        source.write_text("#include <source_location>\n_Float16 half;\nint main() {}\n")
        command = [*COMPILER, "-std=c++20", *mode.flags, str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{COMPILER[0]} lacks C++20, _Float16 or {mode.sanitizers or 'nothing'}: {done.stderr[-200:]}"
        wrong = complaint(program)
        return f"{mode.sanitizers} does not run here: {wrong}" if wrong else None


class Workshop:
    """A folder in which programs are built; what they share is compiled once."""

    def __init__(self, folder: Path, modes: Iterable[Mode] = MODES) -> None:
        self.folder = folder
        self.emulator = folder / "emulator.o"
        with workers() as pool:
            emulator = pool.submit(
                call, [*COMPILER, *FLAGS, "-O1", "-c", str(HERE / "emulator.cpp"), "-o", str(self.emulator)]
            )
            compiled = pool.map(lambda mode: (mode, self.compile(mode, HERE / "driver.cpp", "driver")), modes)
            self.drivers = dict(compiled)
            emulator.result()

    def compile(self, mode: Mode, source: Path, name: str) -> Path:
        built = self.folder / f"{name}.{mode.name}.o"
        call([*COMPILER, *FLAGS, *mode.flags, "-c", str(source), "-o", str(built)])
        return built

    def program(self, mode: Mode, cuda_source: str, name: str, *objects: Path) -> Path:
        """The program of a CUDA source and these objects."""
        translated = self.folder / f"{name}.{mode.name}.cpp"
        translated.write_text(translate(cuda_source, f"{name}.cu"))
        program = self.folder / f"{name}.{mode.name}"
        kernels = self.compile(mode, translated, name)
        call([*COMPILER, *mode.flags, str(kernels), *map(str, objects), str(self.emulator), "-o", str(program)])
        return program

    def drive(self, mode: Mode, cuda_source: str, name: str = "cuda") -> str:
        """What the driver of csrc/prompt complains about in this version of its kernels."""
        return complaint(self.program(mode, cuda_source, name, self.drivers[mode]), str(mode.rounds))


def workers() -> ThreadPoolExecutor:
    """As many as there are cores: what they do happens in other processes."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))
