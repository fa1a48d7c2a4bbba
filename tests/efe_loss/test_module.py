"""EFELoss as a module: its running target preference, alone and over several ranks, and what it owns."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from efe_kernels import EFELoss


def small(**settings: Any) -> EFELoss:
    return EFELoss(max_grid_size=4, num_colors=5, prompt_dim=8, **settings)


def batch(seed: int, episodes: int, height: int = 3, width: int = 4) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 5, (episodes, height, width), generator=generator)
    valid = torch.rand(target.shape, generator=generator) < 0.7
    return target, valid, float(torch.rand((), generator=generator))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"rate {rate}": ({"success_rate": rate}, "success_rate must be")
        for rate in (math.nan, math.inf, 95, -1, "1", None, torch.tensor(1.5), torch.tensor(math.nan), torch.ones(2))
    },
    "floating target": ({"target": torch.zeros(2, 3, 4)}, "target must have an integer dtype"),
    "vector": ({"target": torch.zeros(3, dtype=torch.int64)}, r"target must have the shape \[B, H, W\] or \[H, W\]"),
    "colour 5": ({"target": torch.full((2, 3, 4), 5)}, r"target must be in \[0, 5\) or ignore_index"),
    "colour -1": ({"target": torch.full((2, 3, 4), -1)}, r"target must be in \[0, 5\) or ignore_index"),
    "large": ({"target": torch.zeros(2, 3, 5, dtype=torch.int64)}, "target must be a grid of at most 4 x 4 cells"),
    "floating valid": ({"valid": torch.ones(2, 3, 4)}, "valid must be a bool tensor"),
    "other valid": ({"valid": torch.ones(3, 4, dtype=torch.bool)}, "valid must have the shape \\[B, H, W\\]"),
    "valid elsewhere": (
        {"valid": torch.ones(2, 3, 4, dtype=torch.bool, device="meta")},
        "valid must be on the device of target",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_update_changes_nothing(name: str) -> None:
    module = small()
    module.update_target_preference(*batch(0, 2))
    before = module.target_preference.clone()
    arguments = dict(zip(("target", "valid", "success_rate"), batch(1, 2), strict=True))
    replaced, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{message}"):
        module.update_target_preference(**{**arguments, **replaced})
    assert torch.equal(module.target_preference, before)


def test_an_update_moves_counted_cells_toward_the_mean_of_their_targets() -> None:
    module = small()
    target = torch.tensor([[[1, 2]], [[3, -100]], [[1, 4]]])
    valid = torch.tensor([[[True, True]], [[True, True]], [[True, False]]])
    module.update_target_preference(target, valid, 1.0)
    expected = torch.zeros(4, 4, 5)
    expected[0, 0, [1, 3]] = 0.2 * torch.tensor([2 / 3, 1 / 3])
    expected[0, 1, 2] = 0.2
    torch.testing.assert_close(module.target_preference, expected)


def test_the_module_says_what_it_is_made_of() -> None:
    told = repr(EFELoss(max_grid_size=7, prompt_dim=64, reduction="sum"))
    for part in ("max_grid_size=7", "num_colors=10", "prompt_dim=64", "risk=1.0", "reduction='sum'"):
        assert part in told


def test_without_a_prompt_every_parameter_has_a_gradient() -> None:
    module = small()
    target, valid, _ = batch(0, 2)
    output = module(torch.randn(2, 3, 3, 4, 5), target, valid=valid)
    output.total.backward()
    assert module.projection.grad is not None and not module.projection.grad.any()
    torch.nn.init.constant_(module.projection, math.inf)
    assert module(torch.zeros(2, 3, 3, 4, 5), target, valid=valid).total.isfinite()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def on_rank(rank: int, port: int, results: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    target, valid, rate = batch(rank, 2 + rank, height=3 - rank)
    together, alone = small(), small()
    together.update_target_preference(target, valid, rate)
    alone.update_target_preference(target, valid, rate, synchronize=False)
    wrapped = DistributedDataParallel(small())
    for _ in range(2):  # the second call fails where the first one left a parameter without a gradient
        wrapped(torch.randn(*target.shape[:1], 3, *target.shape[1:], 5), target, valid=valid).total.backward()
    results[rank] = (together.target_preference, alone.target_preference)
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_on_the_running_preference_and_train_without_a_prompt() -> None:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(on_rank, args=(free_port(), results), nprocs=2)
        found = dict(results)
    batches = [batch(rank, 2 + rank, height=3 - rank) for rank in range(2)]
    one = small()
    padded = [torch.nn.functional.pad(target, (0, 0, 0, 3 - target.shape[1]), value=-100) for target, _, _ in batches]
    masks = [torch.nn.functional.pad(valid, (0, 0, 0, 3 - valid.shape[1])) for _, valid, _ in batches]
    rate = sum(rate * target.shape[0] for target, _, rate in batches) / 5
    one.update_target_preference(torch.cat(padded), torch.cat(masks), rate)
    for rank, (target, valid, rate) in enumerate(batches):
        torch.testing.assert_close(found[rank][0], one.target_preference)
        alone = small()
        alone.update_target_preference(target, valid, rate)
        assert torch.equal(found[rank][1], alone.target_preference)


def test_a_module_in_double_moves_in_double() -> None:
    module = EFELoss(max_grid_size=2, num_colors=2, prompt_dim=2).double()
    module.update_target_preference(torch.zeros(1, 2, 2, dtype=torch.int64), None, 0.1)
    assert (module.target_preference[..., 0] == 0.05 + 0.15 * 0.1).all()
