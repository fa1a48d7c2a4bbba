"""The counter-based noise: the published Philox vectors, the same in every implementation, and normal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efe_kernels import refine_prompt
from efe_kernels.prompt import reference
from tests.prompt.close import assert_close

ROOT = Path(__file__).resolve().parents[2]

# Counter, key and output of philox4x32-10 in the known-answer tests of Random123 (Salmon et al. 2011).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

PRINT_WORDS = """
#include <cstdio>
#include <cstdlib>
#include "common/philox.h"
int main(int, char** argv) {
    uint32_t v[6];
    for (int i = 0; i < 6; ++i) v[i] = std::strtoul(argv[i + 1], nullptr, 10);
    const uint64_t key = v[4] | static_cast<uint64_t>(v[5]) << 32;
    const efe::Words4 words = efe::philox4x32({v[0], v[1], v[2], v[3]}, key);
    std::printf("%u %u %u %u", words.x0, words.x1, words.x2, words.x3);
}
"""


def draw(seed: int, rows: int, width: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise of refine_prompt: its action where the mean and log_std are 0."""
    zeros = torch.zeros(rows, width, dtype=dtype, device=device)
    return refine_prompt(zeros[:, 1:], zeros, zeros[0], seed=seed).action


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert tuple(int(word) for word in reference.philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def test_header_gives_the_published_words(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "words.cpp", tmp_path / "words"
    source.write_text(PRINT_WORDS)
    subprocess.run([compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    for counter, key, expected in KNOWN_ANSWERS:
        output = subprocess.run([program, *map(str, counter + key)], check=True, capture_output=True, text=True).stdout
        assert tuple(map(int, output.split())) == expected


# The same words in every implementation: a single wrong bit would move a normal by far more than rounding does. The
# normals differ by the rounding of log, sqrt, sin and cos: a few units in the last place; in float64 also by that of
# the reference's own angle, which moves a sine or cosine near 0 by a unit of 1.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "least"), [(torch.float32, 4 * 2**-23, 2**-23), (torch.float64, 8 * 2**-52, 1.0)]
)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("shape", [(3, 2), (2, 5), (40, 258), (1, 4097)], ids=str)
def test_kernels_draw_what_the_reference_draws(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, tolerance: float, least: float, device: str
) -> None:
    noise = draw(seed, *shape, device, dtype).cpu().double()
    expected = reference.philox_normal(torch.tensor(seed), *shape, dtype=torch.float64, device=torch.device("cpu"))
    error = ((noise - expected).abs() / expected.abs().clamp_min(least)).max().item()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_noise_is_standard_normal(device: str) -> None:
    noise = draw(11, 2000, 512, device).cpu().double()
    count = noise.numel()
    # Four standard errors of each estimate.
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    sides = torch.tensor([-2.0, -1.0, -0.1, 0.1, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = torch.special.ndtr(sides)
    found = (noise.flatten()[:, None] < sides).double().mean(0)
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()
    for lag in (1, 2, 3, 4, 512):
        correlation = (noise.flatten()[lag:] * noise.flatten()[:-lag]).mean()
        assert abs(correlation) < 4 / count**0.5, f"lag {lag}"


def test_seed_determines_the_noise(device: str) -> None:
    assert torch.equal(draw(3, 4, 9, device), draw(3, 4, 9, device))
    assert not torch.equal(draw(3, 4, 9, device), draw(4, 4, 9, device))
    assert not torch.equal(draw(3, 4, 9, device), draw(3 + 2**32, 4, 9, device))


def test_noise_depends_on_its_place_alone(device: str) -> None:
    large = draw(3, 50, 300, device)
    # The vectorised and the scalar path of a kernel may round the last digit differently.
    assert_close("fewer rows", draw(3, 7, 300, device), large[:7], 2**-22)
    assert_close("fewer columns", draw(3, 50, 6, device), large[:, :6], 2**-22)


def test_without_a_seed_torch_manual_seed_governs(device: str) -> None:
    zeros = torch.zeros(3, 8, device=device)

    def sample() -> Tensor:
        return refine_prompt(zeros[:, 1:], zeros, zeros[0]).action

    torch.manual_seed(5)
    first, second = sample(), sample()
    torch.manual_seed(5)
    assert torch.equal(sample(), first)
    assert torch.equal(sample(), second)
    assert not torch.equal(first, second)


def test_a_default_device_does_not_move_the_seed() -> None:
    zeros = torch.zeros(3, 8)
    with torch.device("meta"):
        assert refine_prompt(zeros[:, 1:], zeros, zeros[0], seed=1).action.device.type == "cpu"
        assert refine_prompt(zeros[:, 1:], zeros, zeros[0]).action.device.type == "cpu"


COMPARE = """
import torch
from efe_kernels.prompt import reference
import efe_kernels
assert torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "{capability}"), torch.backends.cpu.get_cpu_capability()
torch.manual_seed(0)
prompt, mean, log_std = torch.randn(5, 131), 3 * torch.randn(5, 132), torch.randn(5, 132)
mean.requires_grad_(), log_std.requires_grad_()
result = efe_kernels.refine_prompt(prompt, mean, log_std, seed=3)
upstream = [torch.randn_like(output) for output in result]
found = torch.autograd.grad(list(result), [mean, log_std], upstream)
exact = [tensor.detach().double().requires_grad_() for tensor in (mean, log_std)]
noise = reference.philox_normal(torch.tensor(3), 5, 132, dtype=torch.float64, device=torch.device("cpu"))
expected = reference.refine_prompt(prompt.double(), *exact, noise, 0.2)
wanted = torch.autograd.grad(list(expected), exact, [grad.double() for grad in upstream])
for actual, want in zip((*result, *found), (*expected, *wanted)):
    assert (actual - want).abs().max() <= 4e-6 * want.abs().max(), (actual - want).abs().max()
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_kernels_for_older_processors(capability: str) -> None:
    """The C++ kernels are compiled per instruction set; torch's own switch chooses a lesser one than this CPU has."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "PYTHONPATH": str(ROOT)}
    script = COMPARE.format(capability=capability)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=ROOT)
