"""Every way to install the package, as a user types it: each works, or says in one sentence what is missing.

    python -m tests.install.matrix [--only NAME...] [--python PATH...]

A row makes an environment of its own in a temporary folder and prints a line: its name, the outcome, what was seen.
torch is not installed again and again: an environment sees that of a base, an interpreter that can import it, with what
torch itself needs and nothing else. The first base is the interpreter that runs this; --python names others, of another
Python or with another torch. What builds need (setuptools, ninja, pybind11, build) comes from the package index.
The exit code is 1 where a row did not give what is expected.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.install import uses

ROOT = Path(__file__).resolve().parents[2]
RELEASES = [f"3.{minor}" for minor in range(10, 14)]
# Of the calling shell what the tools need: none of its Python settings, and not the switches that the rows try.
TRIED = ("PYTHON", "TRITON_", "EFE_KERNELS_REQUIRE_EXT")
KEPT = {name: value for name, value in os.environ.items() if not name.startswith(TRIED)}
KEPT |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "TERM": "dumb"}
ISOLATED = (
    r"efe-kernels compiles against .* torch cannot be imported here .*, (pip install .*) and then (pip install .*)"
)
NOT_BUILT = "the C++ extension was not built"


class Unexpected(Exception):
    """A row that did not give what it should."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Unexpected(what)


@dataclass(frozen=True)
class Base:
    """An interpreter that can import torch."""

    python: str
    release: str
    torch: str
    links: dict[str, str]  # what torch is made of and needs, as it is named in an environment -> where it lies

    @classmethod
    def of(cls, python: str) -> Base | None:
        """None where it does not run or has no torch."""
        with suppress(OSError, subprocess.SubprocessError, json.JSONDecodeError):
            done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True, env=KEPT)
            return cls(python, **json.loads(done.stdout))
        return None


PROBE = """
import importlib.metadata, json, platform, re
import torch

links, waiting, seen = {}, ["torch"], set()
while waiting:
    name = re.sub("[-_.]+", "-", waiting.pop()).lower()
    if name in seen:
        continue
    seen.add(name)
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    for file in found.files or ():
        if file.parts[0] not in ("..", "__pycache__"):
            links[file.parts[0]] = str(found.locate_file(file.parts[0]))
    waiting += [re.match(r"[\\w.-]+", need)[0] for need in found.requires or () if "extra ==" not in need]
print(json.dumps({"release": platform.python_version(), "torch": torch.__version__, "links": links}))
"""


class Environment:
    """A virtual environment that sees the torch of a base, or none, and what a row installs."""

    def __init__(self, base: Base, folder: Path, *, with_torch: bool = True, without: tuple[str, ...] = ()) -> None:
        self.folder = folder
        subprocess.run([base.python, "-m", "venv", str(folder)], check=True, env=KEPT, capture_output=True)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        if with_torch:
            # Beside the environment, where pip finds it but would not uninstall it.
            borrowed = folder / "borrowed"
            borrowed.mkdir()
            for name, place in base.links.items():
                if name.partition("-")[0] not in without:
                    (borrowed / name).symlink_to(place)
            (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    @property
    def site(self) -> Path:
        return next(self.folder.glob("lib*/python3*/site-packages"), self.folder / "Lib" / "site-packages")

    def run(
        self, command: str, folder: Path, *, fails: bool = False, path: list[str] | None = None, **environment: str
    ) -> str:
        """What the command prints, which must succeed, or fail. path: of the tools beside those of the environment."""
        search = os.pathsep.join([str(self.bin), *([KEPT["PATH"]] if path is None else path)])
        program, *arguments = shlex.split(command)
        found = shutil.which(program, path=search)
        expect(found, f"{program} is not found")
        done = subprocess.run(
            [str(found), *arguments], cwd=folder, env={**KEPT, "PATH": search, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if (done.returncode != 0) != fails:
            print(done.stdout, file=sys.stderr)
            raise Unexpected(f"`{command}` {'succeeded' if fails else 'failed'}: {last_line(done.stdout)}")
        return done.stdout


def last_line(output: str) -> str:
    """Of what a build prints, which pip marks the end of, or of everything."""
    lines = [line.strip() for line in output.partition("[end of output]")[0].splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Matrix:
    """What the rows share: the bases, one source distribution, and for each base one source folder and one wheel."""

    def __init__(self, folder: Path, base: Base, others: list[Base]) -> None:
        self.folder, self.base, self.others = folder, base, others
        self.wheels: dict[str, Path] = {}

    def environment(self, name: str, base: Base | None = None, **how: Any) -> Environment:
        return Environment(base or self.base, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder)), **how)

    @cached_property
    def sdist(self) -> Path:
        made = self.environment("sdist", with_torch=False)
        made.run("python -m pip install --quiet build", self.folder)
        made.run(f"python -m build --sdist --outdir '{self.folder}' .", ROOT)
        return next(self.folder.glob("efe_kernels-*.tar.gz"))

    def source(self, name: str) -> Path:
        """A source folder, unpacked from the sdist."""
        folder = self.folder / f"source-{name}"
        if not folder.exists():
            with tarfile.open(self.sdist) as archive:
                archive.extractall(folder)
        return next(folder.iterdir())

    def ready(self, name: str, base: Base | None = None, **how: Any) -> Environment:
        """An environment with torch in which the first of the two commands has been run."""
        made = self.environment(name, base, **how)
        made.run(self.commands[0], self.folder)
        return made

    @cached_property
    def commands(self) -> tuple[str, str]:
        """The two commands that an isolated build tells its user to run."""
        isolated = self.environment("isolated")
        told = last_line(isolated.run("pip install .", self.source("isolated"), fails=True))
        found = re.fullmatch(ISOLATED, told)
        expect(found, f"the last line of the build is: {told}")
        assert found is not None
        return found[1], found[2]

    def wheel(self, base: Base) -> Path:
        """The compiled wheel of this base, whose objects stay for what else is built from the same folder."""
        if base.python not in self.wheels:
            made = self.ready("build", base)
            dist = Path(tempfile.mkdtemp(prefix="dist-", dir=self.folder))
            source = self.source(f"python-{base.release}-torch-{base.torch}")
            made.run(f"pip wheel --no-build-isolation --no-deps --wheel-dir '{dist}' .", source)
            self.wheels[base.python] = next(dist.glob("*.whl"))
        return self.wheels[base.python]


def check(made: Environment, backend: str) -> dict[str, Any]:
    """Uses the library in an environment, from a folder without sources; gives what `tests.install.uses` prints."""
    empty = Path(tempfile.mkdtemp(dir=made.folder))
    script = shutil.copy(uses.__file__, empty / "uses.py")
    command = f"python -W ignore '{script}'"
    found: dict[str, Any] = json.loads(made.run(command, empty).splitlines()[-1])
    for name, value in uses.EXPECTED.items():
        expect(math.isclose(found[name], value, rel_tol=1e-5), f"{name} is {found[name]}, not {value}")
    expect(found["backend"] == backend, f"{found['backend']} serves, not {backend}")
    return found


def first_warning(made: Environment) -> str:
    """What the first import says on stderr."""
    return made.run('python -c "import efe_kernels"', made.folder)


# The rows: each returns what was seen, or raises.
def isolation_on(matrix: Matrix) -> str:
    """`pip install .` in an environment with torch"""
    return f"fails and says to run `{matrix.commands[0]}` and `{matrix.commands[1]}`"


def isolation_on_without_torch(matrix: Matrix) -> str:
    """`pip install .` in an empty environment"""
    told = matrix.environment("nothing", with_torch=False).run("pip install .", matrix.source("isolated"), fails=True)
    expect(re.fullmatch(ISOLATED, last_line(told)), last_line(told))
    expect("Downloading torch" not in told, "torch is downloaded before the build fails")
    return "fails with the same sentence, before torch is downloaded"


def isolation_off(matrix: Matrix) -> str:
    """the two commands that the isolated build names"""
    matrix.wheel(matrix.base)  # the objects are compiled once
    made = matrix.ready("two-commands")
    source = matrix.source(f"python-{matrix.base.release}-torch-{matrix.base.torch}")
    made.run(matrix.commands[1], source)
    told = made.run('python -c "import efe_kernels"', source)
    expect("Run from another folder" in told, "in the source folder the import does not say that it takes the sources")
    return f"works, {check(made, 'C++')['backend']} serves; in the source folder the import says where it serves"


def isolation_off_without_torch(matrix: Matrix) -> str:
    """`pip install --no-build-isolation .` where torch is missing"""
    made = matrix.environment("no-torch", with_torch=False)
    made.run("pip install 'setuptools>=77' ninja 'pybind11>=2.13'", matrix.folder)
    told = last_line(made.run("pip install --no-build-isolation .", matrix.source("isolated"), fails=True))
    expect(re.fullmatch(ISOLATED, told), told)
    return "fails with the same sentence"


def metadata(matrix: Matrix) -> str:
    """`python setup.py --version` and `egg_info` where torch is missing"""
    made = matrix.environment("metadata", with_torch=False)
    made.run("pip install 'setuptools>=77'", matrix.folder)
    found = last_line(made.run("python setup.py --version", matrix.source("isolated")))
    made.run("python setup.py --quiet egg_info", matrix.source("isolated"))
    return f"works: {found}"


def sdist(matrix: Matrix) -> str:
    """`python -m build --sdist` where torch is missing; all rows build from it"""
    with tarfile.open(matrix.sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers()}
    if not (ROOT / ".git").exists():
        return "works (not compared with a git tree: there is none)"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    missing = [file for file in listed if file not in packed and not file.startswith(".") and (ROOT / file).exists()]
    expect(not missing, f"the sdist lacks {', '.join(missing[:5])}")
    return "works, holds every file of the git tree"


def wheel(matrix: Matrix) -> str:
    """the compiled wheel into an environment with torch alone: no numpy, no Triton, no compiler, no extra"""
    made = matrix.environment("wheel")
    made.run(f"pip install '{matrix.wheel(matrix.base)}'", matrix.folder, path=[])
    found = check(made, "C++")
    expect(not found["numpy"], "numpy is there")
    expect("efe_kernels" not in first_warning(made), first_warning(made))
    return f"works, C++ serves; CPU {found['CPU']}, Triton {found['triton']}"


def no_triton(matrix: Matrix) -> str:
    """the wheel beside a torch without Triton"""
    made = matrix.environment("no-triton", without=("triton",))
    made.run(f"pip install --no-index --no-deps '{matrix.wheel(matrix.base)}'", matrix.folder)
    found = check(made, "C++")
    expect(found["triton"] == "not installed", f"triton is {found['triton']}")
    missing = [sentence for sentence in found["missing on CUDA"] if "Triton" in sentence]
    if not found["cuda torch"]:
        expect(not missing, f"a torch for the CPU says: {missing}")
        return "works, C++ serves, and nothing is missing: this torch is for the CPU"
    expect(missing, "nothing says that Triton is missing")
    return f"works, C++ serves; on CUDA: {missing[0]}"


def no_extras(matrix: Matrix) -> str:
    """the wheel alone, and then `efe-train`"""
    made = matrix.environment("no-extras")
    made.run(f"pip install '{matrix.wheel(matrix.base)}'", matrix.folder)
    told = last_line(made.run("efe-train --device cpu --max_batches 1", made.folder, fails=True))
    expect('pip install "efe-kernels[train]"' in told, told)
    return f"the library works; {told}"


def no_compiler(matrix: Matrix) -> str:
    """`pip install -v --no-build-isolation .` without a C++ compiler"""
    made = matrix.ready("no-compiler")
    told = made.run("pip install -v --no-build-isolation .", matrix.source("no-compiler"), path=[])
    expect("no C++ compiler" in told, "the build does not say what it leaves out")
    found = check(made, "reference")
    expect(NOT_BUILT in first_warning(made), "the first import does not say what is missing")
    expect(NOT_BUILT in found["extension"], "efe_kernels.info does not say what is missing")
    return f"works without C++; the first import says: {found['extension']}"


def required(matrix: Matrix) -> str:
    """the same with EFE_KERNELS_REQUIRE_EXT=1"""
    made = matrix.ready("required")
    command, source = "pip install --no-build-isolation .", matrix.source("no-compiler")
    told = last_line(made.run(command, source, fails=True, path=[], EFE_KERNELS_REQUIRE_EXT="1"))
    expect(told.startswith("EFE_KERNELS_REQUIRE_EXT=1 asks for the C++ extension, but no C++ compiler"), told)
    return f"fails: {told}"


def editable(matrix: Matrix) -> str:
    """`pip install --no-build-isolation --editable .`"""
    matrix.wheel(matrix.base)
    made = matrix.ready("editable")
    source = matrix.source(f"python-{matrix.base.release}-torch-{matrix.base.torch}")
    made.run("pip install --no-build-isolation --editable .", source)
    found = check(made, "C++")
    expect(Path(found["file"]).is_relative_to(source), f"{found['file']} is imported")
    return "works, C++ serves, from the source folder"


def another_torch(matrix: Matrix) -> str:
    """the wheel built with one torch beside another"""
    seen = []
    for other in matrix.others:
        if other.torch != matrix.base.torch and other.release == matrix.base.release:
            made = matrix.environment("other", other)
            made.run(f"pip install --no-index --no-deps '{matrix.wheel(matrix.base)}'", matrix.folder)
            check(made, "C++")
            seen.append(f"built with {matrix.base.torch}, beside {other.torch}: works, C++ serves")
    return "; ".join(seen) or "left out: --python names no environment of this Python with another torch"


def pythons(matrix: Matrix) -> str:
    """build and use with every Python from 3.10 to 3.13 that is found"""
    bases = {".".join(base.release.split(".")[:2]): base for base in (*matrix.others, matrix.base)}
    seen = []
    for release in RELEASES:
        base = bases.get(release)
        if base is None:
            there = shutil.which(f"python{release}", path=KEPT["PATH"])
            seen.append(f"{release} left out ({'is there without torch' if there else 'is not on the PATH'})")
            continue
        made = matrix.environment(f"python{release}", base)
        made.run(f"pip install --no-index --no-deps '{matrix.wheel(base)}'", matrix.folder)
        check(made, "C++")
        seen.append(f"{base.release} works with torch {base.torch}, C++ serves")
    return "; ".join(seen)


ROWS: dict[str, Callable[[Matrix], str]] = {
    row.__name__.replace("_", "-"): row
    for row in (
        isolation_on, isolation_on_without_torch, isolation_off, isolation_off_without_torch, metadata, sdist, wheel,
        no_triton, no_extras, no_compiler, required, editable, another_torch, pythons,
    )
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.install.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--python", nargs="+", default=[], metavar="PATH", help="more interpreters that have a torch")
    given = parser.parse_args()
    found = {python: Base.of(python) for python in (sys.executable, *given.python)}
    without = [python for python, base in found.items() if base is None]
    if without:
        parser.error(f"torch cannot be imported by {', '.join(without)}")
    base, *others = [base for base in found.values() if base is not None]
    print(f"Python {base.release}, torch {base.torch}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory(prefix="efe-install-", ignore_cleanup_errors=True) as folder:
        matrix = Matrix(Path(folder), base, others)
        for name in given.only:
            try:
                outcome = f"ok      {ROWS[name](matrix)}"
            except (Unexpected, subprocess.CalledProcessError) as error:
                failed, outcome = True, f"FAILED  {error}"
            print(f"{name:<28}{outcome}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
