"""Every Triton kernel of the family, as its launcher calls it, compiles for each architecture and spills nothing."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from efe_kernels.common.library import INTERPRET

triton = pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("the interpreter has replaced the compiler in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from efe_kernels.advantage.grid_reward import kernels as grid_reward  # noqa: E402
from efe_kernels.advantage.policy_gradient_loss import kernels as policy_gradient_loss  # noqa: E402
from efe_kernels.advantage.rl_advantage import kernels as rl_advantage  # noqa: E402
from efe_kernels.advantage.trace import kernels as trace  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands where a kernel stands in its launcher, and keeps what it was launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.launches.append((self.kernel, {**named, **kwargs}))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    found: list[tuple[Any, dict[str, Any]]] = []
    for module in (grid_reward, rl_advantage, trace, policy_gradient_loss):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, found))
    yield found


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What the launch would have compiled: 1 and None as constants, addresses and multiples of 16 as aligned."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def check(launches: list[tuple[Any, dict[str, Any]]], expected: set[str]) -> None:
    """The launches are of the expected kernels, and each compiles without local memory."""
    assert {kernel.fn.__name__ for kernel, _ in launches} == expected
    for kernel, arguments in launches:
        for architecture in (80, 90, 100):
            options = {"num_warps": arguments.get("num_warps", 4), "enable_fp_fusion": arguments["enable_fp_fusion"]}
            compiled = triton.compile(
                source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options
            )
            assert local_bytes(compiled.asm["cubin"]) == 0, (kernel.fn.__name__, architecture)


def local_bytes(cubin: bytes) -> int:
    """Bytes of stack and local memory per thread: what registers spill to."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]) + int(found[2])


def test_grid_reward(launches: Any) -> None:
    target = torch.zeros(2, 30, 30, dtype=torch.int64)
    channel_last = torch.zeros(2, 30, 30, 10)
    channel_first = torch.zeros(2, 10, 30, 30, dtype=torch.bfloat16).permute(0, 2, 3, 1)
    weights = [1.0, 0.5, 0.5, 0.5]
    grid_reward.grid_reward(channel_last, channel_first, target, None, None, weights, 10)
    small = target[:, :7, :13].to(torch.uint8)
    valid = torch.ones(2, 30, 30, dtype=torch.bool)
    grid_reward.grid_reward(channel_last.double(), small, target, valid, torch.zeros(2, 2), weights, 10)
    check(launches, {"grid_reward_kernel"})


@pytest.mark.parametrize(("group_size", "normalize"), [(0, "tanh"), (8, "clamp"), (30000, None)])
def test_rl_advantage(launches: Any, group_size: int, normalize: str | None) -> None:
    reward = torch.zeros(60000)
    mask = torch.ones(60000, dtype=torch.bool)
    arguments = (reward, reward.bfloat16(), mask)
    _, statistics = rl_advantage.rl_advantage_forward(*arguments, 5.0, normalize, group_size)
    rl_advantage.rl_advantage_backward(reward, *arguments, statistics, 5.0, normalize, group_size)
    expected = {"rl_advantage_kernel", "rl_advantage_backward_kernel"}
    if group_size == 30000:
        expected |= {"rl_advantage_moments_kernel", "rl_advantage_sums_kernel"}
    check(launches, expected)


@pytest.mark.parametrize(("steps", "kind"), [(8, "serial"), (1500, "scan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trace(launches: Any, steps: int, kind: str, dtype: torch.dtype) -> None:
    floats = torch.zeros(4096, steps, dtype=dtype)
    flags = torch.zeros(4096, steps, dtype=torch.bool)
    if dtype == torch.float32:
        trace.gae_forward(floats, floats, floats, flags, None, 0.99, 0.95, 1.0)
        trace.gae_backward(floats, None, flags, None, 0.99, 0.95, [True, False])
    else:
        trace.vtrace_forward(floats, floats, floats, floats, flags, flags, 0.99, 1.0, 1.0, 1.0)
        trace.vtrace_backward(floats, floats, floats, flags, flags, 0.99, 1.0, 1.0, [True, True])
    check(launches, {f"trace_{kind}_kernel", f"trace_{kind}_backward_kernel"})


@pytest.mark.parametrize("numel", [64, 100000])
def test_policy_gradient_loss(launches: Any, numel: int) -> None:
    x, mask, scalar = torch.zeros(numel), torch.ones(numel, dtype=torch.bool), torch.ones(())
    settings = (0.2, 0.5, 0.01)
    expected = {"policy_gradient_loss_kernel", "policy_gradient_loss_backward_kernel"}
    if numel == 64:
        policy_gradient_loss.policy_gradient_loss_forward(x, x, x, x, x, None, None, *settings)
    else:
        policy_gradient_loss.policy_gradient_loss_forward(x, x, x, x, x, x, mask, *settings)
        expected.add("policy_gradient_loss_finish_kernel")
    policy_gradient_loss.policy_gradient_loss_backward(
        scalar, None, scalar, None, x, x, x, x, x, mask, torch.ones(4), *settings, [True, True, True]
    )
    check(launches, expected)
