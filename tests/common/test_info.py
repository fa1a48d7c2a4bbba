"""Which kernel serves which op: what torch's dispatcher says, and what `python -m efe_kernels.info` makes of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import efe_kernels
from efe_kernels import info
from efe_kernels.common import extension
from efe_kernels.common.library import INTERPRET, OPS

TRITON_REGISTERS = "efe_kernels/common/library.py"
CUDA_CPP_REGISTERS = "csrc/prompt/cuda_ops.cpp"
# As in setup.py: where the CUDA sources were demanded, a test that leaves itself out would hide that they are missing.
CUDA_DEMANDED = os.environ.get("EFE_KERNELS_CUDA") == "1"


def with_cuda() -> bool:
    return extension.CUDA in sys.modules


def serves(op: str, key: str) -> str:
    source = info.registered_at(op, key)
    assert source is not None, f"the reference serves {op} under the key {key}"
    return source


@pytest.mark.skipif(extension.PROBLEM is not None, reason="without the extension")
@pytest.mark.parametrize("op", OPS)
def test_the_cpu_is_served_by_the_cpp_of_the_extension(op: str) -> None:
    if INTERPRET and OPS[op].triton:
        assert serves(op, "CPU").endswith(TRITON_REGISTERS)
        assert info.backend(op, "CPU") == "Triton (interpreter)"
    else:
        assert re.search(r"csrc/\w+/(?!cuda)\w+\.cpp$", serves(op, "CPU"))
        assert info.backend(op, "CPU") == "C++"


@pytest.mark.parametrize("op", [op for op, served in OPS.items() if served.triton])
def test_cuda_is_served_by_triton_where_an_op_has_such_kernels(op: str) -> None:
    assert serves(op, "CUDA").endswith(TRITON_REGISTERS)
    assert info.backend(op, "CUDA") == "Triton"


@pytest.mark.skipif(not (with_cuda() or CUDA_DEMANDED), reason="without the CUDA sources")
@pytest.mark.parametrize("op", [op for op, served in OPS.items() if not served.triton])
def test_cuda_is_served_by_the_cuda_cpp_of_the_extension_where_an_op_has_no_triton_kernels(op: str) -> None:
    assert serves(op, "CUDA").endswith(CUDA_CPP_REGISTERS)
    assert info.backend(op, "CUDA") == "CUDA C++"


def test_an_op_without_a_kernel_is_told_as_served_by_the_reference() -> None:
    with torch.library._scoped_library("efe", "FRAGMENT") as library:
        library.define("kernelless(Tensor x) -> Tensor")
        library.impl("kernelless", torch.neg, "CompositeExplicitAutograd")
        assert info.registered_at("kernelless", "CUDA") is None
        assert info.backend("kernelless", "CUDA") == "reference"


def test_the_table_has_a_row_for_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    table = capsys.readouterr().out
    rows = [re.split(" {2,}", line) for line in table.splitlines()]
    for op in OPS:
        assert [op, info.backend(op, "CPU"), info.backend(op, "CUDA")] in rows


def told(*arguments: str, **environment: str) -> str:
    """What the command prints in a process of its own."""
    command = [sys.executable, "-m", "efe_kernels.info", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return done.stdout


def test_a_program_reads_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert info.main(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == info.facts()
    for name in ("efe-kernels", "torch", "CPU", "threads", "extension"):
        assert re.search(rf"^{name} +{re.escape(str(facts[name]))}$", text, re.MULTILINE)
    assert facts["ops"]["efe_loss_forward"]["CPU"] == info.backend("efe_loss_forward", "CPU")


def test_the_cpu_is_told_as_the_kernels_take_it() -> None:
    facts = json.loads(told("--json", ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1"))
    assert (facts["CPU"], facts["threads"]) == ("default", 1)


def test_the_version_is_that_of_the_distribution() -> None:
    try:
        installed = importlib.metadata.version("efe-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert efe_kernels.__version__ == installed == info.facts()["efe-kernels"]


def test_the_library_is_imported_without_what_only_kernels_and_training_need() -> None:
    """Each of these takes longer to import than the library."""
    program = "import sys, torch; known = set(sys.modules); import efe_kernels; print(*set(sys.modules) - known)"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert "efe_kernels" in imported
    assert not imported & {"triton", "numpy", "transformers", "efe_train"}
