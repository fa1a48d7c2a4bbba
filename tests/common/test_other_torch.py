"""The package as it is installed here beside another torch: `make cuda-build` runs this both ways between its two.

EFE_KERNELS_OTHER_PYTHON: the interpreter of an environment with another torch, of the same release of Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import efe_kernels
from efe_kernels.common import extension

OTHER_PYTHON = os.environ.get("EFE_KERNELS_OTHER_PYTHON")
# Every kind of argument and result that crosses the interface, and an error.
PROGRAM = """
import torch, efe_kernels
from efe_kernels import info
from efe_kernels.common.library import OPS

def check(op, *arguments):
    found, expected = getattr(torch.ops.efe, op)(*arguments), OPS[op].reference(*arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)

assert all(info.backend(op, "CPU") == "C++" for op in OPS)
torch.manual_seed(0)
reward, value, mask = torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 8) < 0.7
for normalize in (None, "tanh", "clamp"):
    check("rl_advantage_forward", reward, value, mask, 0.5, normalize, 4, False)
transitions, settings = (mask, None, None, value.sigmoid(), None), (0.9, 0.8, 1.0, 1.0, 1.0)
check("trace_forward", value, value.T.clone().T, reward, *transitions, *settings)
check("trace_backward", reward, None, [True, False, True], *transitions, *settings)
check("masked_mean_pool_forward", torch.randn(3, 8, 5).bfloat16(), mask)
check("refine_prompt_forward", value, reward.new_zeros(3, 9), reward.new_zeros(9), None, torch.tensor(7), 0.1)
logits, target = torch.randn(2, 3, 4, 4, 10, requires_grad=True), torch.randint(0, 10, (2, 4, 4))
preference = torch.randn(4, 4, 10, requires_grad=True)
for transform in (lambda x: x, torch.Tensor.double):
    total = efe_kernels.efe_loss(transform(logits), target, transform(preference)).total.sum()
    gradients = *torch.autograd.grad(total, (logits, preference)), total.detach().float()
    torch.testing.assert_close(gradients, gradients if transform is not torch.Tensor.double else before)
    before = gradients
try:
    efe_kernels.grid_reward(target + 7, target, target)
    raise AssertionError("a colour out of range passed")
except ValueError as error:
    assert "before must hold colours from 0 to 9" in str(error)
print(torch.__version__)
"""


@pytest.mark.skipif(OTHER_PYTHON is None, reason="EFE_KERNELS_OTHER_PYTHON names no other environment")
def test_the_cpp_kernels_serve_beside_another_torch(tmp_path: Path) -> None:
    assert extension.PROBLEM is None and OTHER_PYTHON is not None
    package = Path(efe_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "efe_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [os.path.abspath(OTHER_PYTHON), "-W", "error:efe_kernels", "-c", PROGRAM], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != torch.__version__
